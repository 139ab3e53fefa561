#version 460
// Gradient of a tile of queries, on cooperative matrices: with P = exp(S - logsumexp) over the
// keys and coarse rows of its work list, dS = P (dout V^T - delta), dq = scale dS K; and that of
// the biases of coarse rows. A subgroup keeps its rows of q, dout and dq in registers; keys and
// values pass through shared memory.
#include "common/coopmat_coarse.glsl"

const uint PART_GRANULES = BLOCK_GRANULES < 2 ? 1 : 2;  // scored at once, in registers
// Factors of dq loaded before the barrier in front of the products: 1 to 2% faster.
const uint KEYS_AHEAD = DIM_TILES < 4 ? DIM_TILES : (HEAD_DIM <= 64 ? 4 : 3);

QueryTile tile;
float to_log2;
Left q[ROW_TILES][DIM_TILES], dout[ROW_TILES][DIM_TILES];
Accumulator dq[ROW_TILES][DIM_TILES];
float reference[ROWS], delta[ROWS];
vec2 level_gradient[ROWS];

void load_keys(out Right k, uint keys_start, uint granule, uint d) {
  coopMatLoad(k, staged, keys_start + granule * 16 * PITCH + 2 * d, PITCH, ROW_MAJOR);
}

// `mixed` is known at compile time: full blocks need no branch.
void attend_block(Walk walk, uint block, bool mixed) {
  begin_step(walk);
  uint keys_start = stage_start(block), values_start = keys_start + OPERAND_VECTORS;
  [[unroll]] for (uint part = 0; part < BLOCK_GRANULES; part += PART_GRANULES) {
    if (part > 0 && is_halfway(part, PART_GRANULES)) continue_step(walk, block);
    Accumulator s[ROW_TILES][PART_GRANULES], dp[ROW_TILES][PART_GRANULES];
    Accumulator slope[ROW_TILES][PART_GRANULES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        s[t][g] = Accumulator(0.0);
        dp[t][g] = Accumulator(0.0);
      }
    }
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        uint at = (part + g) * 16 * PITCH + 2 * d;
        Right k, v;
        coopMatLoad(k, staged, keys_start + at, PITCH, COLUMN_MAJOR);
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
          s[t][g] = coopMatMulAdd(q[t][d], k, s[t][g]);
        }
        coopMatLoad(v, staged, values_start + at, PITCH, COLUMN_MAJOR);
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
          dp[t][g] = coopMatMulAdd(dout[t][d], v, dp[t][g]);
        }
      }
    }
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        to_known(s[t][g]);
        to_known(dp[t][g]);
      }
    }
    // In a block of one part the second half begins here.
    if (part == 0 && is_halfway(part, PART_GRANULES)) continue_step(walk, block);

    Right keys_ahead[KEYS_AHEAD];
    [[unroll]] for (uint d = 0; d < KEYS_AHEAD; ++d) load_keys(keys_ahead[d], keys_start, part, d);
    CoarseColumns columns[PART_GRANULES];
    if (walk.coarse) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        columns[g] = load_coarse_columns(walk, tile, block, part + g);
      }
      [[unroll]] for (uint r = 0; r < ROWS; ++r) {
        uint t = r / LANE_ROWS;
        uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
        vec2 bias = load_levels_pair(OPERAND_LEVEL_BIAS, has(FEATURE_LEVEL_BIAS), tile, r);
        vec2 dshares = load_levels_pair(OPERAND_DSHARES, has(FEATURE_DSHARES), tile, r);
        [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
          [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
            uint i = r % LANE_ROWS * LANE_COLUMNS + c;
            LaneScore score = coarse_column_score(s[t][g][i], position, row % TILE_HEADS,
                                                  columns[g], c, bias);
            s[t][g][i] = score.log2_value;
            if (TRANSFORMED) slope[t][g][i] = score.slope;
            dp[t][g][i] += columns[g].super_mean[c] ? dshares.y : dshares.x;
          }
        }
      }
    } else if (mixed) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        uint granule = walk.entries.entry[walk.first_entry + block * BLOCK_GRANULES + part + g];
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
          [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
            uint row = subgroup_row(t) + element_row(i);
            uint position = tile.first_position + row / TILE_HEADS;
            uint key = granule == NO_GRANULE ? ABSENT : granule + element_column(i);
            LaneScore score = lane_score(s[t][g][i], position, row % TILE_HEADS, key);
            s[t][g][i] = score.log2_value;
            if (TRANSFORMED) slope[t][g][i] = score.slope;
          }
        }
      }
    }
    limit_overlap();

    [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
      Left ds[ROW_TILES];
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
          uint r = t * LANE_ROWS + i / LANE_COLUMNS;
          vec2 weight = exp2(vec2(fma(s[t][g][i], to_log2, -reference[r]),
                                  fma(s[t][g][i + 1], to_log2, -reference[r])));
          vec2 gradient = score_gradients(weight, vec2(dp[t][g][i], dp[t][g][i + 1]),
                                          vec2(delta[r]), mixed);
          if (walk.coarse) {
            level_gradient[r] +=
                at_level(columns[g].super_mean[i % LANE_COLUMNS], gradient.x) +
                at_level(columns[g].super_mean[i % LANE_COLUMNS + 1], gradient.y);
          }
          if (TRANSFORMED) gradient *= vec2(slope[t][g][i], slope[t][g][i + 1]);
          ElementPair pair = ElementPair(gradient);
          ds[t][i] = pair.x;
          ds[t][i + 1] = pair.y;
        }
        to_own(ds[t]);
      }
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        Right k;
        if (g == 0 && d < KEYS_AHEAD) {
          k = keys_ahead[d];
        } else {
          load_keys(k, keys_start, part + g, d);
        }
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
          dq[t][d] = coopMatMulAdd(ds[t], k, dq[t][d]);
        }
      }
    }
    limit_overlap();
  }
  end_step(block);
}

