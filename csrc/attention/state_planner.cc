#include "attention/state_planner.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

#include "attention/checks.h"
#include "attention/kernels.h"
#include "attention/plan_shape.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kWantedThreads = 256;
constexpr double kNotCounted = std::numeric_limits<double>::quiet_NaN();
constexpr std::uint32_t kGranuleRows = 16;
constexpr std::uint32_t kRowThreads = 8;      // of a row of level biases
constexpr std::uint64_t kSquareColumns = 32;  // of a square of outer products
constexpr std::uint32_t kRowsOfTile = 64;
constexpr std::uint64_t kVarianceQuads = 4;  // of a workgroup of state_variance_gradient.comp
// As in shaders/common/state_product.glsl.
constexpr std::uint32_t kColumnQuads = 16;

// Which state a query sees.
constexpr std::uint32_t kStateFeatures = FEATURE_KV_LENGTHS | FEATURE_CAUSAL;

class StatePlanner {
 public:
  explicit StatePlanner(PlanBuilder& builder) : builder_(builder), params_(builder.params()) {}

  void AddMeans(bool with_level_biases) {
    AddCoarseRows(OPERAND_COARSE_K, params_.coarse_rows);
    AddCoarseRows(OPERAND_COARSE_V, params_.coarse_rows);
    if (Corrects()) AddStates(OPERAND_STATE, SuperTiles() + 1);
    AddByDtype("coarse_rows", FEATURE_KV_LENGTHS | FEATURE_CORRECTS, SuperTiles() * Heads());
    if (!Corrects()) return;
    builder_.AddBarrier();
    AddByDtype("state_covariance", FEATURE_KV_LENGTHS, Squares() * SuperTiles() * Heads());
    builder_.AddBarrier();
    AddVectorKernel("state_prefix");
    if (!with_level_biases) return;
    builder_.AddBarrier();
    AddLevelPairs(OPERAND_LEVEL_BIAS);
    AddByDtype("state_level_bias", FEATURE_CAUSAL, DivideUp(Rows(), Threads() / kRowThreads));
  }

  void AddCorrection() {
    builder_.AddBarrier();
    AddRowKernel(Shape("state_correction", TileRows()), kStateFeatures);
  }

  void AddCotangents() {
    if (WantsKeys()) {
      AddCoarseRows(OPERAND_DCOARSE_K, CoarseSumRows(params_));
      AddCoarseRows(OPERAND_DCOARSE_V, CoarseSumRows(params_));
    }
    if (!Corrects()) return;
    AddLevelPairs(OPERAND_DLEVEL_BIAS);
    AddLevelPairs(OPERAND_DSHARES);
    if (WantsKeys()) AddStates(OPERAND_DSTATE, std::max(Parts(), SuperTiles()));
    if (!builder_.Has(FEATURE_DOUT)) return;
    builder_.AddBarrier();
    AddRowKernel(Shape("state_cotangents", TileRows()), kStateFeatures);
    if (WantsKeys()) {
      AddByDtype("state_covariance_gradient", kStateFeatures, Squares() * Parts() * Heads());
    }
  }

  // Scratch of two float32 a row.
  void AddLevelPairs(std::uint32_t slot) {
    OperandLayout& layout = params_.operand[slot];
    layout.column_stride = 1;
    layout.head_stride = 2;
    layout.row_stride = 2 * params_.query_heads;
    const std::uint64_t words = std::uint64_t{2} * params_.queries * params_.query_heads;
    CheckIndex(words, "level biases");
    builder_.AddBatchScratch(slot, words);
  }

  void AddMeansGradients() {
    constexpr std::uint32_t kFeatures = kStateFeatures | FEATURE_DOUT;
    builder_.AddBarrier();
    if (Corrects() && builder_.Has(FEATURE_DQ)) {
      AddRowKernel(Shape("state_query_gradient", TileRows()), kFeatures);
    }
    if (!WantsKeys()) return;
    const CoarseListParts parts = CoarseListPartsOf(params_);
    if (parts.of_super_means > 1) {
      Dispatch& sums = AddByDtype("sum_parts", FEATURE_DCOARSE_K | FEATURE_DCOARSE_V,
                                  DivideUp(params_.coarse_rows * Quads(), Threads()) * Heads());
      sums.specialization.push_back(parts.of_means);
      sums.specialization.push_back(parts.of_super_means);
      if (!Corrects()) builder_.AddBarrier();
    }
    if (Corrects()) {
      if (builder_.Has(FEATURE_DK)) {
        AddByDtype("state_variance_gradient", kFeatures,
                   DivideUp(Quads(), kVarianceQuads) * Parts() * Heads());
      }
      builder_.AddBarrier();
      AddVectorKernel("state_suffix");
      builder_.AddBarrier();
    }
    AddByDtype("key_gradients", kFeatures | FEATURE_CORRECTS | FEATURE_DK | FEATURE_DV,
               DivideUp(params_.keys, TileRows()) * Heads(), TileRows());
  }

