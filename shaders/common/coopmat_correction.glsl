// The state in the *_coopmat kernels that own a tile of queries: all rows of a tile see the same. For
// bfloat16 alone, whose range holds any covariance.
#include "common/coopmat_coarse.glsl"
#include "common/state.glsl"

#extension GL_KHR_shader_subgroup_arithmetic : require

const bool CORRECTS = (FEATURES & FEATURE_CORRECTS) != 0;

// By row of the tile.
shared vec2 level_biases[CORRECTS ? TILE_ROWS : 1];

uint seen_state(QueryTile tile) { return state_seen(tile.first_position / SUPER_TILE_ROWS); }

vec4 of_pairs(uvec2 x) {
  return uintBitsToFloat(uvec4(x.x << 16, x.x & 0xffff0000u, x.y << 16, x.y & 0xffff0000u));
}

// What the mass of coarse rows lacks to second order, for the subgroup's 16 rows of queries that are
// on their way in; two lanes a row.
void make_level_biases(QueryTile tile, uint t) {
  Vectors state = state_at(OPERAND_STATE, tile.kv_head);
  uint seen = seen_state(tile), row = gl_SubgroupInvocationID / 2;
  vec2 sums = vec2(0);
  for (uint octet = gl_SubgroupInvocationID % 2; octet * 8 < HEAD_DIM; octet += 2) {
    uvec4 value = staged[exchange_start() + row * PITCH + octet];
    sums += square_sums(state, seen, 2 * octet, of_pairs(value.xy) * PARAMS.scale) +
            square_sums(state, seen, 2 * octet + 1, of_pairs(value.zw) * PARAMS.scale);
  }
  sums += vec2(subgroupShuffleXor(sums.x, 1), subgroupShuffleXor(sums.y, 1));
  if (gl_SubgroupInvocationID % 2 == 0) level_biases[subgroup_row(t) + row] = level_bias_of(sums);
}

uint to_pair(vec2 x) { return to_bfloat_bits(x.x) | to_bfloat_bits(x.y) << 16; }

// Cov(v, k) where blocks of keys were, a row for each column of k.
void stage_covariance(Vectors state, uint seen) {
  const uint octets = 2 * DIM_TILES;
  for (uint i = gl_LocalInvocationIndex; i < 16 * DIM_TILES * octets; i += THREADS) {
    uint column = i / octets, octet = i % octets;
    uvec4 value = uvec4(0);
    if (column < HEAD_DIM && octet * 8 < HEAD_DIM) {
      vec4 low = state.vector[covariance_place(seen, column, 2 * octet)];
      vec4 high = state.vector[covariance_place(seen, column, 2 * octet + 1)];
      value = uvec4(to_pair(low.xy), to_pair(low.zw), to_pair(high.xy), to_pair(high.zw));
    }
    staged[column * PITCH + octet] = value;
  }
}

vec2 tilts_of(Vectors state, uint seen) {
  vec2 traces = vec2(0);
  for (uint quad = gl_SubgroupInvocationID; quad < QUADS; quad += 32) {
    traces += trace_part(state, seen, quad);
  }
  return tilts_by(vec2(subgroupAdd(traces.x), subgroupAdd(traces.y)));
}
