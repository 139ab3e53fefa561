// PlanAttention: from a problem and a device to dispatches, a parameter block and scratch.
#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <vector>

#include "attention/checks.h"
#include "attention/dispatch_plan.h"
#include "attention/kernels.h"
#include "attention/pairs.h"
#include "attention/plan_builder.h"
#include "attention/plan_shape.h"
#include "attention/query_parts.h"
#include "attention/state_planner.h"
#include "attention/tile_planner.h"
#include "attention/tuning.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kGranuleRows = 16;
// Of the kernel that makes lists: more where a tile has many granules to look at.
constexpr std::uint32_t kListThreads = 64;
constexpr std::uint32_t kManyListThreads = 256;
constexpr std::uint32_t kCarefulGroups = 256;  // about as many as a large GPU runs at once
constexpr std::uint64_t kListStep = 4;         // LIST_STEP of shaders/common/work_list.glsl
constexpr std::uint32_t kDeltaThreads = 64;
constexpr std::uint32_t kMergeThreads = 64;
// Tiles of keys that a step must have where score gradients are stored for some heads at a time: a
// GPU is to be full until its end, and with causality the longest tile is twice as long as most.
constexpr std::uint64_t kStep = 256;
constexpr std::uint64_t kCausalStep = 1024;
// Loops of a shape that a tuning names over those of the first one, where a driver ends loops: on
// lavapipe narrower slices came to between 1 and 1.4 times what MayWalk allows for (dk and dv of
// head_dim 64 in slices of 32), the first shapes to at most 1.
constexpr std::uint64_t kMoreLoops = 2;
// Keys that the kernel which makes lists may look at, where a driver ends loops, for each row that
// one of attention may walk: with a mask it takes about 17 iterations for a granule and a row of
// the tile, with up to 32 rows and 256 threads.
constexpr std::uint64_t kListLoops = 8;

constexpr std::uint32_t kScoreFeatures =
    kVisibilityFeatures | FEATURE_BIAS | FEATURE_SOFT_CAP | FEATURE_PLAN | FEATURE_LEVEL_BIAS;

class Planner {
 public:
  Planner(const AttentionProblem& problem, const DeviceTraits& traits)
      : problem_(problem),
        traits_(traits),
        builder_(problem_, traits),
        params_(builder_.params()) {}

  DispatchPlan Plan() {
    if (!Has(FEATURE_PLAN)) pairs_ = CountPairs(problem_);
    SetBatchLists();
    switch (problem_.pass) {
      case Pass::kForward:
        PlanForward();
        break;
      case Pass::kTangent:
        PlanTangent();
        break;
      case Pass::kBackward:
        if (Has(FEATURE_MAKES_MEANS)) {
          AddMeans(builder_, /*with_level_biases=*/true);
          AddCotangents(builder_);
        }
        PlanBackward();
        if (Has(FEATURE_MAKES_MEANS)) AddMeansGradients(builder_);
        break;
      case Pass::kPlan:
        AddTilePlan(builder_);
        break;
    }
    if (problem_.counts_work && Has(FEATURE_PLAN | FEATURE_MAKES_LISTS)) AddWorkCounts(builder_);
    return builder_.Finish(family_ == nullptr ? DispatchPlan().path : family_->path);
  }

 private:
  bool Has(std::uint32_t feature) const { return builder_.Has(feature); }

  void PlanForward() {
    std::uint32_t features = kScoreFeatures | FEATURE_ROW_COUNTS | FEATURE_SHARES;
    const bool corrects = CorrectsInRegisters();
    if (Has(FEATURE_CORRECTS) && !corrects && !Has(FEATURE_SHARES)) {
      // What corrects later reads them, if nobody else does.
      AddShares(builder_);
      problem_.features |= FEATURE_SHARES;
    }
    if (corrects) features |= FEATURE_CORRECTS;
    if (Has(FEATURE_MAKES_MEANS)) AddMeans(builder_, /*with_level_biases=*/!corrects);
    if (Has(FEATURE_MAKES_LISTS)) AddTilePlan(builder_);
    PlanQueryKernel(Kernel::kForward, features, 4);
    if (Has(FEATURE_CORRECTS) && !corrects) AddCorrection(builder_);
  }

