#version 460
// Turns the gradients of states, summed by parts of the queries, into those of the sums over each
// super-tile: sums over the states that it is part of. Without causality all super-tiles have that of
// number 0. A thread keeps to one vector of all states, so that it may write where it has read.
#include "common/state_rows.glsl"

const uint AHEAD = 8;  // loads on their way

// The sum over parts [first, end).
vec4 sum_parts(Vectors gradients, uint place, uint first, uint end) {
  vec4 total = vec4(0);
  for (; first < end; first += AHEAD) {
    vec4 own[AHEAD];
    [[unroll]] for (uint i = 0; i < AHEAD; ++i) {
      own[i] = vec4(0);
      if (first + i < end) own[i] = gradients.vector[(first + i) * STATE_VECTORS + place];
    }
    [[unroll]] for (uint i = 0; i < AHEAD; ++i) total += own[i];
  }
  return total;
}

void main() {
  load_call();
  uint index = workgroup_index() * THREADS + gl_LocalInvocationID.x;
  uint place = index % MEAN_VECTORS, head = index / MEAN_VECTORS % PARAMS.kv_heads;
  uint entry = index / MEAN_VECTORS / PARAMS.kv_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  set_visibility(0);
  Vectors gradients = state_at(OPERAND_DSTATE, head);
  uint last = super_tile_count(), parts = part_count();
  vec4 total = sum_parts(gradients, place, has(FEATURE_CAUSAL) ? last : 0, parts);
  total /= keys_of_state(last);
  if (!has(FEATURE_CAUSAL)) {
    gradients.vector[place] = total;
    return;
  }
  for (uint end = last; end > 0; end -= min(end, AHEAD)) {
    vec4 own[AHEAD];
    [[unroll]] for (uint i = 0; i < AHEAD; ++i) {
      own[i] = vec4(0);
      // Nothing depends on the first state, whose gradient is not there.
      uint state = end - 1 - i;
      if (i + 1 < end && state < parts) own[i] = gradients.vector[state * STATE_VECTORS + place];
    }
    [[unroll]] for (uint i = 0; i < AHEAD; ++i) {
      if (i >= end) break;
      uint state = end - 1 - i;
      gradients.vector[state * STATE_VECTORS + place] = total;
      total += own[i] / keys_of_state(state);
    }
  }
}
