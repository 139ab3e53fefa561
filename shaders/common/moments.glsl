// Means of rows and the spread around them, by granules: a thread keeps to one quad of columns of every
// so many granules of a super-tile.
#include "common/visibility.glsl"
#include "common/summaries.glsl"

const uint GRANULES_AT_ONCE = THREADS / QUADS;

shared vec4 column_sums[THREADS];

struct Moments {
  vec4 mean;
  vec4 spread;  // sum of the squared distances from it; or their mean
};

// Of up to PART_ROWS rows from `first` on.
Moments part_moments(View view, uint first, uint quad) {
  uint count = rows_from(first, PART_ROWS);
  vec4 rows[PART_ROWS];
  [[unroll]] for (uint i = 0; i < PART_ROWS; ++i) {
    rows[i] = vec4(0);
    if (i < count) rows[i] = load_columns(view.base, row_start(view, first + i, 0), quad * 4);
  }
  Moments part;
  part.mean = ((rows[0] + rows[1]) + (rows[2] + rows[3])) / float(max(count, 1));
  part.spread = vec4(0);
  [[unroll]] for (uint i = 0; i < PART_ROWS; ++i) {
    vec4 distance = i < count ? rows[i] - part.mean : vec4(0);
    part.spread = fma(distance, distance, part.spread);
  }
  return part;
}

// Of a granule, and of each of its parts.
Moments granule_moments(View view, uint granule, uint quad, out Moments parts[PARTS]) {
  uint first = granule * GRANULE_ROWS;
  vec4 sums[PARTS];
  [[unroll]] for (uint i = 0; i < PARTS; ++i) {
    parts[i] = part_moments(view, first + i * PART_ROWS, quad);
    sums[i] = parts[i].mean * float(rows_from(first + i * PART_ROWS, PART_ROWS));
  }
  Moments all;
  all.mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) /
             float(max(rows_from(first, GRANULE_ROWS), 1));
  all.spread = vec4(0);
  [[unroll]] for (uint i = 0; i < PARTS; ++i) {
    vec4 distance = parts[i].mean - all.mean;
    float count = float(rows_from(first + i * PART_ROWS, PART_ROWS));
    all.spread += parts[i].spread + count * distance * distance;
  }
  return all;
}

// Sums over the threads of a quad of columns, given to the first of them.
vec4 sum_columns(vec4 own) {
  barrier();
  column_sums[gl_LocalInvocationID.x] = own;
  barrier();
  vec4 sum = vec4(0);
  if (gl_LocalInvocationID.x < QUADS) {
    for (uint i = 0; i < GRANULES_AT_ONCE; ++i) {
      sum += column_sums[i * QUADS + gl_LocalInvocationID.x];
    }
  }
  return sum;
}
