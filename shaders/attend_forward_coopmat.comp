#version 460
// Attention of a tile of queries to the keys, and the coarse rows of a plan, on its work list, on
// cooperative matrices: out, logsumexp and the shares of coarse rows. A subgroup keeps its rows of
// Q and O in registers; keys and values pass through shared memory. The softmax is kept in powers
// of two.
//
// Weights are relative to a reference. The fast pass guesses it from the first keys and keeps it:
// the range of float32, and of bfloat16, holds weights 2^60 above and below. It checks that at the
// end, and marks a tile whose sums have left the range; the careful pass (FEATURE_CAREFUL), which
// follows it, computes marked tiles anew with references that follow the maxima. Following them
// always cost a sixth of the speed. The careful pass has few workgroups that look for marks, as one
// for each tile, with nothing to do, would take 15 us to come and go.
//
// Where workgroups share the list of a tile, what is said of a tile holds for each of its parts.
#include "common/coopmat_correction.glsl"
#include "common/query_parts.glsl"

const bool CAREFUL = (FEATURES & FEATURE_CAREFUL) != 0;

// Granules scored at once, in registers.
const uint PART_GRANULES = HEAD_DIM <= 64 ? 2 : 1;
// Factors loaded before the barrier in front of their products, so that these do not wait for them:
// 6% faster with both; with more of them registers run out.
const uint KEYS_AHEAD = 2;
const uint VALUES_AHEAD = DIM_TILES < 4 ? DIM_TILES : (HEAD_DIM <= 64 ? 4 : 3);

const float LOWEST = -1e38;  // finite: exp2(-INFINITY - LOWEST) is 0
// The reference of the careful pass follows the maximum of a row only when that has grown by more
// than this, so that O is rarely rescaled; weights stay within float16.
const float SLACK = 8.0;

// In bfloat16 the rows of a subgroup share their reference in one uniform register; the range of
// float16 is too narrow for that.
const bool SHARES_REFERENCE = DTYPE == DTYPE_BF16 && !CAREFUL;
// What the sum of a row may be. Weights of less than 2^-14 lose digits in float16.
const float MIN_SUM = DTYPE == DTYPE_BF16 ? 1e-18 : 0.015625;
const float MAX_SUM = DTYPE == DTYPE_BF16 ? 1e18 : 16384.0;
// Logsumexp of the first row of a tile that the fast pass leaves to the careful one, or the maximum
// in the record of that row: a NaN that no arithmetic makes. (If some did, the tile would be computed
// twice.)
#define MARK 0x7fc0a11eu

QueryTile tile;
uint part_at_work;  // of its list
float to_log2;
Left q[ROW_TILES][DIM_TILES];
Accumulator o[ROW_TILES][DIM_TILES];
float reference[ROWS], sum[ROWS];
vec2 level_sum[ROWS];  // of coarse rows
uvec2 row_counts;  // exact and coarse rows multiplied with, in the lane's columns
float shared_reference;
Right keys_ahead[KEYS_AHEAD];
shared uint failed;

float reference_of(uint r) { return SHARES_REFERENCE ? shared_reference : reference[r]; }

// Lets the references follow the maxima of the scores.
void follow_maxima(Accumulator s[ROW_TILES][PART_GRANULES], bool coarse) {
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
  if (!subgroupAny(grown)) return;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) to_known(o[t][d]);
  }
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
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) to_own(o[t][d]);
  }
}

void load_keys(out Right k, uint keys_start, uint granule, uint d) {
  coopMatLoad(k, staged, keys_start + granule * 16 * PITCH + 2 * d, PITCH, COLUMN_MAJOR);
}

void load_values(out Right v, uint values_start, uint granule, uint d) {
  coopMatLoad(v, staged, values_start + granule * 16 * PITCH + 2 * d, PITCH, ROW_MAJOR);
}

// Q K^T for a part of a staged block.
void score(out Accumulator s[ROW_TILES][PART_GRANULES], uint keys_start, uint part) {
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) s[t][g] = Accumulator(0.0);
  }
  [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
    [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
      Right k;
      uint n = d * PART_GRANULES + g;
      if (part > 0 && n < KEYS_AHEAD) {
        k = keys_ahead[n];
      } else {
        load_keys(k, keys_start, part + g, d);
      }
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        s[t][g] = coopMatMulAdd(q[t][d], k, s[t][g]);
      }
    }
  }
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) to_known(s[t][g]);
  }
}

