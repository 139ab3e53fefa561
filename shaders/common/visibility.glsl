// Which keys a query may attend to: one pair at a time, and by whole tiles.
#include "common/storage.glsl"

#define TILE_HIDDEN 0
#define TILE_MIXED 1
#define TILE_FULL 2

// The masking operands of the batch entry at work; heads count from the `head` given to
// `set_visibility`.
View mask_view, query_segments_view, key_segments_view;
// Rows and keys from here on are hidden.
uint query_limit, key_limit;

void set_visibility(uint head) {
  uint rows = call.queries, keys = call.keys;
  if (has(FEATURE_Q_LENGTHS)) {
    int length = int(load_word(view_of(OPERAND_Q_LENGTHS, 0, 2).base, 0));
    rows = min(rows, uint(max(length, 0)));
  }
  if (has(FEATURE_KV_LENGTHS)) {
    int length = int(load_word(view_of(OPERAND_KV_LENGTHS, 0, 2).base, 0));
    keys = min(keys, uint(max(length, 0)));
  }
  query_limit = rows;
  key_limit = keys;
  if (has(FEATURE_SEGMENTS)) {
    query_segments_view = view_of(OPERAND_Q_SEGMENTS, 0, 2);
    key_segments_view = view_of(OPERAND_KV_SEGMENTS, 0, 2);
  }
  if (has(FEATURE_MASK)) mask_view = view_of(OPERAND_MASK, head, 0);
}

int query_segment(uint position) {
  return int(load_word(query_segments_view.base, position * query_segments_view.row_stride));
}

int key_segment(uint key) {
  return int(load_word(key_segments_view.base, key * key_segments_view.row_stride));
}

bool mask_allows(uint position, uint head, uint key) {
  return load_byte(mask_view.base,
                   row_start(mask_view, position, head) + key * mask_view.column_stride) != 0;
}

// False too for positions and keys that do not exist.
bool visible(uint position, uint head, uint key) {
  if (position >= query_limit || key >= key_limit) return false;
  int distance = int(key) - int(position);
  if (has(FEATURE_CAUSAL) && distance > 0) return false;
  if (has(FEATURE_WINDOW)) {
    if (call.window_left >= 0 && -distance > call.window_left) return false;
    if (call.window_right >= 0 && distance > call.window_right) return false;
  }
  if (has(FEATURE_SEGMENTS) && query_segment(position) != key_segment(key)) return false;
  if (has(FEATURE_MASK) && !mask_allows(position, head, key)) return false;
  return true;
}

// Of the distances key - position that occur (from `nearest` to `farthest`), are all, some or none
// at most `limit`?
uint classify_distance(int nearest, int farthest, int limit) {
  return farthest <= limit ? TILE_FULL : (nearest <= limit ? TILE_MIXED : TILE_HIDDEN);
}

// By the ranges of the ids that occur: a tile that is called mixed may turn out to be hidden.
uint classify_segments(uvec2 positions, uvec2 keys) {
  int query_low = query_segment(positions.x), query_high = query_low;
  for (uint position = positions.x + 1; position < positions.y; ++position) {
    query_low = min(query_low, query_segment(position));
    query_high = max(query_high, query_segment(position));
  }
  int key_low = key_segment(keys.x), key_high = key_low;
  for (uint key = keys.x + 1; key < keys.y; ++key) {
    key_low = min(key_low, key_segment(key));
    key_high = max(key_high, key_segment(key));
  }
  if (query_high < key_low || key_high < query_low) return TILE_HIDDEN;
  bool one_id = query_low == query_high && key_low == key_high && query_low == key_low;
  return one_id ? TILE_FULL : TILE_MIXED;
}

uint classify_mask(uvec2 positions, uvec2 keys, uint heads) {
  if (mask_view.row_stride == 0) positions.y = positions.x + 1;
  if (mask_view.column_stride == 0) keys.y = keys.x + 1;
  if (mask_view.head_stride == 0) heads = 1;
  bool some = false, every = true;
  for (uint head = 0; head < heads; ++head) {
    for (uint position = positions.x; position < positions.y; ++position) {
      for (uint key = keys.x; key < keys.y; ++key) {
        bool allowed = mask_allows(position, head, key);
        some = some || allowed;
        every = every && allowed;
      }
    }
  }
  return every ? TILE_FULL : (some ? TILE_MIXED : TILE_HIDDEN);
}

// Whether positions and keys [x, y) see each other: all, some or none, as far as lengths, causality
// and the window tell. Both ranges exist and are not empty.
uint classify_positions(uvec2 positions, uvec2 keys) {
  if (positions.x >= query_limit || keys.x >= key_limit) return TILE_HIDDEN;
  uint result = positions.y <= query_limit && keys.y <= key_limit ? TILE_FULL : TILE_MIXED;
  int nearest = int(keys.x) - int(positions.y - 1);
  int farthest = int(keys.y - 1) - int(positions.x);
  if (has(FEATURE_CAUSAL)) result = min(result, classify_distance(nearest, farthest, 0));
  if (has(FEATURE_WINDOW)) {
    if (call.window_left >= 0) {
      result = min(result, classify_distance(-farthest, -nearest, call.window_left));
    }
    if (call.window_right >= 0) {
      result = min(result, classify_distance(nearest, farthest, call.window_right));
    }
  }
  return result;
}

// The same with segments and the mask of `heads` heads.
uint classify(uvec2 positions, uvec2 keys, uint heads) {
  uint result = classify_positions(positions, keys);
  if (has(FEATURE_SEGMENTS) && result != TILE_HIDDEN) {
    result = min(result, classify_segments(positions, keys));
  }
  if (has(FEATURE_MASK) && result != TILE_HIDDEN) {
    result = min(result, classify_mask(positions, keys, heads));
  }
  return result;
}
