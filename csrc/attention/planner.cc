// PlanAttention: from a problem and a device to dispatches, a parameter block and scratch.
#include <algorithm>
#include <stdexcept>

#include "attention/checks.h"
#include "attention/dispatch_plan.h"
#include "attention/kernels.h"

namespace jax_aat {
namespace {

// In order of preference.
constexpr KernelFamily kFamilies[] = {
    {"coopmat", ChooseCoopmatKernel},
    {"portable", ChoosePortableKernel},
};

constexpr std::uint32_t kGranuleRows = 16;
constexpr std::uint32_t kListThreads = 64;
constexpr std::uint32_t kDeltaThreads = 64;
constexpr std::uint64_t kScratchAlignment = 256;

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
};

// Features that decide what is visible: all that work_lists.comp needs to know.
constexpr std::uint32_t kVisibilityFeatures = FEATURE_CAUSAL | FEATURE_WINDOW | FEATURE_Q_LENGTHS |
                                              FEATURE_KV_LENGTHS | FEATURE_SEGMENTS | FEATURE_MASK;
constexpr std::uint32_t kScoreFeatures = kVisibilityFeatures | FEATURE_BIAS | FEATURE_SOFT_CAP;

constexpr std::uint64_t DivideUp(std::uint64_t value, std::uint64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Number of pairs (t, s) with s <= t + offset.
double PairsUpTo(double offset, double queries, double keys) {
  // Row t has clamp(t + offset + 1, 0, keys) of them: none, then growing by one, then all.
  const double none = std::clamp(-offset - 1, 0.0, queries);
  const double growing = std::clamp(keys - offset - 1, none, queries) - none;
  const double first = none + offset + 1;
  return growing * first + growing * (growing - 1) / 2 + (queries - none - growing) * keys;
}

// Number of pairs (t, s) of all batch entries and heads that the causal mask and the window leave;
// lengths, segments and masks are known on the device only.
double CountPairs(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  const double queries = params.queries, keys = params.keys;
  double right = keys, left = queries;  // unbounded
  if (problem.features & FEATURE_WINDOW) {
    if (params.window_right >= 0) right = params.window_right;
    if (params.window_left >= 0) left = params.window_left;
  }
  if (problem.features & FEATURE_CAUSAL) right = std::min(right, 0.0);
  const double pairs = PairsUpTo(right, queries, keys) - PairsUpTo(-left - 1, queries, keys);
  return pairs * params.batch_count * params.query_heads;
}

const char* DtypeName(std::uint32_t dtype) {
  return dtype == DTYPE_F32 ? "f32" : dtype == DTYPE_F16 ? "f16" : "bf16";
}

class Planner {
 public:
  Planner(const AttentionProblem& problem, const DeviceTraits& traits)
      : problem_(problem), traits_(traits), params_(problem.params) {}

  DispatchPlan Plan() {
    pairs_ = CountPairs(problem_);
    SetBatchLists();
    switch (problem_.pass) {
      case Pass::kForward:
        PlanQueryKernel(Kernel::kForward, kScoreFeatures, 4);
        break;
      case Pass::kTangent:
        PlanTangent();
        break;
      case Pass::kBackward:
        PlanBackward();
        break;
    }
    plan_.params = params_;
    if (family_ != nullptr) plan_.path = family_->path;
    return std::move(plan_);
  }

 private:
  bool Has(std::uint32_t feature) const { return (problem_.features & feature) != 0; }

  void PlanTangent() {
    const double products =
        4 + (Has(FEATURE_DQ) ? 2 : 0) + (Has(FEATURE_DK) ? 2 : 0) + (Has(FEATURE_DV) ? 2 : 0);
    PlanQueryKernel(Kernel::kTangent,
                    kScoreFeatures | FEATURE_DQ | FEATURE_DK | FEATURE_DV | FEATURE_DBIAS,
                    products);
  }

  void PlanBackward() {
    const bool wants_keys = Has(FEATURE_DK | FEATURE_DV);
    const bool wants_score_gradient = Has(FEATURE_DQ | FEATURE_DK | FEATURE_DBIAS);
    const double value_products = Has(FEATURE_DOUT) ? 2 : 0;
    KernelShape dq_shape, dkv_shape;
    if (Has(FEATURE_DQ)) {
      dq_shape = Choose(Kernel::kBackwardDq);
      AddLists(dq_shape, /*transposed=*/false);
    }
    if (wants_keys) {
      dkv_shape = Choose(Kernel::kBackwardDkv);
      AddLists(dkv_shape, /*transposed=*/true);
    }
    if (wants_score_gradient) AddDelta();
    needs_barrier_ = true;
    const std::uint32_t cotangents = FEATURE_DOUT;
    if (Has(FEATURE_DQ)) {
      AddKernel(dq_shape, kScoreFeatures | cotangents, QueryTiles(dq_shape),
                (4 + value_products) * pairs_ * params_.head_dim);
    }
    if (wants_keys) {
      const double products =
          2 + (Has(FEATURE_DK) ? 2 + value_products : 0) + (Has(FEATURE_DV) ? value_products : 0);
      AddKernel(dkv_shape, kScoreFeatures | cotangents | FEATURE_DK | FEATURE_DV,
                KeyTiles(dkv_shape), products * pairs_ * params_.head_dim);
    }
    if (Has(FEATURE_DBIAS)) AddBiasGradient(cotangents, value_products);
  }

  void PlanQueryKernel(Kernel kernel, std::uint32_t features, double flops_a_pair_and_column) {
    const KernelShape shape = Choose(kernel);
    AddLists(shape, /*transposed=*/false);
    needs_barrier_ = true;
    AddKernel(shape, features, QueryTiles(shape),
              flops_a_pair_and_column * pairs_ * params_.head_dim);
    if (shape.has_careful_pass) {
      needs_barrier_ = true;
      // No flops: of what tiles it computes, those of the first pass were wasted.
      AddKernel(shape, features, QueryTiles(shape), 0);
      plan_.dispatches.back().specialization[kFeatures] |= FEATURE_CAREFUL;
    }
  }

  KernelShape Choose(Kernel kernel) {
    for (const KernelFamily& family : kFamilies) {
      if (const auto shape = family.choose(kernel, problem_, traits_)) {
        if (family_ == nullptr || &family < family_) family_ = &family;
        return *shape;
      }
    }
    throw std::invalid_argument(
        "no attention kernel fits the device: it has " + std::to_string(traits_.max_shared_memory) +
        " bytes of shared memory and " + std::to_string(traits_.max_workgroup_invocations) +
        " threads a workgroup");
  }

  // Lists are apart only where lengths, segments or masks tell batch entries or heads apart. The
  // lists of all batch entries for one head chunk lie together, so that lists of queries and of
  // keys share the strides of the batch axes.
  void SetBatchLists() {
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
      const bool differs = std::any_of(
          std::begin(kMaskingOperands), std::end(kMaskingOperands), [&](const auto& operand) {
            return Has(operand.feature) && params_.operand[operand.slot].batch_stride[axis] != 0;
          });
      if (!differs || params_.batch[axis] == 1) continue;
      params_.list_batch_stride[axis] = static_cast<std::uint32_t>(batch_lists_);
      batch_lists_ *= params_.batch[axis];
    }
    heads_differ_ = Has(FEATURE_MASK) && params_.operand[OPERAND_MASK].head_stride != 0;
  }

  // How far apart a query and a key that it sees can be, both sides together.
  std::uint64_t WindowSpan() const {
    const bool has_window = Has(FEATURE_WINDOW);
    const std::uint64_t left = has_window && params_.window_left >= 0
                                   ? static_cast<std::uint64_t>(params_.window_left)
                                   : params_.queries;
    const std::uint64_t right = Has(FEATURE_CAUSAL) ? 0
                                : has_window && params_.window_right >= 0
                                    ? static_cast<std::uint64_t>(params_.window_right)
                                    : params_.keys;
    return left + right;
  }

  void AddLists(const KernelShape& shape, bool transposed) {
    const std::uint32_t tile_heads = TileHeads(params_);
    const std::uint64_t heads = !heads_differ_ ? 1
                                : transposed   ? params_.kv_heads
                                               : params_.query_heads / tile_heads;
    const std::uint64_t tiles = transposed ? KeyTileCount(shape) : QueryTileCount(shape);
    const std::uint64_t rows = transposed ? params_.queries : params_.keys;
    const std::uint64_t granule_rows = transposed ? kGranuleRows / tile_heads : kGranuleRows;
    const std::uint64_t tile_span = transposed ? shape.tile_rows : shape.tile_rows / tile_heads;
    const std::uint64_t granules = std::min(DivideUp(rows, granule_rows),
                                            DivideUp(tile_span + WindowSpan(), granule_rows) + 1);
    const std::uint64_t block_granules = shape.block_rows / kGranuleRows;
    const std::uint64_t capacity = DivideUp(granules, block_granules) * block_granules;
    const std::uint64_t lists = heads * batch_lists_ * tiles;
    const std::uint64_t header_words = 4 * lists;
    const std::uint64_t words = header_words + lists * capacity;
    const std::uint32_t slot = transposed ? OPERAND_KEY_LISTS : OPERAND_LISTS;
    CheckIndex(words, "work lists");
    const auto head_stride = static_cast<std::uint32_t>(heads_differ_ ? batch_lists_ : 0);
    if (transposed) {
      params_.key_list_head_stride = head_stride;
      params_.key_list_capacity = static_cast<std::uint32_t>(capacity);
    } else {
      params_.list_head_stride = head_stride;
      params_.list_capacity = static_cast<std::uint32_t>(capacity);
    }
    params_.operand[slot].row_stride = static_cast<std::uint32_t>(header_words);
    AddScratch(slot, words * 4);

    KernelShape maker = shape;
    maker.threads = kListThreads;
    maker.required_subgroup_size = 0;
    Dispatch dispatch = MakeDispatch("work_lists.f32", maker, kVisibilityFeatures, lists);
    // Lists are the same for every head_dim and dtype: one pipeline makes them.
    for (const Constant constant :
         {kHeadDim, kBiasDtype, kThreadRows, kSliceColumns, kVectorAccess}) {
      dispatch.specialization[constant] = 0;
    }
    dispatch.specialization[kTransposed] = transposed ? 1 : 0;
    plan_.dispatches.push_back(std::move(dispatch));
  }

  void AddDelta() {
    OperandLayout& layout = params_.operand[OPERAND_DELTA];
    layout.head_stride = 1;
    layout.column_stride = 1;
    layout.row_stride = params_.query_heads;
    std::uint64_t stride = std::uint64_t{params_.queries} * params_.query_heads;
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
      layout.batch_stride[axis] = params_.batch[axis] == 1 ? 0 : CheckedStride(stride);
      stride *= params_.batch[axis];
    }
    AddScratch(OPERAND_DELTA, CheckedStride(stride) * std::uint64_t{4});
    KernelShape shape = {"attend_backward_delta", kDeltaThreads, kDeltaThreads / 8, kGranuleRows};
    const std::uint64_t rows =
        std::uint64_t{params_.queries} * params_.query_heads * params_.batch_count;
    plan_.dispatches.push_back(MakeDispatch(ModuleName(shape), shape, FEATURE_DOUT | FEATURE_DLSE,
                                            DivideUp(rows, shape.tile_rows)));
  }

