#include "attention/query_parts.h"

#include <algorithm>

#include "attention/kernels.h"
#include "attention/plan_builder.h"

namespace jax_aat {
namespace {

// Rows of a chunk of heads up to which its lists are shared, so that records stay small beside the
// keys and values of a batch entry.
constexpr std::uint64_t kFewRows = 32;
// Of a chunk, tiles times parts: with two chunks a large GPU runs about as many at once.
constexpr std::uint64_t kMostWorkgroups = 128;
constexpr std::uint64_t kLeastKeys = 256;  // of a part
constexpr std::uint64_t kLeastParts = 4;   // fewer are not worth a second kernel

}  // namespace

std::uint32_t QueryListParts(const AttentionProblem& problem, std::uint32_t tile_rows) {
  // Records have no room for the counts of rows, which tests ask for.
  if (problem.features & FEATURE_ROW_COUNTS) return 1;
  const AttentionParams& params = problem.params;
  const std::uint64_t rows = std::uint64_t{params.queries} * TileHeads(params);
  if (rows > kFewRows) return 1;
  const std::uint64_t tiles = DivideUp(rows, tile_rows);
  const std::uint64_t parts =
      std::min(kMostWorkgroups / tiles, KeysOfTile(problem, tile_rows) / kLeastKeys);
  return parts < kLeastParts ? 1 : static_cast<std::uint32_t>(parts);
}

std::uint64_t RecordBytes(const AttentionProblem& problem, std::uint32_t parts) {
  const AttentionParams& params = problem.params;
  const std::uint64_t quads = DivideUp(params.head_dim, 4) + 1;
  return std::uint64_t{params.batch_count} * params.query_heads * params.queries * parts * quads *
         16;
}

}  // namespace jax_aat
