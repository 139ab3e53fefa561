// The tile of queries that a workgroup owns: TILE_ROWS / TILE_HEADS positions of TILE_HEADS query
// heads that share a key/value head. Row r is position r / TILE_HEADS of head r % TILE_HEADS.
#include "common/launch_order.glsl"
#include "common/work_list.glsl"

const uint TILE_POSITIONS = TILE_ROWS / TILE_HEADS;

struct QueryTile {
  uint first_position;
  uint first_head;
  uint kv_head;
  WorkList list;  // what it sees
};

uint query_tile_count() { return divide_up(PARAMS.queries, TILE_POSITIONS); }

// The tile that starts in this place of the order; sets the batch entry too. The last tiles start
// first: under a causal mask they are the longest. False past the last tile.
bool locate_query_tile(uint place, out QueryTile tile) {
  uint tiles = query_tile_count();
  uint chunks = PARAMS.query_heads / TILE_HEADS;
  uint head, rank;
  if (!launched_tile(place, tiles, head, rank)) return false;
  uint number = tiles - 1 - rank;
  set_batch(head / chunks);
  uint chunk = head % chunks;
  tile.first_position = number * TILE_POSITIONS;
  tile.first_head = chunk * TILE_HEADS;
  tile.kv_head = tile.first_head / (PARAMS.query_heads / PARAMS.kv_heads);
  tile.list = query_list(chunk, number, TILE_POSITIONS);
  return true;
}
