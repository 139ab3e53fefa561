#version 460
// Forward-mode derivative of attention (attend_tangent.comp), for a tile of queries, on cooperative
// matrices. A subgroup keeps its rows of q, dq and of the sums in registers; keys, values and their
// tangents pass through shared memory: first keys with theirs, then values with theirs.
#define STAGED_OPERANDS 4
#define STAGES 2
#include "common/coopmat_coarse.glsl"

// Places in a stage; the tangents of each come after them.
const uint KEYS = 0, VALUES = 2;

QueryTile tile;
float to_log2, change_factor;
Left q[ROW_TILES][DIM_TILES], dq[ROW_TILES][DIM_TILES];
Accumulator sums[ROW_TILES][DIM_TILES];
float reference[ROWS];
float tangent[ROWS];       // sum of P dS in the lane's columns
vec2 level_tangent[ROWS];  // of coarse rows alone
View bias_tangent_view;

// What the walk's rows bring along; what is not given counts as zero.
struct Tangents {
  Source keys;
  Source values;
  bool has_keys;  // known at compile time, both
  bool has_values;
};

// Keys, or values, of the block that is named, and their tangents.
void fetch_pair(Walk walk, Tangents tangents, uint place) {
  fetch_rows(walk, 0, place == KEYS ? walk.keys : walk.values);
  if (place == KEYS && tangents.has_keys) fetch_rows(walk, 1, tangents.keys);
  if (place == VALUES && tangents.has_values) fetch_rows(walk, 1, tangents.values);
}

void stage_pair(uint stage, Tangents tangents, uint place) {
  stage_held(stage, 0, place);
  if (place == KEYS ? tangents.has_keys : tangents.has_values) stage_held(stage, 1, place + 1);
}

void stage_first_pairs(Walk walk, Tangents tangents) {
  if (walk.blocks > 0) {
    name_block(walk, 0);
    fetch_pair(walk, tangents, KEYS);
    stage_pair(0, tangents, KEYS);
    fetch_pair(walk, tangents, VALUES);
    stage_pair(0, tangents, VALUES);
    name_block(walk, 1);
  }
  barrier();
}

void continue_pairs(Walk walk, Tangents tangents, uint block) {
  stage_pair(block + 1, tangents, KEYS);
  fetch_pair(walk, tangents, VALUES);
  name_block(walk, block + 2);
}

// The tangent of what is added to the product of a row and a key.
float bias_tangent(uint position, uint head, uint key) {
  if (!has(FEATURE_DBIAS) || position >= PARAMS.queries || key >= PARAMS.keys) return 0.0;
  uint start = row_start(bias_tangent_view, position, head);
  return load_element(bias_tangent_view.base, start + key * bias_tangent_view.column_stride,
                      BIAS_DTYPE);
}

// From products and their tangents to scores, as powers of two, and theirs. `mixed` is known at
// compile time.
void score_block(inout Accumulator s[ROW_TILES], inout Accumulator change[ROW_TILES], Walk walk,
                 uint block, uint g, CoarseColumns columns, bool mixed) {
  uint granule = 0;
  if (mixed && !walk.coarse) {
    granule = walk.entries.entry[walk.first_entry + block * BLOCK_GRANULES + g];
  }
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    uint t = r / LANE_ROWS, row = held_row(r), head = row % TILE_HEADS;
    uint position = tile.first_position + row / TILE_HEADS;
    vec2 bias = vec2(0), bias_change = vec2(0);
    if (walk.coarse) {
      bias = load_levels_pair(OPERAND_LEVEL_BIAS, has(FEATURE_LEVEL_BIAS), tile, r);
      bias_change = load_levels_pair(OPERAND_DLEVEL_BIAS, has(FEATURE_DLEVEL_BIAS), tile, r);
    }
    [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
      uint i = r % LANE_ROWS * LANE_COLUMNS + c;
      float factor = change_factor, added = 0.0;
      if (walk.coarse) {
        LaneScore score = coarse_column_score(s[t][i], position, head, columns, c, bias);
        s[t][i] = score.log2_value;
        factor *= score.slope;
        added = columns.super_mean[c] ? bias_change.y : bias_change.x;
        if (columns.row[c] != ABSENT) {
          added += bias_tangent(position, head, first_key_of(columns.row[c]));
        }
      } else if (mixed) {
        uint key = granule == NO_GRANULE ? ABSENT : granule + lane_column(c);
        LaneScore score = lane_score(s[t][i], position, head, key);
        s[t][i] = score.log2_value;
        factor *= score.slope;
        added = bias_tangent(position, head, key);
      }
      change[t][i] = fma(change[t][i], factor, added);
    }
  }
}

