#version 460
// Turns the sums of super-tiles into states: means over the super-tiles before each, and over all. A
// thread keeps to one vector of all states, so that it may write where it has read.
#include "common/state.glsl"

const uint AHEAD = 8;  // loads on their way

void main() {
  load_call();
  uint index = workgroup_index() * THREADS + gl_LocalInvocationID.x;
  uint place = index % MEAN_VECTORS, head = index / MEAN_VECTORS % PARAMS.kv_heads;
  uint entry = index / MEAN_VECTORS / PARAMS.kv_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  set_visibility(0);
  Vectors state = state_at(OPERAND_STATE, head);
  uint super_tiles = super_tile_count();
  vec4 total = vec4(0);
  for (uint first = 0; first < super_tiles; first += AHEAD) {
    vec4 own[AHEAD];
    [[unroll]] for (uint i = 0; i < AHEAD; ++i) {
      own[i] = vec4(0);
      if (first + i < super_tiles) own[i] = state.vector[(first + i) * STATE_VECTORS + place];
    }
    [[unroll]] for (uint i = 0; i < AHEAD; ++i) {
      uint before = first + i;
      if (has(FEATURE_CAUSAL) && before < super_tiles) {
        state.vector[before * STATE_VECTORS + place] = total / keys_of_state(before);
      }
      total += own[i];
    }
  }
  state.vector[super_tiles * STATE_VECTORS + place] = total / keys_of_state(super_tiles);
}
