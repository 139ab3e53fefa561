#version 460
// The transposed lists of a plan, by its levels: for each tile of keys, then of coarse rows, the
// query tiles that see any of it, in ascending order. A workgroup counts, then makes, one list.
#include "common/scan.glsl"
#include "common/stage.glsl"
#include "common/plan_tile.glsl"

#define STAGE_COUNT 0
#define STAGE_LIST 1

bool sees_keys(View levels, uint key_tile) {
  uint granule = key_tile * KEY_TILE_GRANULES;
  uint word = load_word(levels.base, granule / LEVEL_GRANULES);
  uint exact = fields_at(word, LEVEL_EXACT) >> (2 * (granule % LEVEL_GRANULES));
  return (exact & 0xffffu) != 0;
}

bool sees_coarse_rows(View levels, uint coarse_tile) {
  uint granules = granule_count(), words = divide_up(granules, LEVEL_GRANULES);
  uint row = coarse_tile * PLAN_KEY_ROWS, end = min(row + PLAN_KEY_ROWS, PARAMS.coarse_rows);
  // Fields past the last granule are hidden.
  for (; row < min(end, granules); row += LEVEL_GRANULES) {
    if (fields_at(load_word(levels.base, row / LEVEL_GRANULES), LEVEL_MEAN) != 0) return true;
  }
  for (row = max(coarse_tile * PLAN_KEY_ROWS, granules); row < end; ++row) {
    uint first = (row - granules) * (SUPER_TILE_GRANULES / LEVEL_GRANULES);
    uint last = min(first + SUPER_TILE_GRANULES / LEVEL_GRANULES, words);
    for (uint word = first; word < last; ++word) {
      if (fields_at(load_word(levels.base, word), LEVEL_SUPER_MEAN) != 0) return true;
    }
  }
  return false;
}

void main() {
  uint self = gl_LocalInvocationID.x;
  uint key_tiles = key_tile_count();
  uint lists = key_tiles + divide_up(PARAMS.coarse_rows, PLAN_KEY_ROWS);
  uint key_list = workgroup_index() % lists, index = workgroup_index() / lists;
  uint kv_head = index % PARAMS.kv_heads, entry = index / PARAMS.kv_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  uvec2 headers = view_of(OPERAND_KEY_LIST_HEADERS, kv_head, 2).base;
  uvec2 entries = view_of(OPERAND_KEY_LIST_ENTRIES, kv_head, 2).base;
  uint chunks = list_count() / PARAMS.kv_heads, members = chunks * PARAMS.plan_tiles;

  // The start of the list, and the end of the last one.
  uint start = 0, end = 0;
  if (STAGE == STAGE_LIST) {
    uint before = 0, all = 0;
    for (uint other = self; other < lists; other += THREADS) {
      uint count = load_word(headers, 4 * other + 1);
      all += count;
      if (other < key_list) before += count;
    }
    scan(before);
    start = counts[THREADS - 1];
    scan(all);
    end = counts[THREADS - 1];
  }
  uint next = start;
  for (uint base = 0; base < members; base += THREADS) {
    uint member = base + self;
    bool sees = false;
    if (member < members) {
      uint list = kv_head * chunks + member / PARAMS.plan_tiles;
      View levels = levels_of(list, member % PARAMS.plan_tiles);
      sees = key_list < key_tiles ? sees_keys(levels, key_list)
                                  : sees_coarse_rows(levels, key_list - key_tiles);
    }
    uint rank = scan(sees ? 1u : 0u);
    uint at = next + rank - 1;
    if (STAGE == STAGE_LIST && sees && at < PARAMS.key_list_capacity) {
      Words(entries).word[at] = member;
    }
    next += counts[THREADS - 1];
  }
  if (STAGE == STAGE_COUNT) {
    if (self == 0) Quads(headers).quad[key_list] = uvec4(0, next, 0, 0);
    return;
  }
  if (self == 0) Words(headers).word[4 * key_list] = start;
  // The lists share what is behind the last of them.
  if (end >= PARAMS.key_list_capacity) return;
  uint share = divide_up(PARAMS.key_list_capacity - end, lists);
  uint rest = min(end + (key_list + 1) * share, PARAMS.key_list_capacity);
  for (uint i = end + key_list * share + self; i < rest; i += THREADS) {
    Words(entries).word[i] = NO_GRANULE;
  }
}