void attend_block(Walk walk, Tangents tangents, uint block, bool mixed) {
  fetch_pair(walk, tangents, KEYS);
  uint keys = stage_start(block), key_tangents = keys + OPERAND_VECTORS;
  uint values = keys + VALUES * OPERAND_VECTORS, value_tangents = values + OPERAND_VECTORS;
  bool moves_scores = tangents.has_keys || has(FEATURE_DQ | FEATURE_DBIAS) ||
                      (walk.coarse && has(FEATURE_DLEVEL_BIAS));
  [[unroll]] for (uint g = 0; g < BLOCK_GRANULES; ++g) {
    if (g > 0 && g == BLOCK_GRANULES / 2) continue_pairs(walk, tangents, block);
    Accumulator s[ROW_TILES], change[ROW_TILES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) s[t] = change[t] = Accumulator(0.0);
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      uint at = g * 16 * PITCH + 2 * d;
      Right k;
      coopMatLoad(k, staged, keys + at, PITCH, COLUMN_MAJOR);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        s[t] = coopMatMulAdd(q[t][d], k, s[t]);
        if (has(FEATURE_DQ)) change[t] = coopMatMulAdd(dq[t][d], k, change[t]);
      }
      if (!tangents.has_keys) continue;
      coopMatLoad(k, staged, key_tangents + at, PITCH, COLUMN_MAJOR);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        change[t] = coopMatMulAdd(q[t][d], k, change[t]);
      }
    }
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
      to_known(s[t]);
      to_known(change[t]);
    }
    // In a block of one granule the second half begins here.
    if (BLOCK_GRANULES == 1) continue_pairs(walk, tangents, block);
    CoarseColumns columns;
    if (walk.coarse) columns = load_coarse_columns(walk, tile, block, g);
    score_block(s, change, walk, block, g, columns, mixed);
    limit_overlap();

    Left p[ROW_TILES], weighted[ROW_TILES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
      [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
        uint r = t * LANE_ROWS + i / LANE_COLUMNS;
        vec2 weight = exp2(vec2(fma(s[t][i], to_log2, -reference[r]),
                                fma(s[t][i + 1], to_log2, -reference[r])));
        vec2 moved =
            score_gradients(weight, vec2(change[t][i], change[t][i + 1]), vec2(0), mixed);
        tangent[r] += moved.x;
        tangent[r] += moved.y;
        if (walk.coarse) {
          level_tangent[r] += at_level(columns.super_mean[i % LANE_COLUMNS], moved.x) +
                              at_level(columns.super_mean[i % LANE_COLUMNS + 1], moved.y);
        }
        ElementPair pair = ElementPair(weight), moved_pair = ElementPair(moved);
        p[t][i] = pair.x;
        p[t][i + 1] = pair.y;
        weighted[t][i] = moved_pair.x;
        weighted[t][i + 1] = moved_pair.y;
      }
      to_own(p[t]);
      to_own(weighted[t]);
    }
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      uint at = g * 16 * PITCH + 2 * d;
      Right v;
      if (moves_scores) {
        coopMatLoad(v, staged, values + at, PITCH, ROW_MAJOR);
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
          sums[t][d] = coopMatMulAdd(weighted[t], v, sums[t][d]);
        }
      }
      if (!tangents.has_values) continue;
      coopMatLoad(v, staged, value_tangents + at, PITCH, ROW_MAJOR);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        sums[t][d] = coopMatMulAdd(p[t], v, sums[t][d]);
      }
    }
    limit_overlap();
  }
  stage_pair(block + 1, tangents, VALUES);
  barrier();
}

