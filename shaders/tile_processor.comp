#version 460
// Summarises keys and values for the router, in one pass over them: a workgroup takes a super-tile of
// one key/value head. A thread keeps to one quad of columns of every so many granules.
layout(constant_id = 13) const uint HALVES = 0;  // keys are summarised for cooperative matrices
#define KEYS_IN_HALVES (HALVES != 0)
#include "common/moments.glsl"

shared vec2 row_sums[THREADS];
shared vec4 super_values[QUADS];
shared vec3 granule_values[SUPER_TILE_GRANULES];

// Sums over the threads of a granule, given to the first of them.
vec2 sum_row(vec2 own, uint quad) {
  barrier();
  row_sums[gl_LocalInvocationID.x] = own;
  barrier();
  vec2 sum = vec2(0);
  if (quad == 0) {
    for (uint i = 0; i < QUADS; ++i) sum += row_sums[gl_LocalInvocationID.x + i];
  }
  return sum;
}

void store_row(SharedVectors summaries, uint place, uint quad, Moments keys) {
  SharedPairs halves = SharedPairs(uvec2(summaries));
  halves.pair[place * 2 + quad] = to_halves(keys.mean);
  halves.pair[place * 2 + QUADS + quad] = to_halves(keys.spread / VARIANCE_SCALE);
}

// Means and variances.
void store_keys(SharedVectors summaries, uint granule, uint quad, Moments all, Moments parts[PARTS]) {
  if (HALVES != 0) {
    store_row(summaries, granule_row_place(granule), quad, all);
    if (PARAMS.candidate_share == 0.0) return;
    [[unroll]] for (uint i = 0; i < PARTS; ++i) {
      store_row(summaries, part_row_place(granule, i), quad, parts[i]);
    }
    return;
  }
  summaries.vector[granule_place(granule, quad)] = all.mean;
  summaries.vector[granule_place(granule, quad) + 1] = all.spread;
  if (PARAMS.candidate_share == 0.0) return;
  [[unroll]] for (uint i = 0; i < PARTS; ++i) {
    summaries.vector[part_place(granule, quad) + i] = parts[i].mean;
    summaries.vector[part_place(granule, quad) + PARTS + i] = parts[i].spread;
  }
}

// Those of a granule, as they are stored.
Moments stored_keys(SharedVectors summaries, uint granule, uint quad) {
  if (HALVES != 0) {
    SharedPairs halves = SharedPairs(uvec2(summaries));
    uint place = granule_row_place(granule) * 2 + quad;
    return Moments(from_halves(halves.pair[place]),
                   from_halves(halves.pair[place + QUADS]) * VARIANCE_SCALE);
  }
  uint place = granule_place(granule, quad);
  return Moments(summaries.vector[place], summaries.vector[place + 1]);
}

// From those of its granules.
void store_key_tile(SharedVectors summaries, uint key_tile, uint quad) {
  float share = 1.0 / float(max(rows_from(key_tile * PLAN_KEY_ROWS, PLAN_KEY_ROWS), 1));
  Moments keys[KEY_TILE_GRANULES];
  float shares[KEY_TILE_GRANULES];
  Moments all = Moments(vec4(0), vec4(0));
  [[unroll]] for (uint i = 0; i < KEY_TILE_GRANULES; ++i) {
    uint granule = key_tile * KEY_TILE_GRANULES + i;
    keys[i] = stored_keys(summaries, granule, quad);
    shares[i] = float(rows_from(granule * GRANULE_ROWS, GRANULE_ROWS)) * share;
    all.mean += shares[i] * keys[i].mean;
  }
  [[unroll]] for (uint i = 0; i < KEY_TILE_GRANULES; ++i) {
    vec4 distance = keys[i].mean - all.mean;
    all.spread += shares[i] * fma(distance, distance, keys[i].spread);
  }
  if (HALVES != 0) {
    store_row(summaries, key_tile_row_place(key_tile), quad, all);
    return;
  }
  summaries.vector[key_tile_place(key_tile, quad)] = all.mean;
  summaries.vector[key_tile_place(key_tile, quad) + 1] = all.spread;
}

