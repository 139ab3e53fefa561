// What tile_processor.comp tells cross_tile_router.comp of the keys and values of one batch entry and
// key/value head. Places are counted in vec4 (csrc/attention/tile_planner.cc: SummaryFloats).
#include "common/levels.glsl"

// A kernel may define that summaries of keys are kept in halves, see below.
#ifndef KEYS_IN_HALVES
#define KEYS_IN_HALVES false
#endif

const uint QUADS = (HEAD_DIM + 3) / 4;  // columns past HEAD_DIM are zero
const uint PARTS = 4;  // of a granule, each of PART_ROWS keys
const uint PART_ROWS = GRANULE_ROWS / PARTS;

layout(buffer_reference, std430, buffer_reference_align = 16) buffer Vectors { vec4 vector[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer ConstantVectors {
  vec4 vector[];
};
// What others read than have written it; a kernel may define SHARED_IN_WORKGROUP: those of the same
// workgroup alone.
#ifdef SHARED_IN_WORKGROUP
#define SHARED_BY workgroupcoherent
#else
#define SHARED_BY coherent
#endif
layout(buffer_reference, std430, buffer_reference_align = 16) SHARED_BY buffer SharedVectors {
  vec4 vector[];
};
layout(buffer_reference, std430, buffer_reference_align = 8) SHARED_BY buffer SharedPairs {
  uvec2 pair[];
};

uint super_tile_count() { return divide_up(PARAMS.keys, SUPER_TILE_ROWS); }

// Granules with those past the end of the last super-tile.
uint padded_granules() { return super_tile_count() * SUPER_TILE_GRANULES; }

// Vectors of the mean and variance of a granule's keys, and of those of its parts, which stage 2 takes.
uint key_vectors() {
  return QUADS * (KEYS_IN_HALVES ? 1 : 2) * (PARAMS.candidate_share > 0.0 ? 1 + PARTS : 1);
}

// Mean and variance of a granule's keys: neighbouring granules lie side by side.
uint granule_place(uint granule, uint quad) {
  return ((granule / SUPER_TILE_GRANULES * QUADS + quad) * SUPER_TILE_GRANULES +
          granule % SUPER_TILE_GRANULES) *
         2;
}

// Means of its parts, then their variances.
uint part_place(uint granule, uint quad) {
  return padded_granules() * QUADS * (KEYS_IN_HALVES ? 1 : 2) +
         (granule * QUADS + quad) * (2 * PARTS);
}

// Mean of its values.
uint value_mean_place(uint granule, uint quad) {
  return padded_granules() * key_vectors() + granule * QUADS + quad;
}

// Mean squared distance of its values from their mean; squared distance of that from the
// super-tile's; mean squared value.
uint value_place(uint granule) {
  return padded_granules() * (key_vectors() + QUADS) + granule;
}

// Mean of a super-tile's keys.
uint super_place(uint super_tile, uint quad) {
  return padded_granules() * (key_vectors() + QUADS + 1) + super_tile * QUADS + quad;
}

// Sum of the squares of a super-tile's values.
uint value_total_place(uint super_tile) {
  return super_place(super_tile_count(), 0) + 15 * QUADS + super_tile;
}

// Mean and variance of a key tile's keys; key tiles fill the last super-tile, too.
uint key_tile_place(uint key_tile, uint quad) {
  return value_total_place(super_tile_count()) + (key_tile * QUADS + quad) * 2;
}

// For cooperative matrices keys are kept in halves instead, by rows: the mean, then the variance, of a
// granule, a part, a super-tile (the mean alone) or a key tile. A row takes QUADS vectors; 16 can be
// read from any super-tile or key tile on.
uint granule_row_place(uint granule) { return granule * QUADS; }
uint part_row_place(uint granule, uint part) {
  return part_place(0, 0) + (granule * PARTS + part) * QUADS;
}
uint super_row_place(uint super_tile) { return super_place(0, 0) + super_tile * QUADS; }
uint key_tile_row_place(uint key_tile) { return key_tile_place(0, 0) + key_tile * QUADS; }

// What variances are divided by and mean squares of queries multiplied with, so that halves hold both.
const float VARIANCE_SCALE = 32.0;

uvec2 to_halves(vec4 x) {
  x = clamp(x, vec4(-65504.0), vec4(65504.0));
  return uvec2(to_half_bits(x.x) | to_half_bits(x.y) << 16,
               to_half_bits(x.z) | to_half_bits(x.w) << 16);
}

vec4 from_halves(uvec2 x) { return vec4(unpackHalf2x16(x.x), unpackHalf2x16(x.y)); }

// Keys from `first` on, of so many, that exist.
uint rows_from(uint first, uint rows) { return min(rows, max(key_limit, first) - first); }