void main() {
  if (!locate_uniform_tile(workgroup_index(), tile)) return;
  set_scores(tile.first_head);
  to_log2 = score_factor();
  View q_view = view_of(OPERAND_Q, tile.first_head, 1);
  View dout_view = view_of(OPERAND_DOUT, tile.first_head, 1);
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    exchange_in(q_view, tile, t, negate_products());
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(q[t][d], staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
    }
    barrier();
    exchange_in(dout_view, tile, t, false);
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(dout[t][d], staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
      dq[t][d] = Accumulator(0.0);
    }
    barrier();
  }
  View lse_view = view_of(OPERAND_LSE, tile.first_head, 2);
  View delta_view = view_of(OPERAND_DELTA, tile.first_head, 2);
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    uint row = subgroup_row(r / LANE_ROWS) + lane_row(r % LANE_ROWS), head = row % TILE_HEADS;
    uint position = min(tile.first_position + row / TILE_HEADS, PARAMS.queries - 1);
    reference[r] = weight_reference(load_float(lse_view.base, row_start(lse_view, position, head)));
    delta[r] = load_float(delta_view.base, row_start(delta_view, position, head));
  }

  Walk walk = start_walk(tile);
  uint block = 0;
  for (; block < walk.full_blocks; ++block) attend_block(walk, block, false);
  for (; block < walk.blocks; ++block) attend_block(walk, block, true);
  if (has(FEATURE_PLAN)) {
    [[unroll]] for (uint r = 0; r < ROWS; ++r) level_gradient[r] = vec2(0);
    Walk coarse = start_coarse_walk(tile);
    for (block = 0; block < coarse.blocks; ++block) attend_block(coarse, block, true);
    if (has(FEATURE_DLEVEL_BIAS)) {
      [[unroll]] for (uint r = 0; r < ROWS; ++r) {
        store_levels_pair(OPERAND_DLEVEL_BIAS, tile, r, level_gradient[r]);
      }
    }
    if (!has(FEATURE_DQ)) return;
  }

  store_sums(view_of(OPERAND_DQ, tile.first_head, 1), tile, dq, slope_factor() * truncation_gain());
}
