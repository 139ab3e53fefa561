// The sizes of a plan, which follow from those of the call and the rows of its query tiles.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace jax_aat {

// Sets what `params` tells of a plan. Throws std::invalid_argument, in words for the user.
void SetPlanShape(AttentionParams& params, std::uint32_t query_tile, std::uint32_t super_tile,
                  std::uint32_t list_capacity, std::uint32_t key_list_capacity);

// Granules along the keys.
std::uint32_t Granules(const AttentionParams& params);

// Tiles of keys along them, of which each has a transposed list.
std::uint32_t KeyTiles(const AttentionParams& params);

// Words of the levels map of one query tile.
std::uint32_t LevelWords(const AttentionParams& params);

// Transposed lists of a key/value head: of tiles of keys, then of tiles of coarse rows.
std::uint32_t KeyListTiles(const AttentionParams& params);

// Workgroups that share the transposed list of a tile of coarse rows, where a call makes these
// (shaders/common/key_parts.glsl): so many of means that a GPU is full, so many of super-means that
// none has much more to do than others. Powers of two.
struct CoarseListParts {
  std::uint32_t of_means;        // of granules alone
  std::uint32_t of_super_means;  // among them, which nearly all queries see; not fewer
};
CoarseListParts CoarseListPartsOf(const AttentionParams& params);

// Tiles of coarse rows with means of granules alone, of so many rows each.
std::uint32_t PlainCoarseTiles(const AttentionParams& params, std::uint32_t tile_rows);

// Coarse rows, counted as often as parts have sums of them.
std::uint64_t CoarseSumRows(const AttentionParams& params);

// Rows of a query tile.
std::uint32_t PlanTileRows(const AttentionParams& params);

}  // namespace jax_aat
