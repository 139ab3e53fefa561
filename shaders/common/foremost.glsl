// Routing of long sequences: a tile looks into its foremost super-tiles only, judged as granules are
// in stage 1 (jax_aat/hierarchy.py). Of the others the mass counts. What is noted of granules has a
// place by itself then, in the order of the super-tiles that are looked into.

#define CHOSEN -2.0  // instead of the importance of a super-tile
#define CUT 2.0      // likewise, above all: it has no mean row to fall back on

// Of the kernel: logits of the means of the super-tiles that the tile may see, and where tiles look
// into the foremost their mass.
void score_super_tiles(Tile tile);

// Keeps a product of a super-tile's mean, and of its variance where tiles look into the foremost.
void put_super_tile(uint place, float logit, float variance) {
  vec2 bent = capped(logit);
  slab.super_logits.value[place] = bent.x;
  if (FOREMOST != 0) slab.super_mass.value[place] = fma(variance, bent.y / 2.0, bent.x);
}

// What the boundary leaves of a super-tile: 0, or CUT, or NOT_SEEN; and how many granules are seen.
float super_boundary(Tile tile, uint super_tile, out uint seen) {
  uint first = super_tile * SUPER_TILE_GRANULES;
  bool cut = false;
  seen = 0;
  for (uint granule = max(first, tile.first);
       granule < min(first + SUPER_TILE_GRANULES, tile.end); ++granule) {
    Boundary boundary = boundary_of(tile.number, granule);
    seen += boundary.seen ? 1 : 0;
    cut = cut || (boundary.seen && !boundary.super_whole);
  }
  return seen == 0 ? NOT_SEEN : cut ? CUT : 0.0;
}

// Weighs super-tiles into sub_log_sum. Returns how many they are and how many granules are seen.
uvec2 weigh_super_tiles(Tile tile, uint end) {
  uvec2 seen = uvec2(0);
  LogSum total[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) total[sub] = LogSum(-INFINITY, 0.0);
  for (uint i = tile.first / SUPER_TILE_GRANULES + gl_LocalInvocationID.x; i < end; i += THREADS) {
    uint granules;
    float importance = super_boundary(tile, i, granules);
    seen += uvec2(granules != 0, granules);
    slab.super_importance.value[i] = importance;
    float count = max(log_count(i * SUPER_TILE_ROWS, SUPER_TILE_ROWS), 0.0);
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      float mass = granules != 0 ? slab.super_mass.value[i * SUBS + sub] + count : -INFINITY;
      slab.super_mass.value[i * SUBS + sub] = mass;
      add_term(total[sub], mass);
    }
  }
  join_log_sums(total);
  return uvec2(reduce(float(seen.x), false), reduce(float(seen.y), false));
}

// Chooses the super-tiles that the tile looks into, and leaves the mass of the others in sub_outside.
// Returns how many granules the tile sees, in all super-tiles.
uint look_into_foremost(inout Tile tile) {
  uint first = tile.first / SUPER_TILE_GRANULES;
  uint end = divide_up(tile.end, SUPER_TILE_GRANULES);
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) sub_outside[sub] = -INFINITY;
  sync_slab();
  uvec2 seen = weigh_super_tiles(tile, end);
  for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) {
    if (slab.super_importance.value[i] != 0.0) continue;
    float importance = 0.0;
    for (uint sub = 0; sub < SUBS; ++sub) {
      float share = exp_accurate(slab.super_mass.value[i * SUBS + sub] - shift_of(sub_log_sum[sub]));
      importance = fma(share * share, sub_weight[sub], importance);
    }
    slab.super_importance.value[i] = importance;
  }
  sync_slab();
  uint n = min(PARAMS.judged_super_tiles, seen.x);
  choose(slab.super_importance, first, end, n, slab.looked_into);
  sync_slab();
  for (uint i = gl_LocalInvocationID.x; i < n; i += THREADS) {
    // Fewer where an importance is NaN.
    slab.looked_into.value[i] = min(slab.looked_into.value[i], super_tile_count() - 1);
    slab.super_importance.value[slab.looked_into.value[i]] = CHOSEN;
  }
  sync_slab();
  LogSum outside[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) outside[sub] = LogSum(-INFINITY, 0.0);
  for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) {
    if (slab.super_importance.value[i] == CHOSEN) continue;
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      add_term(outside[sub], slab.super_mass.value[i * SUBS + sub]);
    }
  }
  join_log_sums(outside);
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) {
    sub_outside[sub] = sub_log_sum[sub];
  }
  barrier();
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
      if (FOREMOST == 0 || slab.super_importance.value[granule / SUPER_TILE_GRANULES] == CHOSEN) continue;
      Boundary boundary = boundary_of(tile.number, granule);
      uint exact = !boundary.whole ? PRICE_INFINITE : kept ? PRICE_KEPT : 0;
      uint mean = LEVELS > 1 && !(LEVELS > 2 && boundary.super_whole) ? PRICE_INFINITE : 0;
      if (boundary.seen) price = exact << 16 | mean;
    }
    Words(prices).word[granule] = price;
  }
}
