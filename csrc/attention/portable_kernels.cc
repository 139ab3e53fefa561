// Shapes of the portable kernels (shaders/common/products.glsl says what they mean).
#include <algorithm>
#include <array>
#include <optional>

#include "attention/kernels.h"
#include "attention/plan_shape.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kColumnThreads = 8;  // COLUMN_THREADS of products.glsl
constexpr std::uint32_t kMaxSlices = 4;      // as written out in shaders/common/query_kernel.glsl
constexpr std::uint32_t kThreadSums = 128;   // float32 sums that a thread keeps

struct KernelTraits {
  const char* shader;
  std::uint32_t tile_planes;   // TILE_PLANES
  std::uint32_t score_planes;  // SCORE_PLANES
  std::uint32_t sums;          // results accumulated over blocks, each head_dim wide
  std::uint32_t row_floats;    // kept in shared memory for a row of the tile
  std::uint32_t block_floats;  // and for a row of the block
};

KernelTraits TraitsOf(Kernel kernel) {
  switch (kernel) {
    case Kernel::kForward:
      return {"attend_forward", 1, 1, 1, 1, 2};
    case Kernel::kTangent:
      return {"attend_tangent", 2, 2, 1, 1, 2};
    case Kernel::kBackwardDq:
      return {"attend_backward_dq", 2, 2, 1, 0, 2};
    case Kernel::kBackwardDqStored:
      break;  // on cooperative matrices only
    case Kernel::kBackwardDkv:
      return {"attend_backward_dkv", 2, 2, 2, 0, 4};
    case Kernel::kBackwardDbias:
      return {"attend_backward_dbias", 1, 3, 0, 0, 2};
  }
  return {};
}

// What the kernel declares, rounded up.
std::uint32_t SharedBytes(const KernelShape& shape, const KernelTraits& traits,
                          std::uint32_t slices) {
  const std::uint32_t slice_quads = shape.slice_columns / 4 + 1;
  const std::uint32_t score_quads = shape.block_rows / 4 + 1;
  const std::uint32_t tile_planes = slices > 1 ? 1 : traits.tile_planes;
  return 16 * (tile_planes * shape.tile_rows + shape.block_rows) * slice_quads +
         16 * traits.score_planes * shape.tile_rows * score_quads +
         4 * (traits.row_floats * shape.tile_rows + traits.block_floats * shape.block_rows) + 16;
}

// Processors load lane by lane: there, more rows a thread and tiles that stay in shared memory pay
// (lavapipe: forward 1.3 times as fast with 8 rows as with 4). On GPUs 4 rows and narrow slices
// did, which leave shared memory for more workgroups (H200, head_dim 64: forward 16.9 TFLOP/s, 9.5
// with 8 rows and one slice).
bool LoadsByLane(const DeviceTraits& traits) { return traits.max_subgroup_size <= kColumnThreads; }

// Rows of the tile that a thread takes: 8; or 4, and of small tiles fewer, so that a workgroup has
// 64 threads at least. Other numbers where registers or the device do not allow these.
enum class ThreadRows { kMany, kFew };

std::uint32_t RowsAThread(ThreadRows wanted, std::uint32_t tile_rows, std::uint32_t sum_columns,
                          const DeviceTraits& traits) {
  std::uint32_t rows = wanted == ThreadRows::kMany ? 8 : std::min(4u, tile_rows / kColumnThreads);
  while (rows > 1 && rows * sum_columns > kThreadSums * kColumnThreads) rows /= 2;
  while (rows < 8 && tile_rows / rows * kColumnThreads > traits.max_workgroup_invocations) {
    rows *= 2;
  }
  return rows;
}

// Widths of a slice, the best first.
std::array<std::uint32_t, 3> SliceWidths(const DeviceTraits& traits) {
  if (LoadsByLane(traits)) return {128, 64, 32};
  return {32, 64, 128};
}

