// Work lists: which rows a tile sees. A header a tile is (first entry of its list, full granules,
// full and mixed granules, coarse rows); an entry of a granule is its first key, or in a transposed
// list its first query position. A tile's granules take a multiple of LIST_STEP entries, those of
// coarse rows after them a multiple of COARSE_STEP, the rest of which is NO_GRANULE.
#include "common/storage.glsl"

#define GRANULE_ROWS 16
#define NO_GRANULE 0xffffffffu
#define LIST_STEP 4
#define COARSE_STEP 64

const uint GRANULE_POSITIONS = GRANULE_ROWS / TILE_HEADS;  // of a granule of queries
const uint BLOCK_GRANULES = BLOCK_ROWS / GRANULE_ROWS;

struct WorkList {
  uvec2 entries;  // their address
  uint first_entry;
  uint full_blocks;
  uint blocks;  // full and mixed
  uint first_coarse_entry;
  uint coarse_rows;
};

uint round_up(uint value, uint step) { return divide_up(value, step) * step; }

// `list`: the head chunk, or the key/value head of transposed lists.
uvec4 list_header(uint slot, uint list, uint tile) {
  return Quads(view_of(slot, list, 2).base).quad[tile];
}

// A plan comes from outside: whatever its headers hold, nothing past its entries is read.
uvec4 bounded_header(uvec4 header) {
  header.x = min(header.x, PARAMS.list_capacity);
  uint room = PARAMS.list_capacity - header.x;
  header.z = min(header.z, min(room / LIST_STEP * LIST_STEP, divide_up(PARAMS.keys, GRANULE_ROWS)));
  header.y = min(header.y, header.z);
  room -= round_up(header.z, LIST_STEP);
  header.w = min(header.w, min(room / COARSE_STEP * COARSE_STEP, PARAMS.coarse_rows));
  return header;
}

WorkList work_list(uvec4 header, uvec2 entries) {
  return WorkList(entries, header.x, header.y / BLOCK_GRANULES,
                  divide_up(header.z, BLOCK_GRANULES), header.x + round_up(header.z, LIST_STEP),
                  header.w);
}

// What a tile of queries sees. A tile of a plan may span several of the kernel's.
WorkList query_list(uint chunk, uint tile, uint tile_positions) {
  uvec2 entries = view_of(OPERAND_LIST_ENTRIES, chunk, 2).base;
  uvec4 header;
  if (has(FEATURE_PLAN)) {
    tile = tile * tile_positions / PARAMS.plan_positions;
    header = bounded_header(list_header(OPERAND_LIST_HEADERS, chunk, tile));
    // Nothing is full beside a bias, which is read at the keys that entries name, once these are
    // found to exist.
    if (has(FEATURE_BIAS)) header.y = 0;
    // A plan counts the granule that the end of the keys cuts as full, being the last, where all its
    // keys are seen; but it has rows to hide.
    if (header.y > 0) {
      uint last = load_word(entries, header.x + header.y - 1);
      if (last + GRANULE_ROWS > PARAMS.keys) --header.y;
    }
  } else {
    header = list_header(OPERAND_LIST_HEADERS, chunk, tile);
  }
  return work_list(header, entries);
}

// The granules of queries that see a tile of keys; not of a plan.
WorkList key_list(uint kv_head, uint tile) {
  return work_list(list_header(OPERAND_KEY_LIST_HEADERS, kv_head, tile),
                   view_of(OPERAND_KEY_LIST_ENTRIES, kv_head, 2).base);
}
