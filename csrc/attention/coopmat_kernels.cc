// Shapes of the cooperative-matrix kernels (shaders/common/coopmat_rows.glsl); docs/kernels.md says
// what was measured to choose them.
#include <algorithm>

#include "attention/kernels.h"
#include "attention/plan_shape.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kSubgroupSize = 32;
constexpr std::uint32_t kMaxHeadDim = 256;
constexpr std::uint32_t kVectorElements = 8;  // 16 bytes
// Rows of the smallest query tile, of which a subgroup takes 16.
constexpr std::uint32_t kSmallTile = 64;

// Upper bound of what a kernel declares.
std::uint32_t SharedBytes(Kernel kernel, const KernelShape& shape, std::uint32_t head_dim) {
  const std::uint32_t row_bytes = (head_dim + 15) / 16 * 32 + 16;
  std::uint32_t operands = 4;  // two in two stages
  // Of rows, and for the forward kernel level biases of the tile's.
  std::uint32_t besides = 4 * shape.block_rows * 8 + 8 * shape.tile_rows;
  if (kernel == Kernel::kTangent) operands = 8;
  if (kernel == Kernel::kBackwardDqStored) {
    operands = 1;
    besides += shape.block_rows * (2 * shape.tile_rows + 16);
  }
  if (shape.relays) besides += RelayBytes(shape.threads / kSubgroupSize);
  const std::uint32_t stages = operands * shape.block_rows * row_bytes;
  const std::uint32_t exchange = shape.threads / kSubgroupSize * 16 * row_bytes;
  return std::max(stages, exchange) + besides;
}

}  // namespace

bool HasMatrices(std::uint32_t dtype, const DeviceTraits& traits) {
  if (!traits.coopmat_layout_known && !traits.coopmat_relays) return false;
  return (dtype == DTYPE_F16 && traits.coopmat_float16) ||
         (dtype == DTYPE_BF16 && traits.coopmat_bfloat16);
}

KernelShapes CoopmatShapes(Kernel kernel, const AttentionProblem& problem,
                           const DeviceTraits& traits) {
  const std::uint32_t head_dim = problem.params.head_dim;
  if (!HasMatrices(problem.dtype, traits) || head_dim > kMaxHeadDim ||
      !RowsAllowVectors(problem.params, kVectorElements)) {
    return {};
  }
  // Of columns that a subgroup holds in registers for all of its rows; wide rows leave room for 16.
  const bool narrow = head_dim <= 64, wide = head_dim > 128;
  KernelShape shape;
  switch (kernel) {
    case Kernel::kForward:
      shape = {"attend_forward_coopmat", 128, 128, narrow ? 64u : 32u};
      shape.has_careful_pass = true;
      break;
    case Kernel::kTangent:
      // Tangents may be of any size: float16 has no range for them beside weights.
      if (wide || problem.dtype == DTYPE_F16) return {};
      shape = {"attend_tangent_coopmat", narrow ? 128u : 256u, 128, narrow ? 32u : 16u};
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
      break;
    case Kernel::kBackwardDkv:
      shape = {"attend_backward_dkv_coopmat", narrow ? 128u : 256u, 128, narrow ? 64u : 32u};
      break;
    default:
      return {};
  }
  if (wide) {
    shape.threads = 128;
    shape.tile_rows = kSmallTile;
    shape.block_rows = kernel == Kernel::kBackwardDqStored ? 32 : 16;
    shape.makes_one_gradient = kernel == Kernel::kBackwardDkv;
  }
  // The backward kernels have no variant for a cotangent of the residual alone.
  const bool is_backward = kernel != Kernel::kForward && kernel != Kernel::kTangent;
  if (is_backward && !(problem.features & FEATURE_DOUT)) return {};
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
  shape.relays = !traits.coopmat_layout_known;
  if (SharedBytes(kernel, shape, head_dim) > traits.max_shared_memory ||
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
