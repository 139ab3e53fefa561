// Routing of long sequences: a tile looks into its foremost key tiles only, judged as granules are in
// stage 1 (jax_aat/hierarchy.py). Of the others the mass counts. What is noted of granules has a place
// by itself then, in the order of the key tiles that are looked into.

#define EXACT_IMPORTANCE 2.0  // above all: what the boundary cuts is exact, and what is near

// Of the kernel: products of the super-tiles, or of the key tiles, that the tile may see, given to
// put_super_tile and put_key_tile.
void score_super_tiles(Tile tile);
void score_key_tiles(Tile tile);

void put_super_tile(uint super_tile, uint sub, float logit) {
  slab.super_logits.value[super_tile * SUBS + sub] = capped(logit).x;
}

void put_key_tile(uint key_tile, uint sub, float logit, float variance) {
  vec2 bent = capped(logit);
  float mass = fma(variance, bent.y / 2.0, bent.x) +
               log_count(key_tile * PLAN_KEY_ROWS, PLAN_KEY_ROWS);
  SharedFloats(uvec2(slab.key_tile_mass)).value[key_tile * (4 * SUB_QUADS) + sub] = mass;
}

// Masses of a thread's next key tiles; past the last one its masses again.
void load_key_tiles_ahead(uint first, uint end, out vec4 mass[AT_ONCE][SUB_QUADS]) {
  [[unroll]] for (uint j = 0; j < AT_ONCE; ++j) {
    uint key_tile = min(first + j * THREADS, end - 1);
    [[unroll]] for (uint i = 0; i < SUB_QUADS; ++i) {
      mass[j][i] = slab.key_tile_mass.vector[key_tile * SUB_QUADS + i];
    }
  }
}

// What is noted of a key tile at first; with the importance of one that the boundary cuts. Counts the
// granules that are seen.
uint key_tile_note(Tile tile, uint key_tile, inout uint seen) {
  uint first = max(key_tile * KEY_TILE_GRANULES, tile.first);
  uint end = min((key_tile + 1) * KEY_TILE_GRANULES, tile.end);
  if (is_all_seen(tile.bounds, tile.number, first, end)) {
    seen += end - first;
    return MARK_SEEN;
  }
  uint note = 0;
  for (uint granule = first; granule < end; ++granule) {
    Boundary boundary = boundary_of(tile.bounds, tile.number, granule);
    if (!boundary.seen) continue;
    ++seen;
    note |= boundary.whole ? MARK_SEEN : with_importance(MARK_SEEN, EXACT_IMPORTANCE);
  }
  return note;
}

// Whether a key tile has a granule that is seen and lies so near.
bool holds_near(Tile tile, uint key_tile, uint near) {
  uint first = max(max(key_tile * KEY_TILE_GRANULES, tile.first), near);
  uint end = min((key_tile + 1) * KEY_TILE_GRANULES, tile.end);
  for (uint granule = first; granule < end; ++granule) {
    if (boundary_of(tile.bounds, tile.number, granule).seen) return true;
  }
  return false;
}

// Notes key tiles and weighs them into sub_log_sum. Returns how many are seen, and how many granules.
uvec2 weigh_key_tiles(Tile tile, uint first, uint end) {
  uvec2 seen = uvec2(0);
  LogSum total[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) total[sub] = LogSum(-INFINITY, 0.0);
  for (uint next = first + gl_LocalInvocationID.x; next < end; next += THREADS * AT_ONCE) {
    vec4 mass[AT_ONCE][SUB_QUADS];
    load_key_tiles_ahead(next, end, mass);
    [[unroll]] for (uint j = 0; j < AT_ONCE; ++j) {
      uint i = next + j * THREADS;
      if (i >= end) break;
      uint note = key_tile_note(tile, i, seen.y);
      set_note(i, note);
      slab.is_looked_into.value[i] = 0;
      if (!is_seen(note)) continue;
      ++seen.x;
      [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
        add_term(total[sub], mass[j][sub / 4][sub % 4]);
      }
    }
  }
  join_log_sums(total);
  return uvec2(count_all(seen.x), count_all(seen.y));
}

// Chooses the key tiles that the tile looks into, and leaves the mass of the others in sub_outside.
// Returns how many granules the tile sees, in all key tiles.
uint look_into_foremost(inout Tile tile) {
  uint first = tile.first / KEY_TILE_GRANULES;
  uint end = divide_up(tile.end, KEY_TILE_GRANULES);
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) sub_outside[sub] = -INFINITY;
  barrier();
  uvec2 seen = weigh_key_tiles(tile, first, end);
  uint near = near_from(tile, seen.y);
  for (uint next = first + gl_LocalInvocationID.x; next < end; next += THREADS * AT_ONCE) {
    vec4 mass[AT_ONCE][SUB_QUADS];
    load_key_tiles_ahead(next, end, mass);
    [[unroll]] for (uint j = 0; j < AT_ONCE; ++j) {
      uint i = next + j * THREADS;
      if (i >= end) break;
      uint note = note_of(i);
      if (note != MARK_SEEN) continue;
      bool exact = holds_near(tile, i, near);
      set_note(i, with_importance(note, exact ? EXACT_IMPORTANCE : importance_of(mass[j])));
    }
  }
  sync_slab();
  uint n = min(PARAMS.judged_key_tiles, seen.x);
  choose(first, end, n, slab.looked_into);
  sync_slab();
  LogSum outside[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) outside[sub] = LogSum(-INFINITY, 0.0);
  for (uint next = first + gl_LocalInvocationID.x; next < end; next += THREADS * AT_ONCE) {
    vec4 mass[AT_ONCE][SUB_QUADS];
    load_key_tiles_ahead(next, end, mass);
    [[unroll]] for (uint j = 0; j < AT_ONCE; ++j) {
      uint i = next + j * THREADS;
      if (i >= end) break;
      uint note = note_of(i);
      if (is_chosen(note)) slab.is_looked_into.value[i] = 1;
      if (is_chosen(note) || !is_seen(note)) continue;
      [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
        add_term(outside[sub], mass[j][sub / 4][sub % 4]);
      }
    }
  }
  if (SHARED_NOTES != 1) {
    for (uint i = gl_LocalInvocationID.x; i < n; i += THREADS) {
      shared_looked_into[i] = slab.looked_into.value[i];
    }
  }
  join_log_sums(outside);
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) {
    sub_outside[sub] = sub_log_sum[sub];
  }
  sync_slab();
  tile.first_place = 0;
  tile.end_place = n * KEY_TILE_GRANULES;
  return seen.y;
}

