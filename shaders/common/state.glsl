// The state of a batch entry and key/value head (jax_aat/pyramid.py: correction). There is one for the
// queries of each super-tile, a mean over the super-tiles before it, and a last one over all. Until
// state_prefix.comp takes these means the state of a super-tile holds its own sums.
// Places are counted in vec4 (csrc/attention/state_planner.cc: StateVectors).
#include "common/visibility.glsl"
#include "common/summaries.glsl"

const float ALPHA = 0.6;         // of what coarse values lack to first order, the share that is added
const float BETA = 0.5;          // of what the mass of coarse rows lacks to second order
const float LARGEST_BIAS = 3.0;  // bound of the latter

const uint MEAN_VECTORS = (QUADS * 4 + 2) * QUADS;  // those that are means over super-tiles
const uint STATE_VECTORS = MEAN_VECTORS + 2 * QUADS;

// Cov(v, k): of one column of k with a quad of columns of v.
uint covariance_place(uint state, uint key_column, uint quad) {
  return state * STATE_VECTORS + key_column * QUADS + quad;
}

// Variances of k: within granules (level 0), within super-tiles (level 1).
uint variance_place(uint state, uint level, uint quad) {
  return state * STATE_VECTORS + (QUADS * 4 + level) * QUADS + quad;
}

// Of the super-tile of that number itself: its mean key (0), its mean value (1).
uint mean_place(uint super_tile, uint kind, uint quad) {
  return super_tile * STATE_VECTORS + MEAN_VECTORS + kind * QUADS + quad;
}

// Of the traces of the variances, by level.
vec2 trace_part(Vectors state, uint index, uint quad) {
  return vec2(dot(state.vector[variance_place(index, 0, quad)], vec4(1)),
              dot(state.vector[variance_place(index, 1, quad)], vec4(1)));
}

// By level, what part of the tilt Cov(v, k) q the value of a row gets.
vec2 tilts_by(vec2 traces) { return ALPHA * vec2(traces.y > 0 ? traces.x / traces.y : 0, 1); }

// Of a quad of a scaled row of queries: by level, what it adds to the sum that a level bias is made of.
vec2 square_sums(Vectors state, uint index, uint quad, vec4 query) {
  query *= query;
  return vec2(dot(query, state.vector[variance_place(index, 0, quad)]),
              dot(query, state.vector[variance_place(index, 1, quad)]));
}

vec2 level_bias_of(vec2 sums) { return min(sums * (BETA / 2), vec2(LARGEST_BIAS)); }

Vectors state_at(uint slot, uint kv_head) { return Vectors(view_of(slot, kv_head, 2).base); }

// That of the queries in so many super-tiles' worth of positions.
uint state_seen(uint part) {
  return has(FEATURE_CAUSAL) ? min(part, super_tile_count()) : super_tile_count();
}

// Keys that a state is a mean over, at least 1.
float keys_of_state(uint state) {
  return float(max(min(key_limit, state * SUPER_TILE_ROWS), 1));
}

uint group_heads() { return PARAMS.query_heads / PARAMS.kv_heads; }
