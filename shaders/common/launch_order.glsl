// The order in which the tiles of all heads start. Under a causal mask some tiles see many times as
// much as others: the longest of several heads start together, and the GPU is left with short ones
// at the end (forward, length 4,096: 12% faster), yet the heads are few enough for the caches to
// hold what they share. Without a mask that gains 2% where several workgroups share a
// multiprocessor, and a workgroup that fills one loses 2 to 7%.
#include "common/problem.glsl"

const uint HEADS_AT_ONCE = (FEATURES & FEATURE_CAUSAL) != 0 || THREADS < 256 ? 8 : 1;

// The head, of all batch entries, whose tile starts in this place of the order, and which of its
// `tiles` tiles that is; false past the last one.
bool launched_tile(uint place, uint tiles, out uint head, out uint tile) {
  uint first = place / (tiles * HEADS_AT_ONCE) * HEADS_AT_ONCE;
  uint index = place - first * tiles;
  uint together = min(HEADS_AT_ONCE, launched_heads - min(first, launched_heads));
  if (index >= together * tiles) return false;
  head = first_launched_head + first + index % together;
  tile = index / together;
  return true;
}
