#version 460
// Coarse rows of keys and values: means of granules and of super-tiles; for the state the squared
// distances of keys from both. A workgroup takes a super-tile of one key/value head.
#include "common/moments.glsl"
#include "common/state.glsl"
#include "common/store.glsl"

shared vec4 column_spreads[THREADS];
shared float row_counts[THREADS];

// Of two sets of rows together (Chan, Golub and LeVeque 1979).
Moments merged(Moments a, float a_count, Moments b, float b_count) {
  float share = b_count / max(a_count + b_count, 1.0);
  vec4 distance = b.mean - a.mean;
  return Moments(fma(distance, vec4(share), a.mean),
                 a.spread + b.spread + distance * distance * (a_count * share));
}

// Merges those of the threads of a quad of columns, for the first of them.
Moments merge_columns(Moments own, float count) {
  barrier();
  column_sums[gl_LocalInvocationID.x] = own.mean;
  column_spreads[gl_LocalInvocationID.x] = own.spread;
  row_counts[gl_LocalInvocationID.x] = count;
  barrier();
  if (gl_LocalInvocationID.x < QUADS) {
    for (uint i = 1; i < GRANULES_AT_ONCE; ++i) {
      uint other = i * QUADS + gl_LocalInvocationID.x;
      own = merged(own, count, Moments(column_sums[other], column_spreads[other]),
                   row_counts[other]);
      count += row_counts[other];
    }
  }
  return own;
}

void main() {
  load_call();
  uint super_tile = workgroup_index() % super_tile_count();
  uint head = workgroup_index() / super_tile_count() % PARAMS.kv_heads;
  uint entry = workgroup_index() / super_tile_count() / PARAMS.kv_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  set_visibility(0);
  View keys = view_of(OPERAND_K, head, LOG2_BYTES), values = view_of(OPERAND_V, head, LOG2_BYTES);
  View coarse_keys = view_of(OPERAND_COARSE_K, head, LOG2_BYTES);
  View coarse_values = view_of(OPERAND_COARSE_V, head, LOG2_BYTES);
  uint quad = gl_LocalInvocationID.x % QUADS, place = gl_LocalInvocationID.x / QUADS;

  Moments all_keys = Moments(vec4(0), vec4(0)), all_values = all_keys;
  vec4 scatter = vec4(0);
  float rows = 0;
  for (uint local = place; local < SUPER_TILE_GRANULES; local += GRANULES_AT_ONCE) {
    uint granule = super_tile * SUPER_TILE_GRANULES + local;
    if (place >= GRANULES_AT_ONCE || granule >= granule_count()) break;
    float count = float(rows_from(granule * GRANULE_ROWS, GRANULE_ROWS));
    Moments parts[PARTS];
    Moments key = granule_moments(keys, granule, quad, parts);
    Moments value = granule_moments(values, granule, quad, parts);
    store_columns(coarse_keys.base, row_start(coarse_keys, granule, 0), quad * 4, key.mean);
    store_columns(coarse_values.base, row_start(coarse_values, granule, 0), quad * 4, value.mean);
    scatter += key.spread;
    all_keys = merged(all_keys, rows, key, count);
    all_values = merged(all_values, rows, value, count);
    rows += count;
  }
  all_keys = merge_columns(all_keys, rows);
  all_values = merge_columns(all_values, rows);
  scatter = sum_columns(scatter);
  if (gl_LocalInvocationID.x >= QUADS) return;
  uint row = granule_count() + super_tile;
  store_columns(coarse_keys.base, row_start(coarse_keys, row, 0), quad * 4, all_keys.mean);
  store_columns(coarse_values.base, row_start(coarse_values, row, 0), quad * 4, all_values.mean);
  if (!has(FEATURE_CORRECTS)) return;
  Vectors state = state_at(OPERAND_STATE, head);
  state.vector[variance_place(super_tile, 0, quad)] = scatter;
  state.vector[variance_place(super_tile, 1, quad)] = all_keys.spread;
  state.vector[mean_place(super_tile, 0, quad)] = all_keys.mean;
  state.vector[mean_place(super_tile, 1, quad)] = all_values.mean;
}
