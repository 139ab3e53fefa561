#version 460
// What state_correction.comp does, for bfloat16, whose range holds any covariance, on cooperative
// matrices: the tilt of 16 rows a subgroup at a time.
#include "common/coopmat_rounding.glsl"
#include "common/state_rows.glsl"

const uint SUBGROUPS = THREADS / 32;
const uint DIM_TILES = (HEAD_DIM + 15) / 16;
const uint OCTETS = 2 * DIM_TILES;  // vectors of 16 bytes that a row has
const uint PITCH = OCTETS + 1;      // from one staged row to the next: odd, to meet all banks

shared uvec4 matrix[16 * DIM_TILES * PITCH];  // Cov(v, k), a row for each column of k
shared uvec4 query_rows[16 * SUBGROUPS * PITCH];
shared float weights[TILE_ROWS];

uint to_pair(vec2 x) { return to_bfloat_bits(x.x) | to_bfloat_bits(x.y) << 16; }

void stage_matrix(Vectors state, uint seen) {
  for (uint i = gl_LocalInvocationIndex; i < 16 * DIM_TILES * OCTETS; i += THREADS) {
    uint column = i / OCTETS, octet = i % OCTETS;
    uvec4 value = uvec4(0);
    if (column < HEAD_DIM && octet * 8 < HEAD_DIM) {
      vec4 low = state.vector[covariance_place(seen, column, 2 * octet)];
      vec4 high = state.vector[covariance_place(seen, column, 2 * octet + 1)];
      value = uvec4(to_pair(low.xy), to_pair(low.zw), to_pair(high.xy), to_pair(high.zw));
    }
    matrix[column * PITCH + octet] = value;
  }
}

uint first_query_row() { return gl_SubgroupID * 16 * PITCH; }

// The subgroup's 16 rows from `first` on; zeros where there are none.
void stage_queries(View queries, uint first) {
  sync_subgroup();
  for (uint i = gl_SubgroupInvocationID; i < 16 * OCTETS; i += 32) {
    uint row = first + i / OCTETS, octet = i % OCTETS;
    uvec4 value = uvec4(0);
    if (row_exists(row) && octet * 8 < HEAD_DIM) {
      uint start = row_start(queries, row_position(row), row_head(row));
      value = Quads(queries.base).quad[start / 8 + octet];
    }
    query_rows[first_query_row() + i / OCTETS * PITCH + octet] = value;
  }
  sync_subgroup();
}

void add_pair(uvec2 base, uint index, vec2 value) {
  uint word = Words(base).word[index / 2];
  value += uintBitsToFloat(uvec2(word << 16, word & 0xffff0000u));
  Words(base).word[index / 2] = to_pair(value);
}

void main() {
  if (!locate_tile()) return;
  uint seen = state_seen(part);
  if (seen == 0) return;  // it is zero
  Vectors state = state_at(OPERAND_STATE, kv_head);
  View queries = view_of(OPERAND_Q, first_head(), 1);
  View results = view_of(OPERAND_OUT, first_head(), 1);
  View shares = view_of(OPERAND_SHARES, first_head(), 2);
  vec2 tilts = tilts_of(state, seen) * call.scale;
  for (uint row = gl_LocalInvocationIndex; row < TILE_ROWS; row += THREADS) {
    weights[row] = tilt_weight(shares, row, tilts);
  }
  stage_matrix(state, seen);
  barrier();
  for (uint first = gl_SubgroupID * 16; first < TILE_ROWS; first += 16 * SUBGROUPS) {
    stage_queries(queries, first);
    Left q[DIM_TILES];
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(q[d], query_rows, first_query_row() + 2 * d, PITCH, ROW_MAJOR);
    }
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      Accumulator sums = Accumulator(0.0);
      [[unroll]] for (uint k = 0; k < DIM_TILES; ++k) {
        Right columns;
        coopMatLoad(columns, matrix, k * 16 * PITCH + 2 * d, PITCH, ROW_MAJOR);
        sums = coopMatMulAdd(q[k], columns, sums);
      }
      [[unroll]] for (uint h = 0; h < LANE_ROWS; ++h) {
        uint row = first + lane_row(h);
        // Rows that see nothing have no weight; what they hold may be anything.
        if (weights[row] == 0) continue;
        uint start = row_start(results, row_position(row), row_head(row));
        [[unroll]] for (uint c = 0; c < LANE_COLUMNS; c += 2) {
          uint column = d * 16 + lane_column(c), i = h * LANE_COLUMNS + c;
          if (column >= HEAD_DIM) continue;
          add_pair(results.base, start + column, vec2(sums[i], sums[i + 1]) * weights[row]);
        }
      }
    }
  }
}