void count_rows(Walk walk, uint block, uint part, CoarseColumns columns[PART_GRANULES]) {
  uvec2 found = uvec2(0);
  [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
    uint granule = 0;
    if (!walk.coarse) {
      granule = walk.entries.entry[walk.first_entry + block * BLOCK_GRANULES + part + g];
    }
    [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
      if (walk.coarse) {
        found.y += columns[g].row[c] != ABSENT ? 1 : 0;
      } else if (granule != NO_GRANULE) {
        found.x += granule + lane_column(c) < PARAMS.keys ? 1 : 0;
      }
    }
  }
  row_counts += found;
}

// `mixed` is known at compile time: full blocks need no branch.
void attend_block(Walk walk, uint block, bool mixed) {
  begin_step(walk);
  uint keys_start = stage_start(block), values_start = keys_start + OPERAND_VECTORS;
  [[unroll]] for (uint part = 0; part < BLOCK_GRANULES; part += PART_GRANULES) {
    if (part > 0 && is_halfway(part, PART_GRANULES)) continue_step(walk, block);
    Accumulator s[ROW_TILES][PART_GRANULES];
    score(s, keys_start, part);
    // In a block of one part the second half begins here.
    if (part == 0 && is_halfway(part, PART_GRANULES)) continue_step(walk, block);
    Right values_ahead[VALUES_AHEAD];
    [[unroll]] for (uint d = 0; d < VALUES_AHEAD; ++d) {
      load_values(values_ahead[d], values_start, part, d);
    }
    limit_overlap();
    CoarseColumns columns[PART_GRANULES];
    if (walk.coarse) {
      [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
        columns[g] = load_coarse_columns(walk, tile, block, part + g);
      }
      [[unroll]] for (uint r = 0; r < ROWS; ++r) {
        uint t = r / LANE_ROWS;
        uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
        vec2 bias = CORRECTS ? level_biases[row]
                             : load_levels_pair(OPERAND_LEVEL_BIAS, has(FEATURE_LEVEL_BIAS), tile, r);
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
    if (has(FEATURE_ROW_COUNTS)) count_rows(walk, block, part, columns);
    if (CAREFUL) follow_maxima(s, walk.coarse);

    bool has_next_part = part + PART_GRANULES < BLOCK_GRANULES;
    [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
      Left p[ROW_TILES];
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
          uint r = t * LANE_ROWS + i / LANE_COLUMNS;
          vec2 weight = exp2(vec2(fma(s[t][g][i], to_log2, -reference_of(r)),
                                  fma(s[t][g][i + 1], to_log2, -reference_of(r))));
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
        to_own(p[t]);
      }
      [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
        Right v;
        if (g == 0 && d < VALUES_AHEAD) {
          v = values_ahead[d];
        } else {
          load_values(v, values_start, part + g, d);
        }
        if (has_next_part && g == PART_GRANULES - 1 && d == max(DIM_TILES, 2) - 2) {
          [[unroll]] for (uint n = 0; n < KEYS_AHEAD; ++n) {
            uint granule = part + PART_GRANULES + n % PART_GRANULES;
            load_keys(keys_ahead[n], keys_start, granule, n / PART_GRANULES);
          }
        }
        [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) o[t][d] = coopMatMulAdd(p[t], v, o[t][d]);
      }
    }
    limit_overlap();
  }
  end_step(block);
}

// The largest score of a row in the lane's columns; NaN counts for nothing.
float largest(Accumulator s[ROW_TILES][PART_GRANULES], uint r) {
  float top = LOWEST;
  [[unroll]] for (uint g = 0; g < PART_GRANULES; ++g) {
    [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
      float value = s[r / LANE_ROWS][g][r % LANE_ROWS * LANE_COLUMNS + c];
      top = value > top ? value : top;
    }
  }
  return top;
}

// Guesses the references from the first keys of the first block, seen or not. Scores with a bias or
// a soft cap are taken to be about 0.
void guess_references() {
  shared_reference = 0.0;
  [[unroll]] for (uint r = 0; r < ROWS; ++r) reference[r] = 0.0;
  if (TRANSFORMED) return;
  Accumulator s[ROW_TILES][PART_GRANULES];
  score(s, stage_start(0), 0);
  float top = LOWEST;
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    top = max(top, largest(s, r));
    reference[r] = quad_max(largest(s, r)) * to_log2;
  }
  shared_reference = subgroupMax(top) * to_log2;
}

