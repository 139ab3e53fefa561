// The query tile of a plan that a workgroup makes.
#include "common/boundary.glsl"

// Of the tile. Found once and not where it is asked for: out of a loop over granules, with barriers,
// NVIDIA's compiler (driver 580.159.04, an H200) got what it follows from wrong (docs/kernels.md).
shared TileBoundary bounds;

uint list_count() { return PARAMS.query_heads / TILE_HEADS; }

// Chooses the batch entry, list and tile, and finds its bounds; false past the last one.
bool set_plan_tile(out uint list, out uint tile) {
  uint index = workgroup_index();
  tile = index % PARAMS.plan_tiles;
  index /= PARAMS.plan_tiles;
  list = index % list_count();
  uint entry = index / list_count();
  if (entry >= PARAMS.batch_count) return false;
  set_batch(entry);
  set_visibility(list * TILE_HEADS);
  if (gl_LocalInvocationID.x == 0) bounds = boundary_of_tile(tile);
  barrier();
  return true;
}

// Entries that the list of a tile takes.
uint list_room(uint exact, uint coarse_rows) {
  return round_up(exact, LIST_STEP) + round_up(coarse_rows, COARSE_STEP);
}
