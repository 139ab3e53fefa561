#include "attention/list_parts.h"

#include <algorithm>

#include "attention/kernels.h"

namespace jax_aat {
namespace {

// Of tiles times parts of a head, about what one GPU runs at once.
constexpr std::uint64_t kMostWorkgroups = 128;
// Keys of a part at least; fewer parts than these are not worth a second kernel.
constexpr std::uint64_t kLeastKeys = 256;
constexpr std::uint64_t kLeastParts = 4;

}  // namespace

std::uint64_t WindowSpan(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  const bool has_window = problem.features & FEATURE_WINDOW;
  const std::uint64_t left = has_window && params.window_left >= 0
                                 ? static_cast<std::uint64_t>(params.window_left)
                                 : params.queries;
  const std::uint64_t right = problem.features & FEATURE_CAUSAL ? 0
                              : has_window && params.window_right >= 0
                                  ? static_cast<std::uint64_t>(params.window_right)
                                  : params.keys;
  return left + right;
}

std::uint64_t KeysOfTile(const AttentionProblem& problem, std::uint32_t tile_rows) {
  return std::min<std::uint64_t>(problem.params.keys, tile_rows + WindowSpan(problem));
}

std::uint32_t QueryListParts(const AttentionProblem& problem, std::uint32_t tile_rows) {
  // Kernels count rows in one place only.
  if (problem.pass != Pass::kForward || problem.features & FEATURE_ROW_COUNTS) return 1;
  const AttentionParams& params = problem.params;
  const std::uint64_t rows = std::uint64_t{params.queries} * TileHeads(params);
  if (rows > kFewRows) return 1;
  const std::uint64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const std::uint64_t parts =
      std::min(kMostWorkgroups / tiles, KeysOfTile(problem, tile_rows) / kLeastKeys);
  return parts < kLeastParts ? 1 : static_cast<std::uint32_t>(parts);
}

std::uint64_t RecordBytes(const AttentionProblem& problem, std::uint32_t parts) {
  const AttentionParams& params = problem.params;
  const std::uint64_t quads = (params.head_dim + 3) / 4 + 1;
  return std::uint64_t{params.batch_count} * params.query_heads * params.queries * parts * quads *
         16;
}

}  // namespace jax_aat