// Whether all rows are the result: none has left the range of its weights. A row that sees nothing
// has, too.
bool in_range() {
  bool good = true;
  float most = 0.0;
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    float total = quad_sum(sum[r]);
    uint row = subgroup_row(r / LANE_ROWS) + lane_row(r % LANE_ROWS);
    bool exists = tile.first_position + row / TILE_HEADS < query_limit;
    good = good && (!exists || (total > MIN_SUM && total < MAX_SUM));
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
        most = max(most, abs(o[r / LANE_ROWS][d][r % LANE_ROWS * LANE_COLUMNS + c]));
      }
    }
  }
  return good && most < 1e38;
}

// Where a tile, or its part, is marked.
Words mark_of(QueryTile tile, uint part) {
  if (LIST_PARTS > 1) {
    Quads record = record_of(tile.first_head, tile.first_position, part);
    return Words(add_wide(uvec2(record), uvec2(OUT_QUADS * 16, 0)));
  }
  View view = view_of(OPERAND_LSE, tile.first_head, 2);
  return Words(add_wide(view.base, uvec2(row_start(view, tile.first_position, 0) * 4, 0)));
}

// Row r of those that a lane holds elements of, which are already divided by their sum.
void record_row(uint r, float total, vec2 shares) {
  uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
  shares = vec2(quad_sum(shares.x), quad_sum(shares.y));
  if (position >= PARAMS.queries) return;
  Quads record = record_of(tile.first_head + row % TILE_HEADS, position, part_at_work);
  if (gl_SubgroupInvocationID % 4 == 0) {
    // The reference of a row that sees nothing may be anything.
    float top = total == 0.0 ? -INFINITY : reference_of(r) * LN_2;
    record.quad[OUT_QUADS] = floatBitsToUint(vec4(top, total, shares));
  }
  Words words = Words(uvec2(record));
  [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
    [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
      uint column = d * 16 + lane_column(c);
      float value = o[r / LANE_ROWS][d][r % LANE_ROWS * LANE_COLUMNS + c];
      if (column < HEAD_DIM) words.word[column] = floatBitsToUint(value);
    }
  }
}

// Adds to results what coarse values lack to first order: the tilt, Cov(v, k) q, by the shares of
// coarse rows, of which the lanes of a quad hold parts.
void correct(vec2 shares[ROWS]) {
  uint seen = seen_state(tile);
  if (seen == 0) return;  // it is zero
  Vectors state = state_at(OPERAND_STATE, tile.kv_head);
  barrier();
  stage_covariance(state, seen);
  barrier();
  vec2 tilts = tilts_of(state, seen) * (negate_products() ? -PARAMS.scale : PARAMS.scale);
  float weight[ROWS];
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    weight[r] = dot(vec2(quad_sum(shares[r].x), quad_sum(shares[r].y)), tilts);
  }
  [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
    Accumulator sums[ROW_TILES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) sums[t] = Accumulator(0.0);
    [[unroll]] for (uint k = 0; k < DIM_TILES; ++k) {
      Right columns;
      load_values(columns, 0, k, d);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
        sums[t] = coopMatMulAdd(q[t][k], columns, sums[t]);
      }
    }
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
      to_known(sums[t]);
      [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
        // Rows that see nothing have no weight; what they hold may be anything.
        float own = weight[t * LANE_ROWS + i / LANE_COLUMNS];
        if (own != 0.0) o[t][d][i] = fma(sums[t][i], own, o[t][d][i]);
      }
    }
  }
  barrier();
}

void store_results() {
  View view = view_of(OPERAND_OUT, tile.first_head, 1);
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) o[t][d][i] = rounded(o[t][d][i]);
      store_matrix(o[t][d], exchange_start() + 2 * d);
    }
    barrier();
    exchange_out(view, tile, t);
    barrier();
  }
}