  // Whether the kernel of attention corrects its results itself: that on matrices, for bfloat16,
  // whose range holds any covariance, where shared memory has room for that.
  bool CorrectsInRegisters() {
    return Has(FEATURE_CORRECTS) && problem_.dtype == DTYPE_BF16 && params_.head_dim <= 128 &&
           !CoopmatShapes(Kernel::kForward, problem_, traits_).empty() &&
           ListParts(Kernel::kForward, Choose(Kernel::kForward)) == 1;
  }

  void PlanTangent() {
    const bool moves_scores =
        Has(FEATURE_DQ | FEATURE_DK | FEATURE_DBIAS | FEATURE_DCOARSE_K | FEATURE_DLEVEL_BIAS);
    const double products = 2 + (moves_scores ? 2 : 0) + (Has(FEATURE_DQ) ? 2 : 0) +
                            (Has(FEATURE_DK) ? 2 : 0) + (Has(FEATURE_DV) ? 2 : 0);
    PlanQueryKernel(Kernel::kTangent,
                    kScoreFeatures | FEATURE_DQ | FEATURE_DK | FEATURE_DV | FEATURE_DBIAS |
                        FEATURE_DCOARSE_K | FEATURE_DCOARSE_V | FEATURE_DLEVEL_BIAS,
                    products);
  }

  void PlanBackward() {
    const bool wants_queries = Has(FEATURE_DQ | FEATURE_DLEVEL_BIAS);
    const bool wants_keys = Has(FEATURE_DK | FEATURE_DV);
    const bool wants_coarse_rows = Has(FEATURE_DCOARSE_K | FEATURE_DCOARSE_V);
    const bool wants_score_gradient =
        wants_queries || Has(FEATURE_DK | FEATURE_DCOARSE_K | FEATURE_DBIAS);
    const double value_products = Has(FEATURE_DOUT) ? 2 : 0;
    KernelShape dq_shape, dkv_shape;
    bool stores_score_gradients = false;
    if (wants_queries) {
      dq_shape = Choose(Kernel::kBackwardDq);
      if (Has(FEATURE_DK)) stores_score_gradients = StoreScoreGradients(dq_shape);
      AddLists(dq_shape, /*transposed=*/false);
    }
    if (wants_keys || wants_coarse_rows) {
      dkv_shape = Choose(Kernel::kBackwardDkv);
      AddLists(dkv_shape, /*transposed=*/true);
    }
    if (wants_score_gradient) AddDelta();
    builder_.AddBarrier();
    const std::uint32_t cotangents = FEATURE_DOUT | FEATURE_DSHARES;
    if (wants_queries) CheckWalk(RowsWalked(Kernel::kBackwardDq, dq_shape));
    if (wants_keys || wants_coarse_rows) CheckWalk(RowsWalked(Kernel::kBackwardDkv, dkv_shape));
    const std::uint32_t key_features = (kScoreFeatures & ~FEATURE_LEVEL_BIAS) | FEATURE_DOUT;
    const std::vector<KeyPass> key_passes =
        KeyPasses(dkv_shape, Has(FEATURE_DK), Has(FEATURE_DV), Has(FEATURE_DOUT));
    if (stores_score_gradients) {
      AddKernelsOfStoredGradients(dq_shape, dkv_shape, key_features, key_passes);
    } else {
      if (wants_queries) {
        AddKernel(dq_shape, kScoreFeatures | cotangents | FEATURE_DQ | FEATURE_DLEVEL_BIAS,
                  QueryTiles(dq_shape), 4 + value_products);
      }
      for (const KeyPass& pass : key_passes) {
        AddKeyKernel(dkv_shape, key_features, KeyTiles(dkv_shape, params_.keys), pass).key_rows =
            KeyRows::kExact;
      }
    }
    if (wants_coarse_rows) {
      // Only scratch has room for the sums of parts.
      const CoarseListParts parts =
          Has(FEATURE_MAKES_MEANS) ? CoarseListPartsOf(params_) : CoarseListParts{1, 1};
      TileGrid tiles = KeyTiles(dkv_shape, params_.coarse_rows);
      const std::uint64_t plain = PlainCoarseTiles(params_, dkv_shape.tile_rows);
      tiles.tiles = plain * parts.of_means + (tiles.tiles - plain) * parts.of_super_means;
      for (const KeyPass& pass : KeyPasses(dkv_shape, Has(FEATURE_DCOARSE_K),
                                           Has(FEATURE_DCOARSE_V), Has(FEATURE_DOUT))) {
        Dispatch& dispatch = AddKeyKernel(dkv_shape, kScoreFeatures | cotangents, tiles, pass);
        dispatch.specialization.push_back(parts.of_means);
        dispatch.specialization.push_back(parts.of_super_means);
        dispatch.key_rows = KeyRows::kCoarse;
        dispatch.specialization[kFeatures] |= FEATURE_COARSE_TILE;
      }
    }
    if (Has(FEATURE_DBIAS)) AddBiasGradient(cotangents, value_products);
  }

