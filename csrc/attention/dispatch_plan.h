// What the planner hands to the Vulkan runtime: a bounded list of dispatches over one parameter
// block and one scratch buffer. It knows no Vulkan type, so that planning is tested without a GPU.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention/problem.h"

namespace jax_aat {

struct Tuning;

// The properties of a device that decide which kernels run and how they are specialised.
struct DeviceTraits {
  std::uint32_t subgroup_size = 8;      // of a pipeline that requires none
  std::uint32_t min_subgroup_size = 8;  // range for a required size; equal: none can be required
  std::uint32_t max_subgroup_size = 8;
  std::uint32_t max_shared_memory = 16384;  // bytes a workgroup
  std::uint32_t max_workgroup_invocations = 128;
  std::uint32_t max_workgroup_count = 65535;  // along x and y
  // Of all loops of an invocation together, after which the driver ends them; 0: no such limit.
  std::uint32_t max_loop_iterations = 0;
  std::uint64_t max_score_gradient_bytes = 0;  // scratch that a backward pass may take for dS
  bool storage_16bit = false;
  // 16x16x16 cooperative matrices at subgroup scope, float32 accumulation, on 32-lane subgroups.
  bool coopmat_float16 = false;
  bool coopmat_bfloat16 = false;
  // The accumulator's element layout was probed and is the one the coopmat kernels assume.
  bool coopmat_layout_known = false;
  // It is another one, and elements that pass through shared memory were found where they belong.
  bool coopmat_relays = false;
  // Shapes that a measured run found best on the device; null: none.
  std::shared_ptr<const Tuning> tuning;
};

// The rows that a kernel of a planned call multiplies with those of queries.
enum class KeyRows { kAll, kExact, kCoarse };

struct Dispatch {
  std::string shader;                         // name of an embedded SPIR-V module
  std::vector<std::uint32_t> specialization;  // value of constant_id i at index i
  std::uint32_t required_subgroup_size = 0;   // 0: the device's own
  std::array<std::uint32_t, 3> groups = {1, 1, 1};
  // Of kernels whose workgroups own a tile of a head, counted over all batch entries.
  std::uint32_t first_head = 0;
  std::uint32_t heads = 0;
  bool barrier_before = false;  // reads what an earlier dispatch of the plan wrote
  // Of its matrix products, over what causality and window leave; NaN where a plan decides, and
  // where they are not counted.
  double flops = 0;
  double flops_a_pair = 0;  // of a row of queries and one of these:
  KeyRows key_rows = KeyRows::kAll;
  double share = 1;  // of the call's heads that it works on
};

struct DispatchPlan {
  AttentionParams params;  // addresses of operands are filled in by the runtime
  std::vector<Dispatch> dispatches;
  // Scratch of the call: slot operand -> its part of one buffer of scratch_bytes or, where it is
  // dead before the first kernel writes out, of the memory of that result.
  struct Scratch {
    std::uint32_t operand;
    std::uint64_t offset;
    std::uint64_t bytes;
    bool in_out;
  };
  std::vector<Scratch> scratch;
  std::uint64_t scratch_bytes = 0;
  const char* path = "portable";  // or "coopmat": the family of kernels chosen
  // Lists of all batch entries and heads whose work the call counts; 0: it does not.
  std::uint64_t counted_lists = 0;
};

// Words that count_work.comp writes of each list: pairs of rows of queries and exact ones, then
// pairs with coarse ones, both in two words, the low one first; the most rows that a tile reads; 0.
inline constexpr std::uint32_t kWorkCountWords = 6;

// Throws std::invalid_argument, in words for the user, when no kernel can serve the problem on the
// device.
DispatchPlan PlanAttention(const AttentionProblem& problem, const DeviceTraits& traits);

}  // namespace jax_aat
