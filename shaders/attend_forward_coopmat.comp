#version 460
// Attention of a tile of queries to the keys, and the coarse rows of a plan, on its work list, on
// cooperative matrices: out, logsumexp and the shares of coarse rows. A subgroup keeps its rows of Q and O in registers; keys and values pass through
// shared memory. The softmax is kept in powers of two.
#include "common/coopmat_coarse.glsl"

// Granules scored at once, in registers.
const uint PART_GRANULES = HEAD_DIM <= 64 ? 2 : 1;

const float LOWEST = -1e38;  // finite: exp2(-INFINITY - LOWEST) is 0
// The reference that weights are relative to follows the maximum of a row only when that has grown
// by more than this, so that O is rarely rescaled; weights stay within float16.
const float SLACK = 8.0;

QueryTile tile;
float to_log2;
Left q[ROW_TILES][DIM_TILES];
Accumulator o[ROW_TILES][DIM_TILES];
float reference[ROWS], sum[ROWS];
vec2 level_sum[ROWS];  // of coarse rows

// Lets the references follow the maxima of the scores `top`.
void rescale(float top[ROWS], bool coarse) {
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    float next = max(reference[r], quad_max(top[r]) * to_log2);
    float shrink = exp2(reference[r] - next);
    reference[r] = next;
    sum[r] *= shrink;
    if (coarse) level_sum[r] *= shrink;
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
        o[r / LANE_ROWS][d][r % LANE_ROWS * LANE_COLUMNS + c] *= shrink;
      }
    }
  }
}

// `mixed` is known at compile time: full blocks need no branch.
void attend_block(Walk walk, uint block, bool mixed) {
  begin_step(walk);
  uint keys_start = stage_start(block), values_start = keys_start + OPERAND_VECTORS;
  [[unroll]] for (uint part = 0; part < BLOCK_GRANULES; part += PART_GRANULES) {
    if (is_halfway(part, PART_GRANULES)) continue_step(walk, block);
    Accumulator s[ROW_TILES][PART_GRANULES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) s[t][g] = Accumulator(0.0);
    }
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        Right k;
        coopMatLoad(k, staged, keys_start + (part + g) * 16 * PITCH + 2 * d, PITCH, COLUMN_MAJOR);
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
          s[t][g] = coopMatMulAdd(q[t][d], k, s[t][g]);
        }
      }
    }
    CoarseColumns columns[PART_GRANULES];
    if (walk.coarse) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        columns[g] = load_coarse_columns(walk, tile, block, part + g);
      }
      [[unroll]] for (uint r = 0; r < ROWS; ++r) {
        uint t = r / LANE_ROWS;
        uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
        vec2 bias = load_levels_pair(OPERAND_LEVEL_BIAS, has(FEATURE_LEVEL_BIAS), tile, r);
        [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
          [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
            uint i = r % LANE_ROWS * LANE_COLUMNS + c;
            s[t][g][i] = coarse_column_score(s[t][g][i], position, row % TILE_HEADS, columns[g], c,
                                             bias)
                             .log2_value;
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
            s[t][g][i] = lane_score(s[t][g][i], position, row % TILE_HEADS, key).log2_value;
          }
        }
      }
    }

    float top[ROWS];
    bool grown = false;
    [[unroll]] for (uint r = 0; r < ROWS; ++r) {
      uint t = r / LANE_ROWS, first = r % LANE_ROWS * LANE_COLUMNS;
      top[r] = s[t][0][first];
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) top[r] = max(top[r], s[t][g][first + c]);
      }
      grown = grown || top[r] * to_log2 > reference[r] + SLACK;
    }
    if (subgroupAny(grown)) rescale(top, walk.coarse);

    [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
      Left p[ROW_TILES];
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
          uint r = t * LANE_ROWS + i / LANE_COLUMNS;
          vec2 weight = exp2(vec2(fma(s[t][g][i], to_log2, -reference[r]),
                                  fma(s[t][g][i + 1], to_log2, -reference[r])));
          sum[r] += weight.x;
          sum[r] += weight.y;
          if (walk.coarse) {
            level_sum[r] += at_level(columns[g].super_mean[i % LANE_COLUMNS], weight.x) +
                            at_level(columns[g].super_mean[i % LANE_COLUMNS + 1], weight.y);
          }
          ElementPair pair = ElementPair(weight);
          p[t][i] = pair.x;
          p[t][i + 1] = pair.y;
        }
      }
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        Right v;
        coopMatLoad(v, staged, values_start + (part + g) * 16 * PITCH + 2 * d, PITCH, ROW_MAJOR);
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) o[t][d] = coopMatMulAdd(p[t], v, o[t][d]);
      }
    }
    limit_overlap();
  }
  end_step(block);
}

void main() {
  if (!locate_uniform_tile(tile)) return;
  set_scores(tile.first_head);
  to_log2 = score_factor();
  View q_view = view_of(OPERAND_Q, tile.first_head, 1);
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    exchange_in(q_view, tile, t, negate_products());
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(q[t][d], staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
      o[t][d] = Accumulator(0.0);
    }
    barrier();
  }
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    reference[r] = LOWEST;
    sum[r] = 0.0;
  }

  Walk walk = start_walk(tile);
  uint block = 0;
  for (; block < walk.full_blocks; ++block) attend_block(walk, block, false);
  for (; block < walk.blocks; ++block) attend_block(walk, block, true);
  if (has(FEATURE_PLAN)) {
    [[unroll]] for (uint r = 0; r < ROWS; ++r) level_sum[r] = vec2(0);
    Walk coarse = start_coarse_walk(tile);
    for (block = 0; block < coarse.blocks; ++block) attend_block(coarse, block, true);
  }

  View out_view = view_of(OPERAND_OUT, tile.first_head, 1);
  View lse_view = view_of(OPERAND_LSE, tile.first_head, 2);
  float gain = truncation_gain();
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint h = 0; h < LANE_ROWS; ++h) {
      uint r = t * LANE_ROWS + h;
      uint row = subgroup_row(t) + lane_row(h);
      uint position = tile.first_position + row / TILE_HEADS;
      float total = quad_sum(sum[r]);
      if (position < PARAMS.queries && gl_SubgroupInvocationID % 4 == 0) {
        uint at = row_start(lse_view, position, row % TILE_HEADS);
        float lse = total == 0.0 ? EMPTY_LOGSUMEXP : (reference[r] + log2(total)) * LN_2;
        Words(lse_view.base).word[at] = floatBitsToUint(lse);
      }
      if (has(FEATURE_PLAN)) {
        vec2 shares = total == 0.0 ? vec2(0) : level_sum[r] / total;
        store_levels_pair(OPERAND_SHARES, tile, r, shares);
      }
      float share = total == 0.0 ? 0.0 : gain / total;
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        [[unroll]] for (uint i = h * LANE_COLUMNS; i < (h + 1) * LANE_COLUMNS; ++i) {
          o[t][d][i] = rounded(o[t][d][i] * share);
        }
      }
    }
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatStore(Rounded(o[t][d]), staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
    }
    barrier();
    exchange_out(out_view, tile, t);
    barrier();
  }
}
