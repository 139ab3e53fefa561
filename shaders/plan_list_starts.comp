#version 460
// Where the entries of each query tile of a plan start in their list: after those of the tiles
// before and, where lists are joined, of the lists before. A workgroup serves one list.
#include "common/scan.glsl"
#include "common/joined.glsl"
#include "common/plan_tile.glsl"

void main() {
  uint list = workgroup_index() % list_count(), entry = workgroup_index() / list_count();
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  uvec2 headers = view_of(OPERAND_LIST_HEADERS, list, 2).base;
  uint start = 0;
  if (JOINED != 0) {
    // Of neighbouring words, as others write where entries start.
    Words all = Words(view_of(OPERAND_LIST_HEADERS, 0, 2).base);
    uint before = 0;
    for (uint i = gl_LocalInvocationID.x; i < list * PARAMS.plan_tiles; i += THREADS) {
      before += list_room(all.word[4 * i + 2], all.word[4 * i + 3]);
    }
    scan(before);
    start = counts[THREADS - 1];
  }
  for (uint base = 0; base < PARAMS.plan_tiles; base += THREADS) {
    uint tile = base + gl_LocalInvocationID.x;
    uint room = 0;
    if (tile < PARAMS.plan_tiles) {
      uvec4 header = Quads(headers).quad[tile];
      room = list_room(header.z, header.w);
    }
    uint end = start + scan(room);
    if (tile < PARAMS.plan_tiles) Words(headers).word[4 * tile] = end - room;
    start += counts[THREADS - 1];
  }
}