// The prices of a granule that the tile does not look into: it is not worth a row of its own. Where
// `kept`, it is among the granules that stay exact.
uint bounded_price_of_other(Boundary boundary, bool kept) {
  uint exact = boundary.whole ? price_of_other(kept) : PRICE_INFINITE << 16;
  uint mean = LEVELS > 1 && !(LEVELS > 2 && boundary.super_whole) ? PRICE_INFINITE : 0;
  return boundary.seen ? exact | mean : 0;
}

// Writes the prices of all granules that the tile does not see, or does not look into.
void write_others(Tile tile, uvec2 prices, bool kept) {
  if (FOREMOST == 0) {
    for (uint granule = gl_LocalInvocationID.x; granule < granule_count(); granule += THREADS) {
      if (granule < tile.first || granule >= tile.end) Words(prices).word[granule] = 0;
    }
    return;
  }
  uint seen_first = tile.first / KEY_TILE_GRANULES;
  uint seen_end = divide_up(tile.end, KEY_TILE_GRANULES);
  for (uint i = gl_LocalInvocationID.x; i < key_tile_count(); i += THREADS) {
    bool may_see = i >= seen_first && i < seen_end;
    bool looks = may_see && slab.is_looked_into.value[i] != 0;
    uint first = i * KEY_TILE_GRANULES;
    Boundary boundary = boundary_of(tile.bounds, tile.number, first);
    bool alike = !may_see || is_all_seen(tile.bounds, tile.number, first, first + KEY_TILE_GRANULES);
    for (uint j = 0; j < KEY_TILE_GRANULES; ++j) {
      uint granule = first + j;
      if (granule >= granule_count()) break;
      bool within = granule >= tile.first && granule < tile.end;
      if (looks && within) continue;
      if (!alike) boundary = boundary_of(tile.bounds, tile.number, granule);
      Words(prices).word[granule] = within ? bounded_price_of_other(boundary, kept) : 0;
    }
  }
}

// Writes which key tiles the row has prices of, nothing for those it has room for besides, and how
// many granules there are elsewhere.
void count_others(Tile tile, uvec2 prices, bool kept) {
  uint priced = tile.end_place / KEY_TILE_GRANULES;
  for (uint i = gl_LocalInvocationID.x; i < PARAMS.priced_key_tiles; i += THREADS) {
    Words(prices).word[i] = i < priced ? looked_into(i) : NO_KEY_TILE;
  }
  for (uint i = tile.end_place + gl_LocalInvocationID.x; i < price_count(); i += THREADS) {
    Words(prices).word[first_price() + i] = 0;
  }
  uvec3 own = uvec3(0);
  uint end = divide_up(tile.end, KEY_TILE_GRANULES);
  for (uint i = tile.first / KEY_TILE_GRANULES + gl_LocalInvocationID.x; i < end; i += THREADS) {
    if (slab.is_looked_into.value[i] != 0) continue;
    uint first = max(i * KEY_TILE_GRANULES, tile.first);
    uint last = min((i + 1) * KEY_TILE_GRANULES, tile.end) - 1;
    bool alike = is_all_seen(tile.bounds, tile.number, first, last + 1);
    uint each = alike ? last + 1 - first : 1;
    for (uint granule = first; granule <= last; granule += each) {
      Boundary boundary = boundary_of(tile.bounds, tile.number, granule);
      if (!boundary.seen) continue;
      uint price = bounded_price_of_other(boundary, false);
      bool exact = price >> 16 != 0, read = (price & 0xffffu) != 0;
      own += exact ? uvec3(each, 0, 0) : read ? uvec3(0, each, 0) : uvec3(0, 0, each);
    }
  }
  uvec3 total = uvec3(count_all(own.x), count_all(own.y), count_all(own.z));
  if (gl_LocalInvocationID.x != 0) return;
  Words(prices).word[others_place(OTHERS_EXACT)] = total.x;
  Words(prices).word[others_place(OTHERS_READ)] = total.y;
  Words(prices).word[others_place(OTHERS_REST)] = total.z;
  Words(prices).word[others_place(OTHERS_KEPT)] = kept ? 1 : 0;
}

// What the row of prices says of the granules that the tile does not look into; `kept`: they stay exact
// at any price that errors explain.
void price_others(Tile tile, uvec2 prices, bool kept) {
  if (has_all_prices()) {
    write_others(tile, prices, kept);
  } else {
    count_others(tile, prices, kept);
  }
}
