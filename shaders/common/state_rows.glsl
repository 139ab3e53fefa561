// Rows of queries that see the same state: the part of them in a super-tile's worth of positions, by
// position, then by head of the group.
#include "common/state.glsl"

shared vec2 trace_parts[QUADS];

uint kv_head, part;
uint first_row;  // of the part, from which rows count

uint part_count() { return divide_up(call.queries, SUPER_TILE_ROWS); }
uint first_head() { return kv_head * group_heads(); }
uint row_position(uint row) {
  return part * SUPER_TILE_ROWS + (first_row + row) / group_heads();
}
// Of the group.
uint row_head(uint row) { return (first_row + row) % group_heads(); }
uint part_rows() {
  return min(SUPER_TILE_ROWS, call.queries - part * SUPER_TILE_ROWS) * group_heads();
}
bool row_exists(uint row) { return first_row + row < part_rows(); }

// Finds a part by its number among all of the call; false if there is none.
bool locate_part(uint index) {
  load_call();
  part = index % part_count();
  kv_head = index / part_count() % PARAMS.kv_heads;
  uint entry = index / part_count() / PARAMS.kv_heads;
  first_row = 0;
  if (entry >= PARAMS.batch_count) return false;
  set_batch(entry);
  set_visibility(0);
  return true;
}

// Finds the workgroup's tile of TILE_ROWS; false if it has none.
bool locate_tile() {
  uint tiles = divide_up(SUPER_TILE_ROWS * group_heads(), TILE_ROWS);
  if (!locate_part(workgroup_index() / tiles)) return false;
  first_row = workgroup_index() % tiles * TILE_ROWS;
  return row_exists(0);
}

// Traces of the variances of a state, within granules and within super-tiles.
vec2 traces_of(Vectors state, uint index) {
  barrier();
  for (uint quad = gl_LocalInvocationID.x; quad < QUADS; quad += THREADS) {
    trace_parts[quad] = trace_part(state, index, quad);
  }
  barrier();
  vec2 sums = vec2(0);
  for (uint quad = 0; quad < QUADS; ++quad) sums += trace_parts[quad];
  return sums;
}

vec2 tilts_of(Vectors state, uint index) {
  return tilts_by(traces_of(state, index));
}

// A number a level.
vec2 load_pair(View view, uint row) {
  uint start = row_start(view, row_position(row), row_head(row));
  return vec2(load_float(view.base, start), load_float(view.base, start + 1));
}

vec4 load_quad(View view, uint row, uint quad) {
  return load_columns(view.base, row_start(view, row_position(row), row_head(row)), quad * 4);
}

// What of the tilt the output of a row gets; 0 if the row does not exist.
float tilt_weight(View shares, uint row, vec2 tilts) {
  return row_exists(row) ? dot(load_pair(shares, row), tilts) : 0;
}

// A quad of a row of queries, scaled; zeros if the row does not exist.
vec4 query_quad(View queries, uint row, uint quad) {
  return row_exists(row) ? load_quad(queries, row, quad) * call.scale : vec4(0);
}

// The gradient of the sums that level biases are made of, where these are not at their bound.
vec2 bias_sum_gradient(View biases, View gradients, uint row) {
  return mix(vec2(0), load_pair(gradients, row) * (BETA / 2),
             lessThan(load_pair(biases, row), vec2(LARGEST_BIAS)));
}
