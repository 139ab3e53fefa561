#version 460
// Gradients of a tile of keys and values, or of coarse rows, on cooperative matrices. The queries that the transposed
// work list names pass through shared memory. Scores are computed transposed, S^T = K Q^T, so that
// P^T and dS^T are left factors of dv = P^T dout and dk = scale dS^T q.
#include "common/coopmat_key_tile.glsl"
#include "common/coopmat_rounding.glsl"
#include "common/coopmat_scores.glsl"
#include "common/score_gradients.glsl"

// Factors of the next products, loaded before the barrier in front of these: 2 to 5% faster.
const uint AHEAD = HEAD_DIM <= 64 ? 1 : 2;

const bool STORES_GRADIENTS = (FEATURES & FEATURE_SCORE_GRADIENTS) != 0;

KeyTile tile;
float to_log2;

// Where dS of the key/value head is stored; of that the tiles of queries of a chunk, and the first
// vector of this lane in a tile.
uvec2 gradients;
uint query_tiles, query_tile_vectors, lane_vector;
uint stored_granules[2][BLOCK_GRANULES];  // of queries: of the block at work, and of the next
Left k[ROW_TILES][DIM_TILES], v[ROW_TILES][DIM_TILES];
Accumulator dk[ROW_TILES][DIM_TILES], dv[ROW_TILES][DIM_TILES];

// What the query tile of a plan at work sees of the subgroup's rows.
bool seen_granule[ROW_TILES];                // of keys: whether it is exact
float seen_offset[ROW_TILES * LANE_ROWS];    // of coarse rows: log2 of their keys; -INFINITY: hidden
uint listed_position;                        // first of the block

void see_rows(Walk walk, ListedBlock block) {
  listed_position = block.first_position;
  uint entry = min(block.entry, walk.tile_count - 1);
  View levels = levels_of(tile.plan.first_chunk + entry / PARAMS.plan_tiles,
                          entry % PARAMS.plan_tiles);
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    uint first = tile.first_key + subgroup_row(t);
    if (COARSE_TILE) {
      [[unroll]] for (uint h = 0; h < LANE_ROWS; ++h) {
        uint row = first + lane_row(h);
        uint keys = row < PARAMS.coarse_rows ? coarse_row_keys(levels, row) : 0;
        seen_offset[t * LANE_ROWS + h] = keys == 0 ? -INFINITY : log2(float(keys));
      }
    } else {
      seen_granule[t] =
          first < PARAMS.keys && granule_level(levels, first / GRANULE_ROWS) == LEVEL_EXACT;
    }
  }
}

// Whether all queries of the block see all keys of the subgroup.
bool sees_all() {
  if (COARSE_TILE || TRANSFORMED || has(FEATURE_SEGMENTS | FEATURE_MASK)) return false;
  uint first = tile.first_key + subgroup_row(0);
  uvec2 positions = uvec2(listed_position, listed_position + BLOCK_ROWS / TILE_HEADS);
  bool every = classify_positions(positions, uvec2(first, first + ROW_TILES * 16)) == TILE_FULL;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) every = every && seen_granule[t];
  return every;
}

bool sees_any() {
  bool any = false;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    if (COARSE_TILE) {
      [[unroll]] for (uint h = 0; h < LANE_ROWS; ++h) {
        any = any || seen_offset[t * LANE_ROWS + h] != -INFINITY;
      }
    } else {
      any = any || seen_granule[t];
    }
  }
  return any;
}

// Of row h of those that a lane holds of 16-row tile t.
LaneScore row_score(float product, uint position, uint head, uint key, uint t, uint h) {
  if (COARSE_TILE) {
    float offset = seen_offset[t * LANE_ROWS + h];
    if (offset == -INFINITY) return LaneScore(-INFINITY, 1.0);
    return coarse_lane_score(product, position, head, key, offset);
  }
  if (has(FEATURE_PLAN) && !seen_granule[t]) return LaneScore(-INFINITY, 1.0);
  return lane_score(product, position, head, key);
}

