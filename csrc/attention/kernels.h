// The kernels that can compute a pass, and how each is cut into tiles for a device.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "attention/dispatch_plan.h"
#include "attention/problem.h"

namespace jax_aat {

enum class Kernel {
  kForward,
  kTangent,
  kBackwardDq,
  kBackwardDqStored,  // from score gradients that the kernel of dk and dv has stored
  kBackwardDkv,
  kBackwardDbias,
};

// How one kernel is run: the tile that a workgroup owns, and the threads that share it.
struct KernelShape {
  const char* shader;  // source of the module, without its dtype
  std::uint32_t threads;
  std::uint32_t tile_rows;          // rows of the tile that a workgroup owns
  std::uint32_t block_rows;         // rows taken from the work list a step
  std::uint32_t thread_rows = 0;    // portable kernels: rows of the tile that a thread multiplies
  std::uint32_t slice_columns = 0;  // portable kernels: columns of head_dim in shared memory
  std::uint32_t required_subgroup_size = 0;
  bool has_careful_pass = false;  // it marks tiles that its second pass (FEATURE_CAREFUL) redoes
  // That of keys or that of values: registers do not hold the sums of both.
  bool makes_one_gradient = false;
  bool relays = false;  // FEATURE_RELAYS
};

// Rows of the tile, of a block and of a thread, columns of a slice, threads: what tells shapes of
// one kernel apart.
using ShapeNumbers = std::array<std::uint32_t, 5>;

inline ShapeNumbers NumbersOf(const KernelShape& shape) {
  return {shape.tile_rows, shape.block_rows, shape.thread_rows, shape.slice_columns, shape.threads};
}

// The shapes that a family has for a kernel, problem and device, all of which fit. The first runs
// unless a tuning names another; there are few, as each is measured.
using KernelShapes = std::vector<KernelShape>;

// A way of computing attention that a device may or may not be able to run.
struct KernelFamily {
  const char* path;  // what DispatchPlan::path says
  // None when the family has no kernel for the problem on the device.
  KernelShapes (*shapes)(Kernel kernel, const AttentionProblem& problem,
                         const DeviceTraits& traits);
};

// The most preferred family that has a kernel, and its shapes; null where none has one.
struct KernelChoice {
  const KernelFamily* family = nullptr;
  KernelShapes shapes;
};

KernelChoice ShapesOf(Kernel kernel, const AttentionProblem& problem, const DeviceTraits& traits);

// A kernel over tiles of keys, or of coarse rows: FEATURE_DK, FEATURE_DV or both, by the gradients
// that it makes, and its products a pair and column.
struct KeyPass {
  std::uint32_t gradients;
  double products;
};

// Those that make dk and dv, or what of them is wanted.
std::vector<KeyPass> KeyPasses(const KernelShape& shape, bool wants_dk, bool wants_dv,
                               bool has_dout);

// Query heads in a tile: the largest power of two that divides the heads of a group, at most 16.
std::uint32_t TileHeads(const AttentionParams& params);

// How far apart a query and a key that it sees can be, both sides together.
std::uint64_t WindowSpan(const AttentionProblem& problem);

// Keys that a query tile of so many rows sees at most.
std::uint64_t KeysOfTile(const AttentionProblem& problem, std::uint32_t tile_rows);

// Whether every row of queries, keys and values can be loaded by so many elements (a power of two)
// at once.
bool RowsAllowVectors(const AttentionParams& params, std::uint32_t elements);

// Whether the device multiplies cooperative matrices of a dtype whose elements kernels can look at.
bool HasMatrices(std::uint32_t dtype, const DeviceTraits& traits);

// Shared memory through which the subgroups of a kernel pass elements (common/coopmat_layout.glsl).
constexpr std::uint32_t RelayBytes(std::uint32_t subgroups) { return subgroups * 16 * 20 * 4; }

// Kernels on cooperative matrices: float16 and bfloat16, head_dim a multiple of 8 up to 256
// (of tangents bfloat16, up to 128).
KernelShapes CoopmatShapes(Kernel kernel, const AttentionProblem& problem,
                           const DeviceTraits& traits);

// Kernels of float32 arithmetic, for any device.
KernelShapes PortableShapes(Kernel kernel, const AttentionProblem& problem,
                            const DeviceTraits& traits);

}  // namespace jax_aat
