// Collects what a DispatchPlan holds; PlanAttention and PlanTiles fill it in.
#pragma once

#include <cstdint>
#include <string>

#include "attention/dispatch_plan.h"
#include "attention/kernels.h"
#include "attention/problem.h"

namespace jax_aat {

// Indices of specialisation constants, as in shaders/common/specialization.glsl.
enum Constant {
  kThreads,
  kSubgroupSize,
  kFeatures,
  kHeadDim,
  kTileRows,
  kTileHeads,
  kBlockRows,
  kBiasDtype,
  kThreadRows,
  kSliceColumns,
  kVectorAccess,
  kTransposed,
  kSuperTileGranules,
};

// Features that decide what is visible: all that kernels need to know which make lists.
inline constexpr std::uint32_t kVisibilityFeatures = FEATURE_CAUSAL | FEATURE_WINDOW |
                                                     FEATURE_Q_LENGTHS | FEATURE_KV_LENGTHS |
                                                     FEATURE_SEGMENTS | FEATURE_MASK;

constexpr std::uint64_t DivideUp(std::uint64_t value, std::uint64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// How long scratch is used: until the kernels of attention begin, or to the end of the call.
enum class Life { kPlanning, kCall };

class PlanBuilder {
 public:
  PlanBuilder(const AttentionProblem& problem, const DeviceTraits& traits);

  const AttentionProblem& problem() const { return problem_; }
  const DeviceTraits& traits() const { return traits_; }
  AttentionParams& params() { return params_; }
  const AttentionParams& params() const { return params_; }
  bool Has(std::uint32_t feature) const { return (problem_.features & feature) != 0; }

  // The next dispatch is to see what earlier ones wrote, if there are any.
  void AddBarrier() { needs_barrier_ = !plan_.dispatches.empty(); }
  // Of the problem's features those among `features` are specialised.
  Dispatch& Add(std::string module, const KernelShape& shape, std::uint32_t features,
                std::uint64_t workgroups);
  // Of a kernel of lists, which is the same for every head_dim and dtype: one pipeline runs it.
  Dispatch& AddListKernel(const char* shader, const KernelShape& shape, std::uint32_t features,
                          std::uint64_t workgroups);
  std::string ModuleName(const KernelShape& shape) const;

  // That of planning lies in out where the call has this result and it has room left.
  void AddScratch(std::uint32_t slot, std::uint64_t bytes, Life life = Life::kCall);
  // Scratch of so many words a batch entry; sets the strides along batch axes.
  void AddBatchScratch(std::uint32_t slot, std::uint64_t words, Life life = Life::kCall) {
    AddBatchScratch(slot, words, sizeof(std::uint32_t), life);
  }
  // Likewise of so many elements in the dtype of the keys.
  void AddBatchRows(std::uint32_t slot, std::uint64_t elements);

  // Bytes that planning may still take of out.
  std::uint64_t out_room() const { return out_room_ - ends_.out; }

  // Where what is added next lies, in scratch and in out.
  struct Ends {
    std::uint64_t scratch = 0, out = 0;
  };
  // Scratch that is added from the first of these to the second is dead where what is added from
  // there to the third is used, and lies in the same place.
  void BeginSharedScratch();
  void ShareScratch();
  void EndSharedScratch();
  // What is added next is to lie there at least.
  Ends scratch_ends() const { return ends_; }
  void AddScratchFrom(const Ends& least);

  void CountLists(std::uint64_t lists) { plan_.counted_lists = lists; }

  DispatchPlan Finish(const char* path);

 private:
  // 0 where the driver may choose among several.
  std::uint32_t KnownSubgroupSize(const KernelShape& shape) const;
  void AddBatchScratch(std::uint32_t slot, std::uint64_t elements, std::uint64_t element_bytes,
                       Life life);

  const AttentionProblem& problem_;
  const DeviceTraits& traits_;
  AttentionParams params_;
  DispatchPlan plan_;
  bool needs_barrier_ = false;
  const std::uint64_t out_room_;
  Ends ends_, shared_begin_, shared_end_;
};

}  // namespace jax_aat