 private:
  bool WantsKeys() const { return builder_.Has(FEATURE_DK | FEATURE_DV); }
  bool Corrects() const { return builder_.Has(FEATURE_CORRECTS); }
  std::uint32_t Threads() const {
    return std::bit_floor(std::min(kWantedThreads, builder_.traits().max_workgroup_invocations));
  }
  KernelShape Shape(const char* shader, std::uint32_t tile_rows) const {
    return {shader, Threads(), tile_rows, kGranuleRows};
  }

  std::uint64_t SuperTileRows() const {
    return std::uint64_t{params_.super_tile_granules} * kGranuleRows;
  }
  std::uint64_t SuperTiles() const { return params_.coarse_rows - Granules(params_); }
  // Key/value heads of all batch entries.
  std::uint64_t Heads() const { return std::uint64_t{params_.kv_heads} * params_.batch_count; }
  std::uint64_t Rows() const {
    return std::uint64_t{params_.queries} * params_.query_heads * params_.batch_count;
  }
  std::uint64_t Quads() const { return DivideUp(params_.head_dim, 4); }
  std::uint64_t Squares() const {
    const std::uint64_t side = DivideUp(params_.head_dim, kSquareColumns);
    return side * side;
  }
  // As in shaders/common/state.glsl.
  std::uint64_t MeanVectors() const { return (4 * Quads() + 2) * Quads(); }
  std::uint64_t StateVectors() const { return MeanVectors() + 2 * Quads(); }

  Dispatch& AddByDtype(const KernelShape& shape, std::uint32_t features, std::uint64_t workgroups) {
    Dispatch& dispatch = builder_.Add(builder_.ModuleName(shape), shape, features, workgroups);
    dispatch.flops = kNotCounted;
    return dispatch;
  }
  Dispatch& AddByDtype(const char* shader, std::uint32_t features, std::uint64_t workgroups,
                       std::uint32_t tile_rows = kGranuleRows) {
    return AddByDtype(Shape(shader, tile_rows), features, workgroups);
  }

  // A kernel that runs along the states of each key/value head, a vector a thread.
  void AddVectorKernel(const char* shader) {
    builder_.Add(std::string(shader) + ".f32", Shape(shader, kGranuleRows), kStateFeatures,
                 DivideUp(MeanVectors() * Heads(), Threads()));
  }

  // A kernel whose tiles are rows of queries that see the same state.
  void AddRowKernel(const KernelShape& shape, std::uint32_t features) {
    const std::uint64_t rows = SuperTileRows() * (params_.query_heads / params_.kv_heads);
    AddByDtype(shape, features, DivideUp(rows, shape.tile_rows) * Parts() * Heads());
  }

  // So that a thread has a row at least.
  std::uint32_t TileRows() const { return std::max(kRowsOfTile, Threads() / kColumnQuads); }
  // Of the queries, by as many positions as a super-tile has keys.
  std::uint64_t Parts() const { return DivideUp(params_.queries, SuperTileRows()); }

  // Scratch in the dtype of the keys.
  void AddCoarseRows(std::uint32_t slot, std::uint64_t rows) {
    const std::uint64_t a_head = rows * params_.head_dim;
    OperandLayout& layout = params_.operand[slot];
    layout.column_stride = 1;
    layout.row_stride = params_.head_dim;
    layout.head_stride = CheckedStride(a_head);
    CheckIndex(a_head, "coarse rows");
    builder_.AddBatchRows(slot, a_head * params_.kv_heads);
  }

  void AddStates(std::uint32_t slot, std::uint64_t states) {
    const std::uint64_t a_head = states * 4 * StateVectors();
    CheckIndex(a_head, "states");
    params_.operand[slot].head_stride = CheckedStride(a_head);
    builder_.AddBatchScratch(slot, a_head * params_.kv_heads);
  }

  PlanBuilder& builder_;
  AttentionParams& params_;
};

}  // namespace

void AddMeans(PlanBuilder& builder, bool with_level_biases) {
  StatePlanner(builder).AddMeans(with_level_biases);
}

void AddShares(PlanBuilder& builder) { StatePlanner(builder).AddLevelPairs(OPERAND_SHARES); }

void AddCorrection(PlanBuilder& builder) { StatePlanner(builder).AddCorrection(); }

void AddCotangents(PlanBuilder& builder) { StatePlanner(builder).AddCotangents(); }

void AddMeansGradients(PlanBuilder& builder) { StatePlanner(builder).AddMeansGradients(); }

}  // namespace jax_aat