// Of row r of those that a lane holds elements of.
void store_row_counts(uint r) {
  uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
  uvec2 all = row_counts;
  [[unroll]] for (uint mask = 1; mask < 4; mask <<= 1) all += subgroupShuffleXor(all, mask);
  if (position >= PARAMS.queries || gl_SubgroupInvocationID % 4 != 0) return;
  View view = view_of(OPERAND_ROW_COUNTS, tile.first_head, 2);
  uint at = row_start(view, position, row % TILE_HEADS);
  Words(view.base).word[at] = all.x;
  Words(view.base).word[at + 1] = all.y;
}

void attend_tile() {
  set_scores(tile.first_head);
  to_log2 = score_factor();
  View q_view = view_of(OPERAND_Q, tile.first_head, 1);
  if (gl_LocalInvocationIndex == 0) failed = 0;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    exchange_in(q_view, tile, t, negate_products());
    barrier();
    if (CORRECTS) make_level_biases(tile, t);
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
  row_counts = uvec2(0);

  Walk walk = start_walk(tile);
  if (!CAREFUL) guess_references();
  uint block = 0;
  for (; block < walk.full_blocks; ++block) attend_block(walk, block, false);
  for (; block < walk.blocks; ++block) attend_block(walk, block, true);
  uint coarse_blocks = 0;
  if (has(FEATURE_PLAN)) {
    [[unroll]] for (uint r = 0; r < ROWS; ++r) level_sum[r] = vec2(0);
    Walk coarse = start_coarse_walk(tile);
    coarse_blocks = coarse.blocks;
    if (!CAREFUL && walk.blocks == 0) guess_references();
    for (block = 0; block < coarse_blocks; ++block) attend_block(coarse, block, true);
  }
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) to_known(o[t][d]);
  }
  if (!CAREFUL && walk.blocks + coarse_blocks > 0) {
    limit_overlap();  // without it the loops lose 5%
    if (!in_range()) failed = 1;
  }

  View lse_view = view_of(OPERAND_LSE, tile.first_head, 2);
  float gain = truncation_gain();
  vec2 shares[ROWS];
  [[unroll]] for (uint r = 0; r < ROWS; ++r) {
    uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
    float total = quad_sum(sum[r]);
    shares[r] = vec2(0);
    if (has(FEATURE_PLAN) && total != 0.0) shares[r] = level_sum[r] / total;
    float share = total == 0.0 ? 0.0 : gain / total;
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
        o[r / LANE_ROWS][d][r % LANE_ROWS * LANE_COLUMNS + c] *= share;
      }
    }
    if (LIST_PARTS > 1) {
      record_row(r, total, shares[r]);
      continue;
    }
    if (position < PARAMS.queries && gl_SubgroupInvocationID % 4 == 0) {
      uint at = row_start(lse_view, position, row % TILE_HEADS);
      float lse = total == 0.0 ? EMPTY_LOGSUMEXP : (reference_of(r) + log2(total)) * LN_2;
      Words(lse_view.base).word[at] = floatBitsToUint(lse);
    }
    if (has(FEATURE_SHARES)) store_levels_pair(OPERAND_SHARES, tile, r, shares[r]);
    if (has(FEATURE_ROW_COUNTS)) store_row_counts(r);
  }
  if (CORRECTS) correct(shares);
  if (LIST_PARTS > 1) {
    barrier();  // `failed` is what all subgroups found
  } else {
    store_results();
  }
  if (gl_LocalInvocationIndex == 0 && failed != 0) mark_of(tile, part_at_work).word[0] = MARK;
}

// Each lane asks for a tile of its own.
bool is_marked(uint place) {
  QueryTile other;
  return locate_query_tile(place / LIST_PARTS, other) &&
         mark_of(other, place % LIST_PARTS).word[0] == MARK;
}

void main() {
  uint place = workgroup_index();
  uint stride = gl_NumWorkGroups.x, next = place, first, marked = 0;
  do {
    if (CAREFUL) {
      for (; marked == 0; next += 32 * stride) {
        if (next >= query_tile_count() * launched_heads * LIST_PARTS) return;
        first = next;
        marked = subgroupBallot(is_marked(first + gl_SubgroupInvocationID * stride)).x;
      }
      place = first + findLSB(marked) * stride;
      marked &= marked - 1;
    }
    part_at_work = place % LIST_PARTS;
    if (locate_uniform_tile(place / LIST_PARTS, tile)) {
      if (LIST_PARTS > 1) tile.list = part_of(tile.list, part_at_work);
      attend_tile();
    }
  } while (CAREFUL);  // known at compile time
}