// Two neighbouring states of the block: (what weights are relative to, delta) of each query.
mat2 state_pair(uint at, uint key) {
  if (COARSE_TILE) at += level_index(key) * LEVEL_STATES;
  return mat2(staged_state[at], staged_state[at + 1]);
}

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

// At the begin of a step, when `next_granules` are those of the one after it.
void name_stored_granules() {
  [[unroll]] for (uint g = 0; g < BLOCK_GRANULES; ++g) {
    stored_granules[0][g] = stored_granules[1][g];
    stored_granules[1][g] = next_granules[g * GRANULE_ROWS / FETCH_ROWS];
  }
}

// Nothing here comes from global memory: a wait for it would cost a third of the speed. Names passed
// on through shared memory cost 2%.
void store_gradients(Step current, uint granule, uvec4 packed[ROW_TILES]) {
  if (granule == NO_GRANULE) return;
  uint query_granule = granule / GRANULE_POSITIONS;
  uint query_tile = current.first_head / TILE_HEADS * query_tiles +
                    query_granule / GRADIENT_TILE_GRANULES;
  uint at = query_tile * query_tile_vectors +
            query_granule % GRADIENT_TILE_GRANULES * MATRIX_VECTORS + lane_vector;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    Quads(gradients).quad[at + granule_vectors(t)] = packed[t];
  }
}

// `mixed` is known at compile time: full blocks need no branch.
void attend_step(Walk walk, uint step, Step current, bool mixed) {
  begin_step(walk);
  if (STORES_GRADIENTS) name_stored_granules();
  uint q_start = stage_start(step), dout_start = q_start + OPERAND_VECTORS;
  uint state_start = (step & 1) * BLOCK_ROWS;
  [[unroll]] for (uint g = 0; g < BLOCK_GRANULES; ++g) {
    if (g > 0 && g == BLOCK_GRANULES / 2) continue_step(walk, step);
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
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) to_known(s[t]);
    Right dout_ahead[AHEAD], dout_columns_ahead[AHEAD], q_ahead[AHEAD];
    [[unroll]] for (uint d = 0; d < AHEAD; ++d) load_rows(dout_ahead[d], dout_start, g, d);
    if (mixed) {
      uint granule;
      if (has(FEATURE_PLAN)) {
        granule = listed_position + g * GRANULE_POSITIONS;
      } else {
        granule = walk.entries.entry[walk.first_entry + current.block * BLOCK_GRANULES + g];
      }
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
          uint row = element_column(i), head = current.first_head + row % TILE_HEADS;
          uint position = granule == NO_GRANULE ? ABSENT : granule + row / TILE_HEADS;
          uint key = tile.first_key + subgroup_row(t) + element_row(i);
          LaneScore score = row_score(s[t][i], position, head, key, t, i / LANE_COLUMNS);
          s[t][i] = score.log2_value;
          if (TRANSFORMED) slope[t][i] = score.slope;
        }
      }
    }
    Left p[ROW_TILES];
    [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
      uint at = state_start + g * 16 + lane_column(i % LANE_COLUMNS);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        mat2 states = state_pair(at, tile.first_key + subgroup_row(t) + element_row(i));
        vec2 references = vec2(states[0].x, states[1].x);
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
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) to_own(p[t]);
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
    // In a block of one granule the second half begins here.
    if (BLOCK_GRANULES == 1) continue_step(walk, step);
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
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) to_known(dp[t]);
    [[unroll]] for (uint d = 0; d < AHEAD; ++d) load_rows(q_ahead[d], q_start, g, d);
    Left ds[ROW_TILES];
    uvec4 packed[ROW_TILES];
    [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
      uint at = state_start + g * 16 + lane_column(i % LANE_COLUMNS);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        mat2 states = state_pair(at, tile.first_key + subgroup_row(t) + element_row(i));
        vec2 delta = vec2(states[0].y, states[1].y);
        vec2 gradient = score_gradients(vec2(s[t][i], s[t][i + 1]), vec2(dp[t][i], dp[t][i + 1]),
                                        delta, mixed);
        if (TRANSFORMED) gradient *= vec2(slope[t][i], slope[t][i + 1]);
        ElementPair pair = ElementPair(gradient);
        ds[t][i] = pair.x;
        ds[t][i + 1] = pair.y;
        if (STORES_GRADIENTS) packed[t][i / 2] = packed_gradients(gradient);
      }
    }
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) to_own(ds[t]);
    if (STORES_GRADIENTS) store_gradients(current, stored_granules[0][g], packed);
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
}

