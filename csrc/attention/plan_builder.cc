#include "attention/plan_builder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "attention/checks.h"

namespace jax_aat {
namespace {

constexpr std::uint64_t kScratchAlignment = 256;

const char* ModuleSuffix(std::uint32_t dtype) {
  return dtype == DTYPE_F32 ? "f32" : dtype == DTYPE_F16 ? "f16" : "bf16";
}

}  // namespace

Dispatch& PlanBuilder::Add(std::string module, const KernelShape& shape, std::uint32_t features,
                           std::uint64_t workgroups) {
  Dispatch dispatch;
  dispatch.shader = std::move(module);
  dispatch.required_subgroup_size = shape.required_subgroup_size;
  // In the order of Constant.
  dispatch.specialization = {
      shape.threads,
      KnownSubgroupSize(shape),
      (problem_.features & features) | (shape.relays ? FEATURE_RELAYS : 0),
      params_.head_dim,
      shape.tile_rows,
      TileHeads(params_),
      shape.block_rows,
      problem_.bias_dtype,
      shape.thread_rows,
      shape.slice_columns,
      RowsAllowVectors(params_, 4) ? 1u : 0u,
      /*transposed=*/0,
      std::max(1u, params_.super_tile_granules),  // none without a plan
  };
  const std::uint64_t x = std::min<std::uint64_t>(workgroups, traits_.max_workgroup_count);
  const std::uint64_t y = DivideUp(workgroups, x);
  if (y > traits_.max_workgroup_count || x * y > UINT32_MAX) {
    throw std::invalid_argument("the call is too large for one dispatch (" +
                                std::to_string(workgroups) +
                                " tiles): split its batch or its sequence");
  }
  dispatch.groups = {static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y), 1};
  dispatch.barrier_before = needs_barrier_;
  needs_barrier_ = false;
  return plan_.dispatches.emplace_back(std::move(dispatch));
}

Dispatch& PlanBuilder::AddListKernel(const char* shader, const KernelShape& shape,
                                     std::uint32_t features, std::uint64_t workgroups) {
  Dispatch& dispatch = Add(std::string(shader) + ".f32", shape, features, workgroups);
  for (const Constant constant :
       {kHeadDim, kBiasDtype, kThreadRows, kSliceColumns, kVectorAccess}) {
    dispatch.specialization[constant] = 0;
  }
  return dispatch;
}

std::string PlanBuilder::ModuleName(const KernelShape& shape) const {
  return std::string(shape.shader) + "." + ModuleSuffix(problem_.dtype);
}

void PlanBuilder::AddScratch(std::uint32_t slot, std::uint64_t bytes) {
  const std::uint64_t aligned = DivideUp(bytes, kScratchAlignment) * kScratchAlignment;
  plan_.scratch.push_back({slot, plan_.scratch_bytes, aligned});
  plan_.scratch_bytes += aligned;
}

void PlanBuilder::BeginSharedScratch() { shared_begin_ = plan_.scratch_bytes; }

void PlanBuilder::ShareScratch() {
  shared_end_ = plan_.scratch_bytes;
  plan_.scratch_bytes = shared_begin_;
}

void PlanBuilder::EndSharedScratch() {
  plan_.scratch_bytes = std::max(plan_.scratch_bytes, shared_end_);
}

void PlanBuilder::AddScratchFrom(std::uint64_t offset) {
  plan_.scratch_bytes = std::max(plan_.scratch_bytes, offset);
}

void PlanBuilder::AddBatchScratch(std::uint32_t slot, std::uint64_t words) {
  std::uint64_t stride = words;
  for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
    params_.operand[slot].batch_stride[axis] = params_.batch[axis] == 1 ? 0 : CheckedStride(stride);
    stride *= params_.batch[axis];
  }
  AddScratch(slot, CheckedStride(stride) * std::uint64_t{4});
}

DispatchPlan PlanBuilder::Finish(const char* path) {
  plan_.params = params_;
  plan_.path = path;
  return std::move(plan_);
}

std::uint32_t PlanBuilder::KnownSubgroupSize(const KernelShape& shape) const {
  if (shape.required_subgroup_size != 0) return shape.required_subgroup_size;
  return traits_.min_subgroup_size == traits_.max_subgroup_size ? traits_.subgroup_size : 0;
}

}  // namespace jax_aat
