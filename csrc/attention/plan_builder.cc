#include "attention/plan_builder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "attention/checks.h"

namespace jax_aat {
namespace {

// From the start of scratch, or of out, whose address is a multiple of 16 bytes: the most that a
// shader loads at once.
constexpr std::uint64_t kScratchAlignment = 256;

const char* ModuleSuffix(std::uint32_t dtype) {
  return dtype == DTYPE_F32 ? "f32" : dtype == DTYPE_F16 ? "f16" : "bf16";
}

std::uint64_t ElementBytes(std::uint32_t dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

// Bytes of out that nothing has to be kept in before the kernels of attention write it: none where
// it is given, or where what lies between its elements may be somebody else's.
std::uint64_t OutRoom(const AttentionProblem& problem) {
  if (problem.pass != Pass::kForward) return 0;
  const AttentionParams& params = problem.params;
  const OperandLayout& out = params.operand[OPERAND_OUT];
  std::uint64_t elements = 1;
  bool is_dense = true;
  const auto take = [&](std::uint32_t extent, std::uint32_t stride) {
    is_dense &= extent == 1 || stride == elements;
    elements *= extent;
  };
  take(params.head_dim, out.column_stride);
  take(params.query_heads, out.head_stride);
  take(params.queries, out.row_stride);
  for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
    take(params.batch[axis], out.batch_stride[axis]);
  }
  return is_dense ? elements * ElementBytes(problem.dtype) : 0;
}

PlanBuilder::Ends Larger(const PlanBuilder::Ends& a, const PlanBuilder::Ends& b) {
  return {std::max(a.scratch, b.scratch), std::max(a.out, b.out)};
}

}  // namespace

PlanBuilder::PlanBuilder(const AttentionProblem& problem, const DeviceTraits& traits)
    : problem_(problem), traits_(traits), params_(problem.params), out_room_(OutRoom(problem)) {}

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

void PlanBuilder::AddScratch(std::uint32_t slot, std::uint64_t bytes, Life life) {
  const std::uint64_t aligned = DivideUp(bytes, kScratchAlignment) * kScratchAlignment;
  const bool in_out = life == Life::kPlanning && ends_.out + aligned <= out_room_;
  std::uint64_t& end = in_out ? ends_.out : ends_.scratch;
  plan_.scratch.push_back({slot, end, aligned, in_out});
  end += aligned;
  plan_.scratch_bytes = std::max(plan_.scratch_bytes, ends_.scratch);
}

void PlanBuilder::BeginSharedScratch() { shared_begin_ = ends_; }

void PlanBuilder::ShareScratch() {
  shared_end_ = ends_;
  ends_ = shared_begin_;
}

void PlanBuilder::EndSharedScratch() { ends_ = Larger(ends_, shared_end_); }

void PlanBuilder::AddScratchFrom(const Ends& least) { ends_ = Larger(ends_, least); }

void PlanBuilder::AddBatchRows(std::uint32_t slot, std::uint64_t elements) {
  AddBatchScratch(slot, elements, ElementBytes(problem_.dtype), Life::kCall);
}

void PlanBuilder::AddBatchScratch(std::uint32_t slot, std::uint64_t elements,
                                  std::uint64_t element_bytes, Life life) {
  std::uint64_t stride = elements;
  for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
    params_.operand[slot].batch_stride[axis] = params_.batch[axis] == 1 ? 0 : CheckedStride(stride);
    stride *= params_.batch[axis];
  }
  AddScratch(slot, CheckedStride(stride) * element_bytes, life);
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
