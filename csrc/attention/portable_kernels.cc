// Shapes of the portable kernels (shaders/common/products.glsl says what they mean).
#include <algorithm>
#include <array>

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

std::uint32_t RowsAThread(std::uint32_t tile_rows, std::uint32_t sum_columns,
                          const DeviceTraits& traits) {
  std::uint32_t rows = LoadsByLane(traits) ? 8 : std::min(4u, tile_rows / kColumnThreads);
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

}  // namespace

std::uint32_t TileHeads(const AttentionParams& params) {
  const std::uint32_t group = params.query_heads / params.kv_heads;
  return std::min(group & (~group + 1), 16u);
}

std::optional<KernelShape> ChoosePortableKernel(Kernel kernel, const AttentionProblem& problem,
                                                const DeviceTraits& traits) {
  const KernelTraits kernel_traits = TraitsOf(kernel);
  const AttentionParams& params = problem.params;
  std::uint64_t rows_there_are = params.queries;
  if (kernel == Kernel::kBackwardDkv) {
    rows_there_are = params.keys;
  } else if (kernel != Kernel::kBackwardDbias) {
    rows_there_are *= TileHeads(params);
  }
  for (const std::uint32_t slice_columns : SliceWidths(traits)) {
    const std::uint32_t slices = (params.head_dim + slice_columns - 1) / slice_columns;
    if (slices > kMaxSlices) continue;
    if (slice_columns > 32 && params.head_dim <= slice_columns / 2) continue;
    for (const std::uint32_t tile_rows : {64u, 32u, 16u}) {
      if (tile_rows > 16 && rows_there_are <= tile_rows / 2) continue;
      if ((problem.features & FEATURE_PLAN) && kernel != Kernel::kBackwardDkv &&
          tile_rows > PlanTileRows(params)) {
        continue;
      }
      for (const std::uint32_t block_rows : {32u, 16u}) {
        if ((problem.features & FEATURE_PLAN) && kernel == Kernel::kBackwardDkv &&
            block_rows > PlanTileRows(params)) {
          continue;
        }
        KernelShape shape = {kernel_traits.shader, 0, tile_rows, block_rows};
        shape.slice_columns = slice_columns;
        shape.thread_rows =
            RowsAThread(tile_rows, kernel_traits.sums * slices * slice_columns, traits);
        shape.threads = tile_rows / shape.thread_rows * kColumnThreads;
        if (SharedBytes(shape, kernel_traits, slices) <= traits.max_shared_memory &&
            shape.threads <= traits.max_workgroup_invocations) {
          return shape;
        }
      }
    }
  }
  return std::nullopt;
}

}  // namespace jax_aat
