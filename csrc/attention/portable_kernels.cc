// Shapes of the portable kernels (shaders/common/products.glsl says what they mean).
#include <algorithm>

#include "attention/kernels.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kColumnThreads = 8;  // COLUMN_THREADS of products.glsl
constexpr std::uint32_t kMaxSlices = 4;      // as written out in shaders/common/query_kernel.glsl
constexpr std::uint32_t kThreadSums = 64;    // float32 sums a thread keeps without spilling

struct KernelTraits {
  const char* shader;
  std::uint32_t score_planes;  // SCORE_PLANES
  std::uint32_t sums;          // results accumulated over blocks, each head_dim wide
};

KernelTraits TraitsOf(Kernel kernel) {
  switch (kernel) {
    case Kernel::kForward:
      return {"attend_forward", 1, 1};
    case Kernel::kTangent:
      return {"attend_tangent", 2, 1};
    case Kernel::kBackwardDq:
      return {"attend_backward_dq", 2, 1};
    case Kernel::kBackwardDkv:
      return {"attend_backward_dkv", 2, 2};
    case Kernel::kBackwardDbias:
      return {"attend_backward_dbias", 3, 0};
  }
  return {};
}

// Upper bound of what the kernel declares.
std::uint32_t SharedBytes(const KernelShape& shape, const KernelTraits& traits) {
  const std::uint32_t slice_quads = shape.slice_columns / 4 + 1;
  const std::uint32_t score_quads = shape.block_rows / 4 + 1;
  return 16 * (shape.tile_rows + shape.block_rows) * slice_quads +
         16 * traits.score_planes * shape.tile_rows * score_quads +
         8 * (shape.tile_rows + shape.block_rows) + 16;
}

std::uint32_t RowsAThread(std::uint32_t tile_rows, std::uint32_t sum_columns,
                          std::uint32_t max_threads) {
  std::uint32_t rows = 8;
  while (rows > 1 && (rows * sum_columns > kThreadSums * kColumnThreads || rows * 8 > tile_rows)) {
    rows /= 2;
  }
  while (rows < 8 && tile_rows / rows * kColumnThreads > max_threads) rows *= 2;
  return rows;
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
  // Fewer slices first: a tile that fits into one is loaded once.
  for (const std::uint32_t slice_columns : {128u, 64u, 32u}) {
    const std::uint32_t slices = (params.head_dim + slice_columns - 1) / slice_columns;
    if (slices > kMaxSlices) break;
    if (slice_columns > 32 && params.head_dim <= slice_columns / 2) continue;
    for (const std::uint32_t tile_rows : {64u, 32u, 16u}) {
      if (tile_rows > 16 && rows_there_are <= tile_rows / 2) continue;
      for (const std::uint32_t block_rows : {32u, 16u}) {
        KernelShape shape = {kernel_traits.shader, 0, tile_rows, block_rows};
        shape.slice_columns = slice_columns;
        shape.thread_rows = RowsAThread(tile_rows, kernel_traits.sums * slices * slice_columns,
                                        traits.max_workgroup_invocations);
        shape.threads = tile_rows / shape.thread_rows * kColumnThreads;
        if (SharedBytes(shape, kernel_traits) <= traits.max_shared_memory &&
            shape.threads <= traits.max_workgroup_invocations) {
          return shape;
        }
      }
    }
  }
  return std::nullopt;
}

}  // namespace jax_aat
