#version 460
// Finds the least price of a row, among upper halves of float32, at which the tiles of a batch entry
// read no more rows than they may. A granule is read by 16 rows at prices up to one and by 1 up to
// another; a histogram of both counts the rows of every price: first by 32 prices a bin, then the
// prices of the one bin in which the limit lies.
#include "common/scan.glsl"
#include "common/stage.glsl"
#include "common/prices.glsl"

#define STAGE_CLEAR 0
#define STAGE_COARSE 1
#define STAGE_FINE 2
#define STAGE_CHOOSE 3

#define BIN_PRICES 32
#define COARSE_BINS 1024
#define HISTOGRAM_WORDS (2 * (COARSE_BINS + BIN_PRICES))
const uint LARGEST_BIN = PRICE_INFINITE / BIN_PRICES;
const uint BINS = STAGE == STAGE_FINE ? BIN_PRICES : COARSE_BINS;
const uint BINS_A_THREAD = COARSE_BINS / THREADS;

// How many granules are exact, and how many are read at all.
shared uvec2 bins[COARSE_BINS];
shared uint found_bin;
shared uvec2 found_counts;

uint list_count() { return PARAMS.query_heads / TILE_HEADS; }

// Of a batch entry, and of every granule there is for each tile; at most what 32 bits hold.
uint granules_of_tiles() {
  uvec2 granules = multiply_wide(list_count() * PARAMS.plan_tiles, granule_count());
  return granules.y != 0 ? 0xffffffffu : granules.x;
}

// Whether so many granules are more rows than may be read.
bool exceeds(uvec2 granules, float spare) {
  if (!(spare >= 0.0)) return true;
  spare = min(floor(spare), 4.6e18);
  uint spare_high = uint(spare * (1.0 / 4294967296.0));
  uint spare_low = uint(spare - float(spare_high) * 4294967296.0);
  uvec2 rows = add_wide(multiply_wide(granules.x, GRANULE_ROWS - 1), uvec2(granules.y, 0));
  return rows.y > spare_high || (rows.y == spare_high && rows.x > spare_low);
}

void clear_histogram() {
  set_batch(0);
  uint index = workgroup_index() * THREADS + gl_LocalInvocationID.x;
  if (index >= PARAMS.batch_count * HISTOGRAM_WORDS) return;
  Words(view_of(OPERAND_HISTOGRAM, 0, 2).base).word[index] = 0;
}

// Leaves in `found_bin` the number of coarse bins at whose first price too many rows are read, and
// in `found_counts` what granules those from there on hold.
void find_bin(uvec2 histogram, float spare) {
  uint first = gl_LocalInvocationID.x * BINS_A_THREAD;
  uvec2 own = uvec2(0);
  for (uint bin = first; bin < first + BINS_A_THREAD; ++bin) own += Pairs(histogram).pair[bin];
  uint exact_before = scan(own.x) - own.x;
  uint exact_total = counts[THREADS - 1];
  uint read_before = scan(own.y) - own.y;
  uvec2 from_here = uvec2(exact_total, counts[THREADS - 1]) - uvec2(exact_before, read_before);
  if (gl_LocalInvocationID.x == 0) found_bin = 0;
  barrier();
  for (uint bin = first; bin < first + BINS_A_THREAD; ++bin) {
    // At a price of 0 everything is exact, also what no tile sees, which the histogram leaves out.
    uvec2 granules = bin == 0 ? uvec2(granules_of_tiles()) : from_here;
    if (bin < LARGEST_BIN && exceeds(granules, spare)) atomicAdd(found_bin, 1);
    from_here -= Pairs(histogram).pair[bin];
  }
  barrier();
  if (found_bin / BINS_A_THREAD == gl_LocalInvocationID.x) {
    from_here = uvec2(exact_total, counts[THREADS - 1]) - uvec2(exact_before, read_before);
    for (uint bin = first; bin < found_bin; ++bin) from_here -= Pairs(histogram).pair[bin];
    found_counts = from_here;
  }
  barrier();
}

// Adds so many granules, exact up to a price and read up to it, to its bin; `base`: the first price
// of the fine bins.
void count_price(uint price, uint base, uvec2 granules) {
  if (STAGE == STAGE_COARSE && (price == 0 || price >= PRICE_INFINITE)) return;
  // Below `base` the difference wraps to a large number.
  uint bin = STAGE == STAGE_COARSE ? price / BIN_PRICES : price - base;
  if (bin >= BINS) return;
  if (granules.x != 0) atomicAdd(bins[bin].x, granules.x);
  if (granules.y != 0) atomicAdd(bins[bin].y, granules.y);
}