// sums = sums * gain - m out, for the subgroup's rows.
void subtract_mean(View out_view, float gain) {
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    exchange_in(out_view, tile, t, false);
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      to_known(sums[t][d]);
      [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
        uint r = t * LANE_ROWS + i / LANE_COLUMNS, column = element_column(i);
        uint at = exchange_start() + element_row(i) * PITCH + 2 * d + column / 8;
        uint pair = staged[at][column % 8 / 2];
        float result = from_16_bits(bitfieldExtract(pair, int(16 * (column % 2)), 16), DTYPE);
        sums[t][d][i] = fma(-tangent[r], result, sums[t][d][i] * gain);
      }
      to_own(sums[t][d]);
    }
    barrier();
  }
}

void main() {
  if (!locate_uniform_tile(workgroup_index(), tile)) return;
  set_scores(tile.first_head);
  to_log2 = score_factor();
  // A negative scale negates both factors of products.
  change_factor = abs(slope_factor());
  View q_view = view_of(OPERAND_Q, tile.first_head, 1);
  View dq_view = view_of(OPERAND_DQ, tile.first_head, 1);
  if (has(FEATURE_DBIAS)) {
    bias_tangent_view = view_of(OPERAND_DBIAS, tile.first_head, BIAS_LOG2_BYTES);
  }
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    exchange_in(q_view, tile, t, negate_products());
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(q[t][d], staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
      sums[t][d] = Accumulator(0.0);
    }
    barrier();
    if (!has(FEATURE_DQ)) continue;
    exchange_in(dq_view, tile, t, negate_products());
    barrier();
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(dq[t][d], staged, exchange_start() + 2 * d, PITCH, ROW_MAJOR);
    }
    barrier();
  }
  View lse_view = view_of(OPERAND_LSE, tile.first_head, 2);
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    uint row = held_row(r), head = row % TILE_HEADS;
    uint position = min(tile.first_position + row / TILE_HEADS, PARAMS.queries - 1);
    reference[r] = weight_reference(load_float(lse_view.base, row_start(lse_view, position, head)));
    tangent[r] = 0.0;
    level_tangent[r] = vec2(0);
  }

  Walk walk = listed_walk(tile);
  Tangents tangents = Tangents(source_of(view_of(OPERAND_DK, tile.kv_head, 1)),
                               source_of(view_of(OPERAND_DV, tile.kv_head, 1)),
                               has(FEATURE_DK), has(FEATURE_DV));
  stage_first_pairs(walk, tangents);
  uint block = 0;
  for (; block < walk.full_blocks; ++block) attend_block(walk, tangents, block, false);
  for (; block < walk.blocks; ++block) attend_block(walk, tangents, block, true);
  if (has(FEATURE_PLAN)) {
    Walk coarse = coarse_walk(tile);
    Tangents means = Tangents(source_of(view_of(OPERAND_DCOARSE_K, tile.kv_head, 1)),
                              source_of(view_of(OPERAND_DCOARSE_V, tile.kv_head, 1)),
                              has(FEATURE_DCOARSE_K), has(FEATURE_DCOARSE_V));
    stage_first_pairs(coarse, means);
    for (block = 0; block < coarse.blocks; ++block) attend_block(coarse, means, block, true);
  }

  View dlse_view = view_of(OPERAND_DLSE, tile.first_head, 2);
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
    tangent[r] = quad_sum(tangent[r]);
    if (position < PARAMS.queries && gl_SubgroupInvocationID % 4 == 0) {
      uint at = row_start(dlse_view, position, row % TILE_HEADS);
      Words(dlse_view.base).word[at] = floatBitsToUint(tangent[r]);
    }
    if (has(FEATURE_PLAN)) {
      vec2 shares = load_levels_pair(OPERAND_SHARES, true, tile, r);
      // Of the lanes of a row, which are summed, one subtracts.
      vec2 mean = gl_SubgroupInvocationID % 4 == 0 ? tangent[r] * shares : vec2(0);
      store_levels_pair(OPERAND_DSHARES, tile, r, level_tangent[r] - mean);
    }
  }
  subtract_mean(view_of(OPERAND_OUT, tile.first_head, 1), truncation_gain());
  store_sums(view_of(OPERAND_DOUT, tile.first_head, 1), tile, sums, 1.0);
}
