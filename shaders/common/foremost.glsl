// Routing of long sequences: a tile looks into its foremost super-tiles only, judged as granules are
// in stage 1 (jax_aat/hierarchy.py). Of the others the mass counts. What is noted of granules has a
// place by itself then, in the order of the super-tiles that are looked into.

#define CUT_IMPORTANCE 2.0  // above all: what the boundary cuts has no mean row to fall back on

// Of the kernel: products of the super-tiles that the tile may see, given to put_super_tile.
void score_super_tiles(Tile tile);

// Keeps a product of a super-tile's mean, and of its variance where tiles look into the foremost.
void put_super_tile(uint place, float logit, float variance) {
  vec2 bent = capped(logit);
  slab.super_logits.value[place] = bent.x;
  if (FOREMOST != 0) slab.super_mass.value[place] = fma(variance, bent.y / 2.0, bent.x);
}

// What is noted of a super-tile at first; with the importance of one that the boundary cuts. Counts
// the granules that are seen.
uint super_note(Tile tile, uint super_tile, inout uint seen) {
  uint first = super_tile * SUPER_TILE_GRANULES;
  uint note = 0;
  for (uint granule = max(first, tile.first);
       granule < min(first + SUPER_TILE_GRANULES, tile.end); ++granule) {
    Boundary boundary = boundary_of(tile.number, granule);
    if (!boundary.seen) continue;
    ++seen;
    note |= boundary.super_whole ? MARK_SEEN : with_importance(MARK_SEEN, CUT_IMPORTANCE);
  }
  return note;
}

// Notes super-tiles and weighs them into sub_log_sum. Returns how many are seen, and how many granules.
uvec2 weigh_super_tiles(Tile tile, uint first, uint end) {
  uvec2 seen = uvec2(0);
  LogSum total[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) total[sub] = LogSum(-INFINITY, 0.0);
  for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) {
    uint note = super_note(tile, i, seen.y);
    set_note(i, note);
    slab.is_looked_into.value[i] = 0;
    if (!is_seen(note)) continue;
    ++seen.x;
    float count = log_count(i * SUPER_TILE_ROWS, SUPER_TILE_ROWS);
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      float mass = slab.super_mass.value[i * SUBS + sub] + count;
      slab.super_mass.value[i * SUBS + sub] = mass;
      add_term(total[sub], mass);
    }
  }
  join_log_sums(total);
  return uvec2(count_all(seen.x), count_all(seen.y));
}

// Chooses the super-tiles that the tile looks into, and leaves the mass of the others in sub_outside.
// Returns how many granules the tile sees, in all super-tiles.
uint look_into_foremost(inout Tile tile) {
  uint first = tile.first / SUPER_TILE_GRANULES;
  uint end = divide_up(tile.end, SUPER_TILE_GRANULES);
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) sub_outside[sub] = -INFINITY;
  barrier();
  uvec2 seen = weigh_super_tiles(tile, first, end);
  for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) {
    uint note = note_of(i);
    if (note != MARK_SEEN) continue;
    float importance = 0.0;
    for (uint sub = 0; sub < SUBS; ++sub) {
      float share = exp_of(slab.super_mass.value[i * SUBS + sub] - shift_of(sub_log_sum[sub]));
      importance = fma(share * share, sub_weight[sub], importance);
    }
    set_note(i, with_importance(note, importance));
  }
  sync_slab();
  uint n = min(PARAMS.judged_super_tiles, seen.x);
  choose(first, end, n, slab.looked_into);
  sync_slab();
  LogSum outside[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) outside[sub] = LogSum(-INFINITY, 0.0);
  for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) {
    uint note = note_of(i);
    if (is_chosen(note)) slab.is_looked_into.value[i] = 1;
    if (is_chosen(note) || !is_seen(note)) continue;
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      add_term(outside[sub], slab.super_mass.value[i * SUBS + sub]);
    }
  }
  join_log_sums(outside);
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) {
    sub_outside[sub] = sub_log_sum[sub];
  }
  sync_slab();
  tile.first_place = 0;
  tile.end_place = n * SUPER_TILE_GRANULES;
  return seen.y;
}

// Prices of the granules that the tile does not look into or does not see: none is worth a row of its
// own. Where `kept`, those that it sees are among the granules that stay exact.
void price_others(Tile tile, uvec2 prices, bool kept) {
  for (uint granule = gl_LocalInvocationID.x; granule < granule_count(); granule += THREADS) {
    uint price = 0;
    if (granule >= tile.first && granule < tile.end) {
      if (FOREMOST == 0) continue;
      if (slab.is_looked_into.value[granule / SUPER_TILE_GRANULES] != 0) continue;
      Boundary boundary = boundary_of(tile.number, granule);
      uint exact = !boundary.whole ? PRICE_INFINITE : kept ? PRICE_KEPT : 0;
      uint mean = LEVELS > 1 && !(LEVELS > 2 && boundary.super_whole) ? PRICE_INFINITE : 0;
      if (boundary.seen) price = exact << 16 | mean;
    }
    Words(prices).word[granule] = price;
  }
}
