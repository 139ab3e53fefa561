// Shapes of the cooperative-matrix kernels (shaders/common/coopmat_rows.glsl); docs/kernels.md says
// what was measured to choose them.
#include <algorithm>

#include "attention/kernels.h"
#include "attention/plan_shape.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kSubgroupSize = 32;
constexpr std::uint32_t kMaxHeadDim = 128;
constexpr std::uint32_t kVectorElements = 8;  // 16 bytes
// Rows of the smallest query tile, of which a subgroup takes 16.
constexpr std::uint32_t kSmallTile = 64;

// Upper bound of what a kernel declares whose staged rows have at most so many columns.
std::uint32_t SharedBytes(Kernel kernel, const KernelShape& shape, std::uint32_t columns) {
  const std::uint32_t row_bytes = (columns + 15) / 16 * 32 + 16;
  const std::uint32_t stages =
      (kernel == Kernel::kBackwardDqStored ? 2 : 4) * shape.block_rows * row_bytes;
  const std::uint32_t exchange = shape.threads / kSubgroupSize * 16 * row_bytes;
  // Of rows, and for the forward kernel level biases of the tile's.
  const std::uint32_t states = 4 * shape.block_rows * 8 + 8 * shape.tile_rows;
  return (stages > exchange ? stages : exchange) + states;
}

}  // namespace

KernelShapes CoopmatShapes(Kernel kernel, const AttentionProblem& problem,
                           const DeviceTraits& traits) {
  const bool has_matrices = (problem.dtype == DTYPE_F16 && traits.coopmat_float16) ||
                            (problem.dtype == DTYPE_BF16 && traits.coopmat_bfloat16);
  const std::uint32_t head_dim = problem.params.head_dim;
  if (!has_matrices || !traits.coopmat_layout_known || head_dim > kMaxHeadDim ||
      !RowsAllowVectors(problem.params, kVectorElements)) {
    return {};
  }
  const bool narrow = head_dim <= 64;
  KernelShape shape;
  std::uint32_t columns = head_dim;
  switch (kernel) {
    case Kernel::kForward:
      shape = {"attend_forward_coopmat", 128, 128, narrow ? 64u : 32u};
      shape.has_careful_pass = true;
      break;
    case Kernel::kBackwardDq:
      shape = {"attend_backward_dq_coopmat", narrow ? 128u : 256u, 128, narrow ? 64u : 32u};
      break;
    case Kernel::kBackwardDqStored:
      // Which gradients are stored, the kernel tells from positions alone. Up to 64 columns the two
      // products that it saves cost less than storing.
      if (problem.features & (FEATURE_PLAN | FEATURE_MASK | FEATURE_SEGMENTS)) return {};
      if (narrow) return {};
      shape = {"attend_backward_dq_stored_coopmat", 128, 128, 64};
      columns = std::max(head_dim, shape.tile_rows);
      break;
    case Kernel::kBackwardDkv:
      shape = {"attend_backward_dkv_coopmat", narrow ? 128u : 256u, 128, narrow ? 64u : 32u};
      break;
    default:
      return {};
  }
  // The backward kernels have no variant for a cotangent of the residual alone.
  if (kernel != Kernel::kForward && !(problem.features & FEATURE_DOUT)) return {};
  const bool has_query_tiles = kernel != Kernel::kBackwardDkv;
  const bool planned = problem.features & FEATURE_PLAN;
  const std::uint64_t rows =
      planned ? PlanTileRows(problem.params)
              : std::uint64_t{problem.params.queries} * TileHeads(problem.params);
  const bool is_small =
      planned ? rows == kSmallTile : kernel == Kernel::kForward && rows <= kSmallTile;
  if (has_query_tiles && is_small) {
    shape.tile_rows = kSmallTile;
    shape.threads = kSmallTile / 16 * kSubgroupSize;
  }
  if (planned && (has_query_tiles ? shape.tile_rows : shape.block_rows) > rows) return {};
  shape.required_subgroup_size = kSubgroupSize;
  if (SharedBytes(kernel, shape, columns) > traits.max_shared_memory ||
      shape.threads > traits.max_workgroup_invocations) {
    return {};
  }
  KernelShapes shapes = {shape};
  if (narrow) {
    // Blocks of half the rows, as wide heads have them, leave shared memory for more workgroups.
    shape.block_rows /= 2;
    shapes.push_back(shape);
  }
  return shapes;
}

}  // namespace jax_aat