void main() {
  load_call();
  uint index = workgroup_index();
  uint super_tile = index % super_tile_count();
  uint head = index / super_tile_count() % PARAMS.kv_heads;
  uint entry = index / super_tile_count() / PARAMS.kv_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  set_visibility(0);
  View keys = view_of(OPERAND_K, head, LOG2_BYTES), values = view_of(OPERAND_V, head, LOG2_BYTES);
  SharedVectors summaries = SharedVectors(view_of(OPERAND_KEY_SUMMARIES, head, 2).base);
  uint quad = gl_LocalInvocationID.x % QUADS, place = gl_LocalInvocationID.x / QUADS;
  uint first_granule = super_tile * SUPER_TILE_GRANULES;

  vec4 key_sum = vec4(0), value_sum = vec4(0);
  for (uint base = 0; base < SUPER_TILE_GRANULES; base += GRANULES_AT_ONCE) {
    uint local = base + place, granule = first_granule + local;
    bool own = place < GRANULES_AT_ONCE && local < SUPER_TILE_GRANULES;
    vec2 squares = vec2(0);
    if (own) {
      float count = float(rows_from(granule * GRANULE_ROWS, GRANULE_ROWS));
      float share = 1.0 / max(count, 1.0);
      Moments parts[PARTS];
      Moments value = granule_moments(values, granule, quad, parts);
      squares = vec2(dot(value.spread, vec4(share)), dot(value.mean, value.mean));
      value_sum += value.mean * count;
      summaries.vector[value_mean_place(granule, quad)] = value.mean;

      Moments key = granule_moments(keys, granule, quad, parts);
      key_sum += key.mean * count;
      [[unroll]] for (uint i = 0; i < PARTS; ++i) {
        uint rows = rows_from(granule * GRANULE_ROWS + i * PART_ROWS, PART_ROWS);
        parts[i].spread /= float(max(rows, 1));
      }
      store_keys(summaries, granule, quad, Moments(key.mean, key.spread * share), parts);
    }
    vec2 sums = sum_row(squares, quad);
    if (own && quad == 0) granule_values[local] = vec3(sums.x, 0, sums.x + sums.y);
  }

  uint rows = rows_from(super_tile * SUPER_TILE_ROWS, SUPER_TILE_ROWS);
  vec4 key_mean = sum_columns(key_sum) / float(max(rows, 1));
  vec4 value_mean = sum_columns(value_sum) / float(max(rows, 1));
  if (gl_LocalInvocationID.x < QUADS) {
    super_values[quad] = value_mean;
  }
  barrier();
  if (gl_LocalInvocationID.x < QUADS) {
    if (HALVES != 0) {
      SharedPairs(uvec2(summaries)).pair[super_row_place(super_tile) * 2 + quad] =
          to_halves(key_mean);
    } else {
      summaries.vector[super_place(super_tile, quad)] = key_mean;
    }
  }
  for (uint base = 0; base < SUPER_TILE_GRANULES; base += GRANULES_AT_ONCE) {
    uint local = base + place, granule = first_granule + local;
    bool own = place < GRANULES_AT_ONCE && local < SUPER_TILE_GRANULES;
    vec2 squares = vec2(0);
    if (own) {
      // Written by this thread.
      vec4 distance = summaries.vector[value_mean_place(granule, quad)] - super_values[quad];
      squares.x = dot(distance, distance);
    }
    vec2 sums = sum_row(squares, quad);
    if (own && quad == 0) {
      granule_values[local].y = sums.x;
      summaries.vector[value_place(granule)] = vec4(granule_values[local], 0);
    }
  }
  // The workgroup's granules are stored.
  memoryBarrierBuffer();
  barrier();
  const uint key_tiles = SUPER_TILE_GRANULES / KEY_TILE_GRANULES;
  for (uint i = gl_LocalInvocationID.x; i < key_tiles * QUADS; i += THREADS) {
    store_key_tile(summaries, super_tile * key_tiles + i / QUADS, i % QUADS);
  }
  if (gl_LocalInvocationID.x == 0) {
    float total = 0;
    for (uint i = 0; i < SUPER_TILE_GRANULES; ++i) {
      uint count = rows_from((first_granule + i) * GRANULE_ROWS, GRANULE_ROWS);
      total = fma(granule_values[i].z, float(count), total);
    }
    summaries.vector[value_total_place(super_tile)] = vec4(total, 0, 0, 0);
  }
}
