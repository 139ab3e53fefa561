#version 460
// Adds to dk and dv what comes through coarse rows and through the state: a workgroup takes a tile of
// keys of one key/value head.
#include "common/moments.glsl"
#include "common/state.glsl"
#include "common/state_product.glsl"
#include "common/store.glsl"

View keys, values;
Vectors state, gradients;
uint head, first_key, super_tile;
uint gradient_index;    // of the super-tile
bool multiplies_keys;   // else values, less the mean of their super-tile

vec4 input_quad(uint row, uint quad) {
  if (first_key + row >= key_limit) return vec4(0);
  if (multiplies_keys) {
    return load_columns(keys.base, row_start(keys, first_key + row, 0), quad * 4) -
           state.vector[mean_place(super_tile, 0, quad)];
  }
  return load_columns(values.base, row_start(values, first_key + row, 0), quad * 4) -
         state.vector[mean_place(super_tile, 1, quad)];
}

// What a row gets of the gradients of its means.
vec4 through_means(View means, uint granule, uint quad) {
  uint granule_rows = rows_from(granule * GRANULE_ROWS, GRANULE_ROWS);
  uint super_rows = rows_from(super_tile * SUPER_TILE_ROWS, SUPER_TILE_ROWS);
  uint super_row = granule_count() + super_tile;
  return load_columns(means.base, row_start(means, granule, 0), quad * 4) /
             float(max(granule_rows, 1)) +
         load_columns(means.base, row_start(means, super_row, 0), quad * 4) /
             float(max(super_rows, 1));
}

// What a key gets of the gradients of variances, twice its distances from both means.
vec4 through_variances(uint row, uint quad, vec4 granule_mean) {
  vec4 key = load_columns(keys.base, row_start(keys, first_key + row, 0), quad * 4);
  vec4 within_granule = gradients.vector[variance_place(gradient_index, 0, quad)];
  vec4 within_super_tile = gradients.vector[variance_place(gradient_index, 1, quad)];
  return 2 * (within_granule * (key - granule_mean) +
              within_super_tile * (key - state.vector[mean_place(super_tile, 0, quad)]));
}

// The rows of a thread are of one granule.
void add_columns(vec4 sums[THREAD_TILE], View results, View means, uint quad, bool of_keys) {
  uint granule = (first_key + thread_row(0)) / GRANULE_ROWS;
  if (granule >= granule_count()) return;
  vec4 shared_part = through_means(means, granule, quad), granule_mean = vec4(0);
  bool has_variances = of_keys && has(FEATURE_CORRECTS);
  if (has_variances) {
    Moments parts[PARTS];
    granule_mean = granule_moments(keys, granule, quad, parts).mean;
  }
  [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) {
    uint row = thread_row(i);
    if (first_key + row >= key_limit) continue;
    vec4 own = sums[i] + shared_part;
    if (has_variances) own += through_variances(row, quad, granule_mean);
    uint start = row_start(results, first_key + row, 0);
    vec4 value = load_columns(results.base, start, quad * 4) + own;
    store_columns(results.base, start, quad * 4, value);
  }
}

void add_gradients(uint slot, uint means_slot, bool of_keys) {
  View results = view_of(slot, head, LOG2_BYTES), means = view_of(means_slot, head, LOG2_BYTES);
  multiplies_keys = !of_keys;
  for (uint column = 0; column < QUADS; column += COLUMN_QUADS) {
    vec4 sums[THREAD_TILE];
    if (has(FEATURE_CORRECTS) && has(FEATURE_DOUT)) {
      multiply_state(gradients, gradient_index, column, multiplies_keys, sums);
    } else {
      [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) sums[i] = vec4(0);
    }
    uint quad = column + thread_column();
    if (quad < QUADS) add_columns(sums, results, means, quad, of_keys);
  }
}

void main() {
  load_call();
  uint tiles = divide_up(call.keys, TILE_ROWS);
  first_key = workgroup_index() % tiles * TILE_ROWS;
  head = workgroup_index() / tiles % PARAMS.kv_heads;
  uint entry = workgroup_index() / tiles / PARAMS.kv_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  set_visibility(0);
  super_tile = first_key / SUPER_TILE_ROWS;
  gradient_index = has(FEATURE_CAUSAL) ? super_tile : 0;
  keys = view_of(OPERAND_K, head, LOG2_BYTES);
  values = view_of(OPERAND_V, head, LOG2_BYTES);
  if (has(FEATURE_CORRECTS)) {
    state = state_at(OPERAND_STATE, head);
    gradients = state_at(OPERAND_DSTATE, head);
  }
  if (has(FEATURE_DV)) add_gradients(OPERAND_DV, OPERAND_DCOARSE_V, false);
  if (has(FEATURE_DK)) add_gradients(OPERAND_DK, OPERAND_DCOARSE_K, true);
}
