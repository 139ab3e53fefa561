// Prices of granules, a row for each query tile: in the upper half of a word that up to which a granule
// is exact, in the lower half that up to which it has a row of its own, both upper halves of float32.
// A row has them of all granules, or, where a tile looks into its foremost key tiles only and nobody
// else wants them, of the granules in these: first the key tiles, ascending, NO_KEY_TILE after the
// last one, then a word for each of their granules, then what the others need no prices for.
#include "common/levels.glsl"

#define PRICE_INFINITE 0x7f80u
#define PRICE_KEPT 0x6f00u  // 2^95: no error reaches it
#define NO_KEY_TILE 0xffffffffu

// Words past the prices of such a row: granules elsewhere that are exact at any price, those of the
// others that are read at any price, those that are not; and whether these two are kept.
#define OTHERS_EXACT 0
#define OTHERS_READ 1
#define OTHERS_REST 2
#define OTHERS_KEPT 3
#define OTHERS_WORDS 4

bool has_all_prices() { return PARAMS.priced_key_tiles == 0; }
uint first_price() { return PARAMS.priced_key_tiles; }
uint price_count() {
  return has_all_prices() ? granule_count() : PARAMS.priced_key_tiles * KEY_TILE_GRANULES;
}
uint others_place(uint kind) { return first_price() + price_count() + kind; }

// Prices of a granule elsewhere, as far as the boundary does not decide.
uint price_of_other(bool kept) { return kept ? PRICE_KEPT << 16 : 0; }