  void AddBiasGradient(std::uint32_t cotangents, double value_products) {
    OperandLayout& layout = params_.operand[OPERAND_DBIAS];
    const auto& extent = problem_.dbias_extent;
    const KernelShape shape = Choose(Kernel::kBackwardDbias);
    std::uint64_t tiles = 1;
    for (int axis = 0; axis < MAX_BATCH_AXES; ++axis) {
      if (extent[axis] == 1) layout.batch_stride[axis] = 0;
      tiles *= extent[axis];
    }
    if (extent[MAX_BATCH_AXES] == 1) layout.head_stride = 0;
    if (extent[MAX_BATCH_AXES + 1] == 1) layout.row_stride = 0;
    if (extent[MAX_BATCH_AXES + 2] == 1) layout.column_stride = 0;
    tiles *= extent[MAX_BATCH_AXES] * DivideUp(extent[MAX_BATCH_AXES + 1], shape.tile_rows) *
             DivideUp(extent[MAX_BATCH_AXES + 2], shape.block_rows);
    AddKernel(shape, kScoreFeatures | cotangents, tiles,
              (2 + value_products) * pairs_ * params_.head_dim);
    plan_.dispatches.back().specialization[kTileHeads] = 1;  // its tiles are of one head
  }

  void AddKernel(const KernelShape& shape, std::uint32_t features, std::uint64_t workgroups,
                 double flops) {
    Dispatch dispatch = MakeDispatch(ModuleName(shape), shape, features, workgroups);
    dispatch.barrier_before = needs_barrier_;
    dispatch.flops = flops;
    needs_barrier_ = false;
    plan_.dispatches.push_back(std::move(dispatch));
  }