  // Replaces the kernel of dq by that of stored score gradients, where there is one and room for
  // what it reads.
  bool StoreScoreGradients(KernelShape& dq_shape) {
    const KernelShapes stored = CoopmatShapes(Kernel::kBackwardDqStored, problem_, traits_);
    const KernelShapes storing = CoopmatShapes(Kernel::kBackwardDkv, problem_, traits_);
    // Both look at tiles of keys of as many rows.
    if (stored.empty() || storing.empty() ||
        stored.front().tile_rows != storing.front().tile_rows) {
      return false;
    }
    constexpr std::uint64_t kTileRows = 128;  // as in shaders/common/score_gradients.glsl
    const std::uint64_t chunks = params_.query_heads / params_.kv_heads / TileHeads(params_);
    const std::uint64_t rows =
        DivideUp(std::uint64_t{params_.queries} * TileHeads(params_), kTileRows) * kTileRows;
    const std::uint64_t columns = DivideUp(params_.keys, kTileRows) * kTileRows;
    const std::uint64_t head_bytes = 2 * chunks * rows * columns;
    const std::uint64_t heads = std::uint64_t{params_.kv_heads} * params_.batch_count;
    const std::uint64_t room = traits_.max_score_gradient_bytes / head_bytes;
    // Half of the heads that there is room for are read while the others are written.
    const std::uint64_t stored_heads = room >= heads ? heads : room / 2 * 2;
    const std::uint64_t step_tiles = stored_heads / 2 * (columns / stored.front().tile_rows);
    if (stored_heads < heads && step_tiles < (Has(FEATURE_CAUSAL) ? kCausalStep : kStep)) {
      return false;
    }
    params_.score_gradient_heads = static_cast<std::uint32_t>(stored_heads);
    params_.operand[OPERAND_SCORE_GRADIENTS].head_stride = CheckedStride(head_bytes / 2);
    builder_.AddScratch(OPERAND_SCORE_GRADIENTS, head_bytes * stored_heads);
    dq_shape = stored.front();
    return true;
  }

  // dk and dv of some heads, then dq of these beside dk and dv of the next ones.
  void AddKernelsOfStoredGradients(const KernelShape& dq_shape, const KernelShape& dkv_shape,
                                   std::uint32_t key_features,
                                   const std::vector<KeyPass>& key_passes) {
    const TileGrid queries = QueryTiles(dq_shape), keys = KeyTiles(dkv_shape, params_.keys);
    const std::uint64_t group = queries.heads / keys.heads;  // chunks of a key/value head
    const std::uint64_t step = params_.score_gradient_heads < keys.heads
                                   ? params_.score_gradient_heads / 2
                                   : params_.score_gradient_heads;
    const auto share = [&](const TileGrid& part, const TileGrid& all) {
      return static_cast<double>(part.heads) / static_cast<double>(all.heads);
    };
    for (std::uint64_t head = 0; head < keys.heads + step; head += step) {
      if (head > 0) builder_.AddBarrier();
      if (head < keys.heads) {
        const TileGrid part = {keys.tiles, std::min(step, keys.heads - head), head};
        for (const KeyPass& pass : key_passes) {
          Dispatch& dispatch = AddKeyKernel(dkv_shape, key_features, part, pass, share(part, keys));
          if (pass.gradients & FEATURE_DK) {
            dispatch.specialization[kFeatures] |= FEATURE_SCORE_GRADIENTS;
          }
        }
      }
      if (head > 0) {
        const std::uint64_t first = head - step;
        const TileGrid part = {queries.tiles, std::min(step, keys.heads - first) * group,
                               first * group};
        AddKernel(dq_shape, kScoreFeatures | FEATURE_DQ, part, 2, share(part, queries));
      }
    }
  }

