#version 460
// Gradients of a tile of keys and values, on cooperative matrices. The queries that the transposed
// work list names pass through shared memory. Scores are computed transposed, S^T = K Q^T, so that
// P^T and dS^T are left factors of dv = P^T dout and dk = scale dS^T q.
#include "common/coopmat_key_tile.glsl"
#include "common/coopmat_rounding.glsl"
#include "common/coopmat_scores.glsl"

// Factors of the next products, loaded before the barrier in front of these: 2 to 5% faster.
const uint AHEAD = HEAD_DIM <= 64 ? 1 : 2;

KeyTile tile;
float to_log2;
Left k[ROW_TILES][DIM_TILES], v[ROW_TILES][DIM_TILES];
Accumulator dk[ROW_TILES][DIM_TILES], dv[ROW_TILES][DIM_TILES];

Right next_q_ahead[AHEAD];

void load_rows(out Right x, uint start, uint g, uint d) {
  coopMatLoad(x, staged, start + g * 16 * PITCH + 2 * d, PITCH, ROW_MAJOR);
}

void load_columns(out Right x, uint start, uint g, uint d) {
  coopMatLoad(x, staged, start + g * 16 * PITCH + 2 * d, PITCH, COLUMN_MAJOR);
}

void load_next_queries(uint q_start, uint g) {
  if (g + 1 == BLOCK_GRANULES) return;
  [[unroll]] for (uint d = 0; d < AHEAD; ++d) load_columns(next_q_ahead[d], q_start, g + 1, d);
}

// `mixed` is known at compile time: full blocks need no branch.
void attend_step(Walk walk, uint step, Step current, bool mixed) {
  begin_step(walk);
  uint q_start = stage_start(step), dout_start = q_start + OPERAND_VECTORS;
  uint state_start = (step & 1) * BLOCK_ROWS;
  [[unroll]] for (uint g = 0; g < BLOCK_GRANULES; ++g) {
    if (g == BLOCK_GRANULES / 2) continue_step(walk, step);
    // P and dv first, then dS and dk: fewer registers are alive than with both at once.
    Accumulator s[ROW_TILES], slope[ROW_TILES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) s[t] = Accumulator(0.0);
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      Right q;
      if (g > 0 && d < AHEAD) {
        q = next_q_ahead[d];
      } else {
        load_columns(q, q_start, g, d);
      }
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) s[t] = coopMatMulAdd(k[t][d], q, s[t]);
    }
    Right dout_ahead[AHEAD], dout_columns_ahead[AHEAD], q_ahead[AHEAD];
    [[unroll]] for (uint d = 0; d < AHEAD; ++d) load_rows(dout_ahead[d], dout_start, g, d);
    if (mixed) {
      uint granule = walk.entries.entry[walk.first_entry + current.block * BLOCK_GRANULES + g];
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
          uint row = element_column(i), head = current.first_head + row % TILE_HEADS;
          uint position = granule == NO_GRANULE ? ABSENT : granule + row / TILE_HEADS;
          uint key = tile.first_key + subgroup_row(t) + element_row(i);
          LaneScore score = lane_score(s[t][i], position, head, key);
          s[t][i] = score.log2_value;
          if (TRANSFORMED) slope[t][i] = score.slope;
        }
      }
    }
    Left p[ROW_TILES];
    [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
      uint at = state_start + g * 16 + lane_column(i % LANE_COLUMNS);
      vec2 references = vec2(staged_state[at].x, staged_state[at + 1].x);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        vec2 weight = exp2(vec2(fma(s[t][i], to_log2, -references.x),
                                fma(s[t][i + 1], to_log2, -references.y)));
        s[t][i] = weight.x;
        s[t][i + 1] = weight.y;
        ElementPair pair = ElementPair(weight);
        p[t][i] = pair.x;
        p[t][i + 1] = pair.y;
      }
    }
    if (has(FEATURE_DV)) {
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        Right dout;
        if (d < AHEAD) {
          dout = dout_ahead[d];
        } else {
          load_rows(dout, dout_start, g, d);
        }
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
          dv[t][d] = coopMatMulAdd(p[t], dout, dv[t][d]);
        }
      }
    }
    [[unroll]] for (uint d = 0; d < AHEAD; ++d) {
      load_columns(dout_columns_ahead[d], dout_start, g, d);
    }
    limit_overlap();
    if (!has(FEATURE_DK)) {
      load_next_queries(q_start, g);
      continue;
    }

    Accumulator dp[ROW_TILES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) dp[t] = Accumulator(0.0);
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      Right dout;
      if (d < AHEAD) {
        dout = dout_columns_ahead[d];
      } else {
        load_columns(dout, dout_start, g, d);
      }
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) dp[t] = coopMatMulAdd(v[t][d], dout, dp[t]);
    }
    [[unroll]] for (uint d = 0; d < AHEAD; ++d) load_rows(q_ahead[d], q_start, g, d);
    Left ds[ROW_TILES];
    [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
      uint at = state_start + g * 16 + lane_column(i % LANE_COLUMNS);
      vec2 delta = vec2(staged_state[at].y, staged_state[at + 1].y);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        vec2 gradient = score_gradients(vec2(s[t][i], s[t][i + 1]), vec2(dp[t][i], dp[t][i + 1]),
                                        delta, mixed);
        if (TRANSFORMED) gradient *= vec2(slope[t][i], slope[t][i + 1]);
        ElementPair pair = ElementPair(gradient);
        ds[t][i] = pair.x;
        ds[t][i + 1] = pair.y;
      }
    }
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      Right q;
      if (d < AHEAD) {
        q = q_ahead[d];
      } else {
        load_rows(q, q_start, g, d);
      }
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) dk[t][d] = coopMatMulAdd(ds[t], q, dk[t][d]);
    }
    load_next_queries(q_start, g);
    limit_overlap();
  }
  end_step(step);
}

void main() {
  if (subgroupAny(!locate_key_tile(tile))) return;
  set_scores(tile.kv_head * (PARAMS.query_heads / PARAMS.kv_heads));
  to_log2 = score_factor();
  View k_view = view_of(OPERAND_K, tile.kv_head, 1);
  View v_view = view_of(OPERAND_V, tile.kv_head, 1);
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    exchange_in(k_view, tile, t, negate_products());
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(k[t][d], staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
      dk[t][d] = Accumulator(0.0);
    }
    barrier();
    exchange_in(v_view, tile, t, false);
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(v[t][d], staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
      dv[t][d] = Accumulator(0.0);
    }
    barrier();
  }

  Walk walk = start_walk(tile);
  uint step = 0;
  for (uint head = 0; head < walk.heads; head += TILE_HEADS) {
    uint block = 0;
    for (; block < walk.full_blocks; ++block) attend_step(walk, step++, Step(block, head), false);
    for (; block < walk.blocks; ++block) attend_step(walk, step++, Step(block, head), true);
  }

  float gain = truncation_gain(), dk_factor = slope_factor() * gain;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    if (has(FEATURE_DK)) {
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
          dk[t][d][i] = rounded(dk[t][d][i] * dk_factor);
        }
        coopMatStore(Rounded(dk[t][d]), staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
      }
      barrier();
      exchange_out(view_of(OPERAND_DK, tile.kv_head, 1), tile, t);
      barrier();
    }
    if (has(FEATURE_DV)) {
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
          dv[t][d][i] = rounded(dv[t][d][i] * gain);
        }
        coopMatStore(Rounded(dv[t][d]), staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
      }
      barrier();
      exchange_out(view_of(OPERAND_DV, tile.kv_head, 1), tile, t);
      barrier();
    }
  }
}