// A block that the subgroup has no part in.
void skip_step(Walk walk, uint step) {
  begin_step(walk);
  continue_step(walk, step);
}

void attend_listed_tiles(Walk walk) {
  for (uint block = 0; block < walk.blocks; ++block) {
    ListedBlock listed = listed_block(walk, block);
    see_rows(walk, listed);
    Step current = Step(block, listed.first_head);
    if (listed.entry >= walk.tile_count || !subgroupAny(sees_any())) {
      skip_step(walk, block);
    } else if (subgroupAll(sees_all())) {
      attend_step(walk, block, current, false);
    } else {
      attend_step(walk, block, current, true);
    }
    end_step(block);
  }
}

void attend_listed_granules(Walk walk) {
  uint step = 0;
  for (uint head = 0; head < walk.heads; head += TILE_HEADS) {
    uint block = 0;
    for (; block < walk.full_blocks; ++block) {
      attend_step(walk, step, Step(block, head), false);
      end_step(step++);
    }
    for (; block < walk.blocks; ++block) {
      attend_step(walk, step, Step(block, head), true);
      end_step(step++);
    }
  }
}

void main() {
  if (subgroupAny(!locate_key_tile(tile))) return;
  set_scores(tile.kv_head * (PARAMS.query_heads / PARAMS.kv_heads));
  to_log2 = score_factor();
  if (STORES_GRADIENTS) {
    gradients = gradients_of(tile.kv_head);
    query_tiles = gradient_tiles(PARAMS.queries * TILE_HEADS);
    query_tile_vectors = gradient_tile_vectors();
    lane_vector = granule_vectors((tile.first_key + subgroup_row(0)) / GRANULE_ROWS) +
                  gl_SubgroupInvocationID;
  }
  View k_view = view_of(COARSE_TILE ? OPERAND_COARSE_K : OPERAND_K, tile.kv_head, 1);
  View v_view = view_of(COARSE_TILE ? OPERAND_COARSE_V : OPERAND_V, tile.kv_head, 1);
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
  if (STORES_GRADIENTS && walk.blocks > 0) {
    [[unroll]] for (uint g = 0; g < BLOCK_GRANULES; ++g) {
      stored_granules[1][g] = walk.entries.entry[walk.first_entry + g];
    }
  }
  if (has(FEATURE_PLAN)) {
    attend_listed_tiles(walk);
  } else {
    attend_listed_granules(walk);
  }

  float gain = truncation_gain(), dk_factor = slope_factor() * gain;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    if (has(FEATURE_DK)) {
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        to_known(dk[t][d]);
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
          dk[t][d][i] = rounded(dk[t][d][i] * dk_factor);
        }
        store_matrix(dk[t][d], exchange_start() + 2 * d);
      }
      barrier();
      View view = view_of(COARSE_TILE ? OPERAND_DCOARSE_K : OPERAND_DK, tile.kv_head, 1);
      exchange_out(part_view(view, tile.first_key, tile.part), tile, t);
      barrier();
    }
    if (has(FEATURE_DV)) {
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        to_known(dv[t][d]);
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
          dv[t][d][i] = rounded(dv[t][d][i] * gain);
        }
        store_matrix(dv[t][d], exchange_start() + 2 * d);
      }
      barrier();
      View view = view_of(COARSE_TILE ? OPERAND_DCOARSE_V : OPERAND_DV, tile.kv_head, 1);
      exchange_out(part_view(view, tile.first_key, tile.part), tile, t);
      barrier();
    }
  }
}