  void PlanQueryKernel(Kernel kernel, std::uint32_t features, double flops_a_pair_and_column) {
    const KernelShape shape = Choose(kernel);
    CheckWalk(RowsWalked(kernel, shape));
    AddLists(shape, /*transposed=*/false);
    builder_.AddBarrier();
    const std::uint32_t parts = ListParts(kernel, shape);
    TileGrid tiles = QueryTiles(shape);
    tiles.tiles *= parts;
    Dispatch& dispatch = AddKernel(shape, features, tiles, flops_a_pair_and_column);
    if (parts > 1) dispatch.specialization.push_back(parts);
    if (shape.has_careful_pass) {
      builder_.AddBarrier();
      // No flops: of what tiles it computes, those of the first pass were wasted.
      Dispatch& careful = AddKernel(shape, features, tiles, 0);
      careful.specialization[kFeatures] |= FEATURE_CAREFUL;
      careful.groups = {std::min(careful.groups[0], kCarefulGroups), 1, 1};
      careful.flops = 0;
      if (parts > 1) careful.specialization.push_back(parts);
    }
    if (parts > 1) AddMerge(parts);
  }

  // Of what the parts of work lists have left in records.
  void AddMerge(std::uint32_t parts) {
    builder_.AddScratch(OPERAND_RECORDS, RecordBytes(problem_, parts));
    builder_.AddBarrier();
    const KernelShape shape = {"merge_parts", kMergeThreads, kGranuleRows, kGranuleRows};
    const std::uint64_t rows =
        std::uint64_t{params_.queries} * params_.query_heads * params_.batch_count;
    builder_
        .Add(builder_.ModuleName(shape), shape, FEATURE_PLAN | FEATURE_SHARES,
             DivideUp(rows * DivideUp(params_.head_dim, 4), kMergeThreads))
        .specialization.push_back(parts);
  }

  KernelShape Choose(Kernel kernel) {
    const KernelChoice choice = ShapesOf(kernel, problem_, traits_);
    if (choice.family == nullptr) {
      throw std::invalid_argument(
          "no attention kernel fits the device: it has " +
          std::to_string(traits_.max_shared_memory) + " bytes of shared memory and " +
          std::to_string(traits_.max_workgroup_invocations) + " threads a workgroup");
    }
    if (family_ == nullptr || choice.family < family_) family_ = choice.family;
    const KernelShape& tuned = TunedShape(kernel, problem_, traits_, choice.shapes);
    const bool allowed = MayWalk(kMoreLoops * RowsWalked(kernel, tuned));
    return allowed ? tuned : choice.shapes.front();
  }

  // Lists are apart only where lengths, segments or masks tell batch entries or heads apart.
  void SetBatchLists() {
    for (int axis = 0; axis < MAX_BATCH_AXES; ++axis) {
      batches_differ_[axis] =
          params_.batch[axis] != 1 &&
          std::any_of(std::begin(kMaskingOperands), std::end(kMaskingOperands),
                      [&](const auto& operand) {
                        return Has(operand.feature) &&
                               params_.operand[operand.slot].batch_stride[axis] != 0;
                      });
      if (batches_differ_[axis]) batch_lists_ *= params_.batch[axis];
    }
    heads_differ_ = Has(FEATURE_MASK) && params_.operand[OPERAND_MASK].head_stride != 0;
  }