  Dispatch MakeDispatch(std::string shader, const KernelShape& shape, std::uint32_t features,
                        std::uint64_t workgroups) const {
    Dispatch dispatch;
    dispatch.shader = std::move(shader);
    dispatch.required_subgroup_size = shape.required_subgroup_size;
    // In the order of Constant.
    dispatch.specialization = {
        shape.threads,
        KnownSubgroupSize(shape),
        problem_.features & features,
        params_.head_dim,
        shape.tile_rows,
        TileHeads(params_),
        shape.block_rows,
        problem_.bias_dtype,
        shape.thread_rows,
        shape.slice_columns,
        RowsAllowVectors(params_, 4) ? 1u : 0u,
        /*transposed=*/0,
    };
    const std::uint64_t x = std::min<std::uint64_t>(workgroups, traits_.max_workgroup_count);
    const std::uint64_t y = DivideUp(workgroups, x);
    if (y > traits_.max_workgroup_count || x * y > UINT32_MAX) {
      throw std::invalid_argument("the call is too large for one dispatch (" +
                                  std::to_string(workgroups) +
                                  " tiles): split its batch or its sequence");
    }
    dispatch.groups = {static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y), 1};
    return dispatch;
  }

  // 0 where the driver may choose among several.
  std::uint32_t KnownSubgroupSize(const KernelShape& shape) const {
    if (shape.required_subgroup_size != 0) return shape.required_subgroup_size;
    return traits_.min_subgroup_size == traits_.max_subgroup_size ? traits_.subgroup_size : 0;
  }

  std::string ModuleName(const KernelShape& shape) const {
    return std::string(shape.shader) + "." + DtypeName(problem_.dtype);
  }

  void AddScratch(std::uint32_t slot, std::uint64_t bytes) {
    plan_.scratch.push_back({slot, plan_.scratch_bytes});
    plan_.scratch_bytes += DivideUp(bytes, kScratchAlignment) * kScratchAlignment;
  }

  std::uint64_t QueryTileCount(const KernelShape& shape) const {
    return DivideUp(params_.queries, shape.tile_rows / TileHeads(params_));
  }
  std::uint64_t KeyTileCount(const KernelShape& shape) const {
    return DivideUp(params_.keys, shape.tile_rows);
  }
  std::uint64_t QueryTiles(const KernelShape& shape) const {
    return QueryTileCount(shape) * (params_.query_heads / TileHeads(params_)) * params_.batch_count;
  }
  std::uint64_t KeyTiles(const KernelShape& shape) const {
    return KeyTileCount(shape) * params_.kv_heads * params_.batch_count;
  }

  const AttentionProblem& problem_;
  const DeviceTraits& traits_;
  AttentionParams params_;
  DispatchPlan plan_;
  const KernelFamily* family_ = nullptr;  // the most preferred of those that serve the plan
  double pairs_ = 0;
  std::uint64_t batch_lists_ = 1;
  bool heads_differ_ = false;
  bool needs_barrier_ = false;
};

}  // namespace

bool RowsAllowVectors(const AttentionParams& params, std::uint32_t elements) {
  std::uint32_t extents = params.head_dim;
  for (const int slot : {OPERAND_Q, OPERAND_K, OPERAND_V, OPERAND_OUT, OPERAND_DQ, OPERAND_DK,
                         OPERAND_DV, OPERAND_DOUT}) {
    const OperandLayout& layout = params.operand[slot];
    extents |= layout.row_stride | layout.head_stride;
    for (const std::uint32_t stride : layout.batch_stride) extents |= stride;
  }
  return extents % elements == 0;
}

DispatchPlan PlanAttention(const AttentionProblem& problem, const DeviceTraits& traits) {
  CheckProblem(problem, traits);
  return Planner(problem, traits).Plan();
}

}  // namespace jax_aat