// What shapes of a kernel must fit.
class Fitting {
 public:
  Fitting(Kernel kernel, const AttentionProblem& problem, const DeviceTraits& traits)
      : traits_(traits), kernel_(TraitsOf(kernel)), head_dim_(problem.params.head_dim) {
    const AttentionParams& params = problem.params;
    const bool owns_keys = kernel == Kernel::kBackwardDkv;
    rows_there_are_ = owns_keys ? params.keys : params.queries;
    if (!owns_keys && kernel != Kernel::kBackwardDbias) rows_there_are_ *= TileHeads(params);
    if (problem.features & FEATURE_PLAN) {
      (owns_keys ? max_block_rows_ : max_tile_rows_) = PlanTileRows(params);
    }
  }

  // The largest tile, then the largest block, of at most so many rows that fits.
  std::optional<KernelShape> Largest(std::uint32_t slice_columns, ThreadRows thread_rows,
                                     std::uint32_t most_tile_rows = 64,
                                     std::uint32_t most_block_rows = 32) const {
    const std::uint32_t slices = (head_dim_ + slice_columns - 1) / slice_columns;
    if (slices > kMaxSlices) return std::nullopt;
    if (slice_columns > 32 && head_dim_ <= slice_columns / 2) return std::nullopt;
    for (const std::uint32_t tile_rows : {64u, 32u, 16u}) {
      if (tile_rows > std::min(most_tile_rows, max_tile_rows_)) continue;
      if (tile_rows > 16 && rows_there_are_ <= tile_rows / 2) continue;
      for (const std::uint32_t block_rows : {32u, 16u}) {
        if (block_rows > std::min(most_block_rows, max_block_rows_)) continue;
        KernelShape shape = {kernel_.shader, 0, tile_rows, block_rows};
        shape.slice_columns = slice_columns;
        shape.thread_rows =
            RowsAThread(thread_rows, tile_rows, kernel_.sums * slices * slice_columns, traits_);
        shape.threads = tile_rows / shape.thread_rows * kColumnThreads;
        if (SharedBytes(shape, kernel_, slices) <= traits_.max_shared_memory &&
            shape.threads <= traits_.max_workgroup_invocations) {
          return shape;
        }
      }
    }
    return std::nullopt;
  }

 private:
  const DeviceTraits& traits_;
  const KernelTraits kernel_;
  const std::uint32_t head_dim_;
  std::uint64_t rows_there_are_ = 0;
  std::uint32_t max_tile_rows_ = UINT32_MAX;
  std::uint32_t max_block_rows_ = UINT32_MAX;
};

}  // namespace

std::uint32_t TileHeads(const AttentionParams& params) {
  const std::uint32_t group = params.query_heads / params.kv_heads;
  return std::min(group & (~group + 1), 16u);
}

KernelShapes PortableShapes(Kernel kernel, const AttentionProblem& problem,
                            const DeviceTraits& traits) {
  const Fitting fitting(kernel, problem, traits);
  const ThreadRows usual = LoadsByLane(traits) ? ThreadRows::kMany : ThreadRows::kFew;
  const ThreadRows other = LoadsByLane(traits) ? ThreadRows::kFew : ThreadRows::kMany;
  KernelShapes shapes;
  const auto add = [&](const std::optional<KernelShape>& shape) {
    if (shape && std::ranges::find(shapes, NumbersOf(*shape), NumbersOf) == shapes.end())
      shapes.push_back(*shape);
  };
  for (const std::uint32_t columns : SliceWidths(traits)) add(fitting.Largest(columns, usual));
  if (shapes.empty()) return shapes;
  // Of what else could be better than the first, each by itself.
  const KernelShape first = shapes.front();
  add(fitting.Largest(first.slice_columns, other));
  add(fitting.Largest(first.slice_columns, usual, first.tile_rows / 2));
  add(fitting.Largest(first.slice_columns, usual, first.tile_rows, first.block_rows / 2));
  return shapes;
}

}  // namespace jax_aat
