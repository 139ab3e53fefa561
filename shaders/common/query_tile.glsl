// The tile of queries that a workgroup owns: TILE_ROWS / TILE_HEADS positions of TILE_HEADS query
// heads that share a key/value head. Row r is position r / TILE_HEADS of head r % TILE_HEADS.
#include "common/work_list.glsl"

const uint TILE_POSITIONS = TILE_ROWS / TILE_HEADS;

struct QueryTile {
  uint first_position;
  uint first_head;
  uint kv_head;
  uvec4 list;  // header of what it sees
};

uint query_tile_count() { return divide_up(PARAMS.queries, TILE_POSITIONS); }

// Tiles of so many heads start together, the last of each first: under a causal mask these are the
// longest, and the GPU is left with short ones at the end (12% faster, length 4,096). Heads are few
// enough for the caches to hold their keys and values.
const uint HEADS_AT_ONCE = 8;

// Sets the batch entry too. False past the last tile.
bool locate_query_tile(out QueryTile tile) {
  uint tiles = query_tile_count();
  uint chunks = PARAMS.query_heads / TILE_HEADS;
  uint heads = PARAMS.batch_count * chunks;
  uint first = workgroup_index() / (tiles * HEADS_AT_ONCE) * HEADS_AT_ONCE;
  if (first >= heads) return false;
  uint index = workgroup_index() - first * tiles, heads_at_once = min(HEADS_AT_ONCE, heads - first);
  if (index >= heads_at_once * tiles) return false;
  uint head = first + index % heads_at_once;
  uint number = tiles - 1 - index / heads_at_once;
  set_batch(head / chunks);
  uint chunk = head % chunks;
  tile.first_position = number * TILE_POSITIONS;
  tile.first_head = chunk * TILE_HEADS;
  tile.kv_head = tile.first_head / (PARAMS.query_heads / PARAMS.kv_heads);
  uint list = batch_list() + chunk * PARAMS.list_head_stride;
  tile.list = list_header(OPERAND_LISTS, list * tiles + number);
  return true;
}