// Counts the granules of TILE_ROWS tiles.
void count_granules(uint part, uvec2 histogram) {
  uint base = 0;
  if (STAGE == STAGE_FINE) {
    find_bin(histogram, load_float(view_of(OPERAND_SPARE_ROWS, 0, 2).base, 0));
    if (found_bin == 0) return;
    base = (found_bin - 1) * BIN_PRICES;
  }
  for (uint bin = gl_LocalInvocationID.x; bin < BINS; bin += THREADS) bins[bin] = uvec2(0);
  barrier();
  uint end = min((part + 1) * TILE_ROWS, list_count() * PARAMS.plan_tiles);
  uvec2 infinite = uvec2(0);  // counted apart, as they are many
  for (uint row = part * TILE_ROWS; row < end; ++row) {
    View prices = view_of(OPERAND_PRICES, row / PARAMS.plan_tiles, 2);
    uint start = row % PARAMS.plan_tiles * prices.row_stride;
    for (uint i = gl_LocalInvocationID.x; i < price_count(); i += THREADS) {
      uint pair = load_word(prices.base, start + first_price() + i);
      uvec2 price = uvec2(pair >> 16, max(pair >> 16, pair & 0xffffu));
      if (STAGE == STAGE_COARSE) infinite += uvec2(greaterThanEqual(price, uvec2(PRICE_INFINITE)));
      count_price(price.x, base, uvec2(1, 0));
      count_price(price.y, base, uvec2(0, 1));
    }
    if (has_all_prices() || gl_LocalInvocationID.x != 0) continue;
    uint others[OTHERS_WORDS];
    for (uint i = 0; i < OTHERS_WORDS; ++i) {
      others[i] = load_word(prices.base, start + others_place(i));
    }
    infinite += uvec2(others[OTHERS_EXACT], others[OTHERS_EXACT] + others[OTHERS_READ]);
    if (others[OTHERS_KEPT] != 0) {
      uint rest = others[OTHERS_REST];
      count_price(PRICE_KEPT, base, uvec2(others[OTHERS_READ] + rest, rest));
    }
  }
  if (STAGE == STAGE_COARSE) {
    atomicAdd(bins[LARGEST_BIN].x, infinite.x);
    atomicAdd(bins[LARGEST_BIN].y, infinite.y);
  }
  barrier();
  uint first = STAGE == STAGE_FINE ? COARSE_BINS : 0;
  for (uint bin = gl_LocalInvocationID.x; bin < BINS; bin += THREADS) {
    if (bins[bin].x != 0) atomicAdd(Words(histogram).word[2 * (first + bin)], bins[bin].x);
    if (bins[bin].y != 0) atomicAdd(Words(histogram).word[2 * (first + bin) + 1], bins[bin].y);
  }
}

void choose_price(uvec2 histogram) {
  float spare = load_float(view_of(OPERAND_SPARE_ROWS, 0, 2).base, 0);
  find_bin(histogram, spare);
  uint price = 0;
  if (found_bin > 0) {
    // At the first price of the bin before too many rows are read: at which other prices of it?
    uvec2 granules = found_counts;
    price = found_bin * BIN_PRICES;
    for (uint i = BIN_PRICES - 1; i > 0; --i) {
      granules += Pairs(histogram).pair[COARSE_BINS + i];
      if (!exceeds(granules, spare)) --price;
    }
  }
  for (uint list = gl_LocalInvocationID.x; list < list_count(); list += THREADS) {
    Words(view_of(OPERAND_LAMBDA, list, 2).base).word[0] = price << 16;
  }
}

void main() {
  if (STAGE == STAGE_CLEAR) {
    clear_histogram();
    return;
  }
  uint parts =
      STAGE == STAGE_CHOOSE ? 1 : divide_up(list_count() * PARAMS.plan_tiles, TILE_ROWS);
  uint entry = workgroup_index() / parts;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  uvec2 histogram = view_of(OPERAND_HISTOGRAM, 0, 2).base;
  if (STAGE == STAGE_CHOOSE) {
    choose_price(histogram);
  } else {
    count_granules(workgroup_index() % parts, histogram);
  }
}
