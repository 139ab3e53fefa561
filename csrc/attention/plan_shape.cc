#include "attention/plan_shape.h"

#include <bit>
#include <stdexcept>
#include <string>

#include "attention/kernels.h"

namespace jax_aat {
namespace {

// As in shaders/common/levels.glsl and key_list.glsl.
constexpr std::uint32_t kGranuleRows = 16;
constexpr std::uint32_t kLevelGranules = 16;  // of a word
// A super-tile starts a word of levels and a key tile, and has at most so many threads in a
// workgroup.
constexpr std::uint32_t kLeastSuperTile = 256, kLargestSuperTile = 1024;
constexpr std::uint32_t kKeyTileRows = 128;
constexpr std::uint32_t kMaxCoarseRows = (1u << 20) - 1;

constexpr std::uint32_t DivideUp(std::uint32_t value, std::uint32_t divisor) {
  return value / divisor + (value % divisor != 0);
}

}  // namespace

void SetPlanShape(AttentionParams& params, std::uint32_t query_tile, std::uint32_t super_tile,
                  std::uint32_t list_capacity, std::uint32_t key_list_capacity) {
  if (query_tile < kGranuleRows || !std::has_single_bit(query_tile)) {
    throw std::invalid_argument(
        "a query tile of a plan must have a power of two of rows, at least 16; got " +
        std::to_string(query_tile));
  }
  if (super_tile < kLeastSuperTile || super_tile > kLargestSuperTile ||
      !std::has_single_bit(super_tile)) {
    throw std::invalid_argument("a super-tile of a plan must have 256, 512 or 1024 keys; got " +
                                std::to_string(super_tile));
  }
  params.plan_positions = query_tile / TileHeads(params);
  params.plan_tiles = DivideUp(params.queries, params.plan_positions);
  params.super_tile_granules = super_tile / kGranuleRows;
  params.coarse_rows = Granules(params) + DivideUp(params.keys, super_tile);
  if (params.coarse_rows > kMaxCoarseRows) {
    throw std::invalid_argument("a plan serves up to 16 million keys; got " +
                                std::to_string(params.keys) + ": split the sequence");
  }
  params.list_capacity = list_capacity;
  params.key_list_capacity = key_list_capacity;
}

std::uint32_t Granules(const AttentionParams& params) {
  return DivideUp(params.keys, kGranuleRows);
}

std::uint32_t LevelWords(const AttentionParams& params) {
  return DivideUp(Granules(params), kLevelGranules);
}

std::uint32_t KeyTiles(const AttentionParams& params) {
  return DivideUp(params.keys, kKeyTileRows);
}

std::uint32_t KeyListTiles(const AttentionParams& params) {
  return KeyTiles(params) + DivideUp(params.coarse_rows, kKeyTileRows);
}

CoarseListParts CoarseListPartsOf(const AttentionParams& params) {
  constexpr std::uint64_t kWantedTiles = 512, kLeastTilesOfPart = 8, kTilesOfSuperPart = 32;
  constexpr std::uint32_t kMostParts = 16, kMostSuperParts = 32;
  const std::uint64_t tiles = std::uint64_t{DivideUp(params.coarse_rows, kKeyTileRows)} *
                              params.kv_heads * params.batch_count;
  const std::uint64_t listed =
      std::uint64_t{params.plan_tiles} * (params.query_heads / params.kv_heads / TileHeads(params));
  std::uint32_t parts = 1;
  while (parts < kMostParts && parts * tiles < kWantedTiles &&
         listed >= 2 * parts * kLeastTilesOfPart) {
    parts *= 2;
  }
  std::uint32_t super_parts = parts;
  while (super_parts < kMostSuperParts && listed >= 2 * super_parts * kTilesOfSuperPart) {
    super_parts *= 2;
  }
  return {parts, super_parts};
}

std::uint32_t PlainCoarseTiles(const AttentionParams& params, std::uint32_t tile_rows) {
  return Granules(params) / kKeyTileRows * kKeyTileRows / tile_rows;
}

std::uint64_t CoarseSumRows(const AttentionParams& params) {
  const CoarseListParts parts = CoarseListPartsOf(params);
  const std::uint64_t plain = std::uint64_t{PlainCoarseTiles(params, kKeyTileRows)} * kKeyTileRows;
  return plain * parts.of_means + (params.coarse_rows - plain) * parts.of_super_means;
}

std::uint32_t PlanTileRows(const AttentionParams& params) {
  return params.plan_positions * TileHeads(params);
}

}  // namespace jax_aat
