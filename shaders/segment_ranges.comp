#version 460
// The smallest and the largest segment id of each granule, super-tile and query tile. A workgroup
// has a thread for each granule of a super-tile, or for as many query tiles.
#include "common/boundary.glsl"

shared ivec2 granule_ids[THREADS];

ivec2 joined(ivec2 a, ivec2 b) { return ivec2(min(a.x, b.x), max(a.y, b.y)); }

void store(uint index, ivec2 ids) {
  Pairs(view_of(OPERAND_SEGMENT_RANGES, 0, 2).base).pair[index] = uvec2(ids);
}

void main() {
  uint self = gl_LocalInvocationID.x;
  uint granules = granule_count(), super_tiles = PARAMS.coarse_rows - granules;
  uint groups = super_tiles + divide_up(PARAMS.plan_tiles, THREADS);
  uint group = workgroup_index() % groups, entry = workgroup_index() / groups;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  set_visibility(0);

  if (group >= super_tiles) {
    uint tile = (group - super_tiles) * THREADS + self;
    if (tile >= PARAMS.plan_tiles) return;
    uint first = tile * PARAMS.plan_positions;
    uint end = min(first + PARAMS.plan_positions, call.queries);
    ivec2 ids = ivec2(query_segment(first));
    for (uint position = first + 1; position < end; ++position) {
      ids = joined(ids, ivec2(query_segment(position)));
    }
    store(PARAMS.coarse_rows + tile, ids);
    return;
  }
  uint granule = group * SUPER_TILE_GRANULES + self;
  // The first granule of a super-tile exists; the others repeat its first id.
  ivec2 ids = ivec2(key_segment(group * SUPER_TILE_ROWS));
  if (granule < granules) {
    uint first = granule * GRANULE_ROWS;
    uint end = min(first + GRANULE_ROWS, call.keys);
    ids = ivec2(key_segment(first));
    for (uint key = first + 1; key < end; ++key) ids = joined(ids, ivec2(key_segment(key)));
    store(granule, ids);
  }
  granule_ids[self] = ids;
  barrier();
  if (self != 0) return;
  for (uint i = 1; i < THREADS; ++i) ids = joined(ids, granule_ids[i]);
  store(granules + group, ids);
}