  // Lists of so many words each, those of a head together.
  void AddListOperand(std::uint32_t slot, std::uint64_t list_words, std::uint64_t lists) {
    CheckIndex(list_words * lists, "work lists");
    OperandLayout& layout = params_.operand[slot];
    std::uint64_t stride = list_words;
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
      if (!batches_differ_[axis]) continue;
      layout.batch_stride[axis] = static_cast<std::uint32_t>(stride);
      stride *= params_.batch[axis];
    }
    layout.head_stride = static_cast<std::uint32_t>(heads_differ_ ? stride : 0);
    builder_.AddScratch(slot, list_words * lists * 4);
  }

  // Where no plan gives them.
  void AddLists(const KernelShape& shape, bool transposed) {
    if (Has(FEATURE_PLAN)) return;
    const std::uint32_t tile_heads = TileHeads(params_);
    const std::uint64_t heads = !heads_differ_ ? 1
                                : transposed   ? params_.kv_heads
                                               : params_.query_heads / tile_heads;
    const std::uint64_t tiles =
        transposed ? DivideUp(params_.keys, shape.tile_rows) : QueryTileCount(shape);
    const std::uint64_t rows = transposed ? params_.queries : params_.keys;
    const std::uint64_t granule_rows = transposed ? kGranuleRows / tile_heads : kGranuleRows;
    const std::uint64_t tile_span = transposed ? shape.tile_rows : shape.tile_rows / tile_heads;
    const std::uint64_t granules = std::min(
        DivideUp(rows, granule_rows), DivideUp(tile_span + WindowSpan(problem_), granule_rows) + 1);
    const std::uint64_t tile_capacity = DivideUp(granules, kListStep) * kListStep;
    const std::uint64_t capacity = tile_capacity * tiles;
    const std::uint64_t lists = heads * batch_lists_;
    if (transposed) {
      AddListOperand(OPERAND_KEY_LIST_HEADERS, 4 * tiles, lists);
      AddListOperand(OPERAND_KEY_LIST_ENTRIES, capacity, lists);
      params_.key_list_capacity = static_cast<std::uint32_t>(capacity);
    } else {
      AddListOperand(OPERAND_LIST_HEADERS, 4 * tiles, lists);
      AddListOperand(OPERAND_LIST_ENTRIES, capacity, lists);
      params_.list_capacity = static_cast<std::uint32_t>(capacity);
    }

    KernelShape maker = shape;
    maker.threads =
        granules >= kManyListThreads && kManyListThreads <= traits_.max_workgroup_invocations
            ? kManyListThreads
            : kListThreads;
    maker.required_subgroup_size = 0;
    maker.relays = false;
    builder_.AddListKernel("work_lists", maker, kVisibilityFeatures, lists * tiles)
        .specialization[kTransposed] = transposed ? 1 : 0;
  }

  void AddDelta() {
    OperandLayout& layout = params_.operand[OPERAND_DELTA];
    layout.head_stride = 1;
    layout.column_stride = 1;
    layout.row_stride = params_.query_heads;
    builder_.AddBatchScratch(OPERAND_DELTA, std::uint64_t{params_.queries} * params_.query_heads);
    KernelShape shape = {"attend_backward_delta", kDeltaThreads, kDeltaThreads / 8, kGranuleRows};
    const std::uint64_t rows =
        std::uint64_t{params_.queries} * params_.query_heads * params_.batch_count;
    // What the state adds to the output takes part in dout . out, the shares with it.
    const std::uint32_t shares = Has(FEATURE_CORRECTS) ? 0 : FEATURE_DSHARES;
    builder_.Add(builder_.ModuleName(shape), shape, FEATURE_DOUT | FEATURE_DLSE | shares,
                 DivideUp(rows, shape.tile_rows));
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
    // With a plan coarse rows are blocks of their own, or each block of keys is followed by one.
    std::uint64_t columns = params_.keys;
    if (Has(FEATURE_PLAN))
      columns += layout.column_stride == 0 ? params_.coarse_rows : params_.keys;
    const std::uint64_t terms = std::uint64_t{params_.batch_count} * params_.query_heads *
                                DivideUp(params_.queries, shape.tile_rows) *
                                DivideUp(columns, shape.block_rows);
    CheckWalk(DivideUp(terms, tiles) * shape.block_rows);
    AddKernel(shape, kScoreFeatures | cotangents, {tiles, 1}, 2 + value_products)
        .specialization[kTileHeads] = 1;  // its tiles are of one head
  }

  std::uint32_t ListParts(Kernel kernel, const KernelShape& shape) const {
    return kernel == Kernel::kForward ? QueryListParts(problem_, shape.tile_rows) : 1;
  }

  // By a workgroup, at most; those of tangents, which need about twice the loops of the other
  // kernels, count twice.
  std::uint64_t RowsWalked(Kernel kernel, const KernelShape& shape) const {
    if (kernel == Kernel::kBackwardDkv) {
      return std::uint64_t{params_.queries} * (params_.query_heads / params_.kv_heads);
    }
    const std::uint64_t keys = KeysOfTile(problem_, shape.tile_rows);
    const std::uint32_t parts = ListParts(kernel, shape);
    // A part has a block more than its share at most. What makes lists looks at all keys, in
    // shorter loops; for what makes plans, all keys stay the bound.
    if (parts > 1 && !Has(FEATURE_PLAN)) {
      return std::max<std::uint64_t>(keys / parts + shape.block_rows, keys / kListLoops);
    }
    return keys * (kernel == Kernel::kTangent ? 2 : 1);
  }

  // Whether a workgroup may walk so many rows. Measured on lavapipe with head_dim 8, 64, 128 and
  // 256: at most 2.9, 5.7, 11.4 and 22.8 iterations a row.
  bool MayWalk(std::uint64_t rows) const {
    const std::uint64_t iterations = rows * (36 + params_.head_dim) / 12;
    return traits_.max_loop_iterations == 0 || iterations <= traits_.max_loop_iterations;
  }

  void CheckWalk(std::uint64_t rows) const {
    if (MayWalk(rows)) return;
    throw std::invalid_argument(
        "a workgroup would walk " + std::to_string(rows) +
        " rows or as much, and this driver ends the loops of a shader after " +
        std::to_string(traits_.max_loop_iterations) +
        " iterations, which makes results wrong: use implementation='xla' or a hardware GPU");
  }

  // Tiles of some heads, counted over all batch entries.
  struct TileGrid {
    std::uint64_t tiles;  // of a head
    std::uint64_t heads;
    std::uint64_t first_head = 0;
  };

  // `share`: of the call's heads that the grid has.
  Dispatch& AddKernel(const KernelShape& shape, std::uint32_t features, const TileGrid& grid,
                      double flops_a_pair_and_column, double share = 1) {
    Dispatch& dispatch =
        builder_.Add(builder_.ModuleName(shape), shape, features, grid.tiles * grid.heads);
    dispatch.first_head = static_cast<std::uint32_t>(grid.first_head);
    dispatch.heads = static_cast<std::uint32_t>(grid.heads);
    dispatch.share = share;
    dispatch.flops_a_pair = flops_a_pair_and_column * params_.head_dim;
    dispatch.flops = dispatch.flops_a_pair * share * pairs_;
    return dispatch;
  }

  Dispatch& AddKeyKernel(const KernelShape& shape, std::uint32_t features, const TileGrid& grid,
                         const KeyPass& pass, double share = 1) {
    Dispatch& dispatch = AddKernel(shape, features, grid, pass.products, share);
    dispatch.specialization[kFeatures] |= pass.gradients;
    return dispatch;
  }

  std::uint64_t QueryTileCount(const KernelShape& shape) const {
    return DivideUp(params_.queries, shape.tile_rows / TileHeads(params_));
  }
  TileGrid QueryTiles(const KernelShape& shape) const {
    const std::uint64_t chunks = params_.query_heads / TileHeads(params_);
    return {QueryTileCount(shape), chunks * params_.batch_count};
  }
  TileGrid KeyTiles(const KernelShape& shape, std::uint64_t rows) const {
    return {DivideUp(rows, shape.tile_rows), std::uint64_t{params_.kv_heads} * params_.batch_count};
  }

  AttentionProblem problem_;
  const DeviceTraits& traits_;
  PlanBuilder builder_;  // of that problem
  AttentionParams& params_;
  const KernelFamily* family_ = nullptr;  // the most preferred of those that serve the plan
  double pairs_ = std::numeric_limits<double>::quiet_NaN();  // the device knows those of a plan
  // Whether lists differ along each batch axis and among heads, and number of those of one head.
  std::array<bool, MAX_BATCH_AXES> batches_differ_ = {};
  bool heads_differ_ = false;
  std::uint64_t batch_lists_ = 1;
};

}  // namespace

bool RowsAllowVectors(const AttentionParams& params, std::uint32_t elements) {
  std::uint32_t extents = params.head_dim;
  for (const int slot :
       {OPERAND_Q, OPERAND_K, OPERAND_V, OPERAND_OUT, OPERAND_DQ, OPERAND_DK, OPERAND_DV,
        OPERAND_DOUT, OPERAND_COARSE_K, OPERAND_COARSE_V, OPERAND_DCOARSE_K, OPERAND_DCOARSE_V}) {
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
