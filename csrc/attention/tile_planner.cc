#include "attention/tile_planner.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "attention/checks.h"
#include "attention/plan_shape.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kWantedThreads = 256;
constexpr std::uint32_t kCountThreads = 64;
constexpr std::uint32_t kPriceTiles = 8;  // query tiles whose prices a workgroup counts
constexpr std::uint32_t kGranuleRows = 16;
// As in shaders/common/sub_queries.glsl.
constexpr std::uint32_t kSubQueryPositions = 16;
constexpr std::uint32_t kFinePositions = 4;
constexpr std::uint64_t kKeyTileGranules = 8;
constexpr std::uint32_t kHeaderWords = 4;  // of a tile's list
constexpr std::uint64_t kOthersWords = 4;  // OTHERS_WORDS of shaders/common/prices.glsl
// Workgroups of the router, each of which takes many tiles: scratch is not to grow with their
// number. Fewer than the most, but not than these, where the slabs of so many fit into out: 748 are
// as fast, 561 were not (131,072 keys, two stages, an H100: planning took 4.5 ms for 3.4).
constexpr std::uint64_t kMostSlabs = 1024, kManySlabs = 704;
constexpr std::uint64_t kMostSlabBytes = std::uint64_t{1} << 28;
constexpr std::uint64_t kSlabAlignment = 64;  // floats
constexpr std::uint32_t kCoopmatThreads = 128;
constexpr std::uint32_t kMatrixRows = 16;
// Shared memory of the router besides staged rows and notes, at most.
constexpr std::uint32_t RouterSharedBytes(std::uint32_t threads) { return 36 * threads + 2560; }
constexpr std::uint32_t kPortableStagedBytes = 8192;
// As in shaders/plan_price.comp.
constexpr std::uint32_t kHistogramWords = 2 * (1024 + 32);
enum PriceStage { kClear, kCoarse, kFine, kChoose };
// As in shaders/plan_key_lists.comp.
enum KeyListStage { kCount, kList };

class TilePlanner {
 public:
  explicit TilePlanner(PlanBuilder& builder) : builder_(builder), params_(builder.params()) {}

  void Plan() {
    const bool makes_prices = !builder_.Has(FEATURE_PRICES);
    const bool makes_lists = builder_.Has(FEATURE_MAKES_LISTS);
    const bool keeps_levels = builder_.problem().keeps_levels;
    if (!keeps_levels) AddHeaders();
    if (builder_.Has(FEATURE_SEGMENTS)) AddSegmentRanges();
    if (builder_.Has(FEATURE_SPARE_ROWS)) {
      builder_.AddBatchScratch(OPERAND_HISTOGRAM, kHistogramWords);
      AddPriceStage(kClear,
                    DivideUp(kHistogramWords * std::uint64_t{params_.batch_count}, Threads()));
    }
    builder_.BeginSharedScratch();
    PlanBuilder::Ends prices = builder_.scratch_ends();
    if (makes_prices) {
      if (makes_lists) AddPrices();
      prices = builder_.scratch_ends();
      AddRouter();
    }
    builder_.ShareScratch();
    // Lists are made when all prices have become levels, levels when the router has made these. Of
    // all these the kernels of attention read the entries alone.
    if (!builder_.problem().keeps_lists) AddEntries();
    if (!keeps_levels) {
      builder_.AddScratchFrom(prices);
      AddRows(OPERAND_LEVELS, params_.plan_tiles, LevelWords(params_), Life::kPlanning);
    }
    builder_.EndSharedScratch();
    if (!makes_lists) return;
    if (builder_.Has(FEATURE_SPARE_ROWS)) {
      const std::uint64_t parts =
          DivideUp(std::uint64_t{Lists()} * params_.plan_tiles, kPriceTiles) * params_.batch_count;
      for (const PriceStage stage : {kCoarse, kFine}) {
        builder_.AddBarrier();
        AddPriceStage(stage, parts);
      }
      builder_.AddBarrier();
      AddPriceStage(kChoose, params_.batch_count);
    }
    AddLists();
  }

 private:
  std::uint32_t Lists() const { return params_.query_heads / TileHeads(params_); }
  std::uint64_t Tiles() const {
    return std::uint64_t{Lists()} * params_.plan_tiles * params_.batch_count;
  }
  std::uint32_t Threads() const {
    return std::bit_floor(std::min(kWantedThreads, builder_.traits().max_workgroup_invocations));
  }

  Dispatch& Add(const char* shader, std::uint32_t features, std::uint64_t workgroups) {
    const KernelShape shape = {shader, Threads(), PlanTileRows(params_), kGranuleRows};
    return builder_.AddListKernel(shader, shape, features, workgroups);
  }

  // The ids of segments that occur in granules, super-tiles and query tiles.
  void AddSegmentRanges() {
    builder_.AddBatchScratch(OPERAND_SEGMENT_RANGES,
                             2 * (std::uint64_t{params_.coarse_rows} + params_.plan_tiles));
    const std::uint64_t super_tiles = params_.coarse_rows - Granules(params_);
    Dispatch& dispatch =
        Add("segment_ranges", kVisibilityFeatures,
            (super_tiles + DivideUp(params_.plan_tiles, params_.super_tile_granules)) *
                params_.batch_count);
    dispatch.specialization[kThreads] = params_.super_tile_granules;
  }

  // As scratch, where the lists of a plan begin that nobody keeps anything of.
  void AddHeaders() {
    AddRows(OPERAND_LIST_HEADERS, params_.plan_tiles, kHeaderWords);
    if (builder_.Has(FEATURE_SPARE_ROWS)) AddRows(OPERAND_LAMBDA, 1, 1);
  }

  // As scratch, lists that nobody keeps, one after the other: what one does not need another may.
  void AddEntries() {
    const std::uint64_t entries = std::uint64_t{params_.list_capacity} * Lists();
    CheckIndex(entries, "work lists");
    params_.list_capacity = static_cast<std::uint32_t>(entries);
    params_.operand[OPERAND_LIST_ENTRIES].head_stride = 0;
    params_.operand[OPERAND_LIST_ENTRIES].column_stride = 1;
    builder_.AddBatchScratch(OPERAND_LIST_ENTRIES, entries);
  }

  // Scratch of so many rows a list, of so many words each.
  void AddRows(std::uint32_t slot, std::uint32_t rows, std::uint32_t words,
               Life life = Life::kCall) {
    OperandLayout& layout = params_.operand[slot];
    const std::uint64_t a_list = std::uint64_t{rows} * words;
    layout.head_stride = CheckedStride(a_list);
    layout.row_stride = words;
    layout.column_stride = 1;
    builder_.AddBatchScratch(slot, a_list * Lists(), life);
  }

  // As scratch (shaders/common/prices.glsl): of what tiles look into alone, where that is less.
  void AddPrices() {
    OperandLayout& layout = params_.operand[OPERAND_PRICES];
    layout.row_stride = Granules(params_);
    const std::uint64_t brief = params_.judged_key_tiles * (1 + kKeyTileGranules) + kOthersWords;
    if (IsForemost() && brief < layout.row_stride) {
      params_.priced_key_tiles = params_.judged_key_tiles;
      layout.row_stride = static_cast<std::uint32_t>(brief);
    }
    const std::uint64_t a_list = std::uint64_t{params_.plan_tiles} * layout.row_stride;
    layout.head_stride = CheckedStride(a_list);
    layout.column_stride = 1;
    builder_.AddBatchScratch(OPERAND_PRICES, a_list * Lists(), Life::kPlanning);
  }

  // Summaries of keys and values, then the prices of all granules of all tiles.
  void AddRouter() {
    const KernelShape router = RouterShape();
    const bool on_matrices = router.required_subgroup_size != 0;
    const std::uint64_t summary = SummaryFloats(on_matrices);
    params_.operand[OPERAND_KEY_SUMMARIES].head_stride = CheckedStride(summary);
    builder_.AddBatchScratch(OPERAND_KEY_SUMMARIES, summary * params_.kv_heads, Life::kPlanning);
    const std::uint32_t shared_notes = SharedNotes(router);
    const std::uint64_t slab = SlabFloats(shared_notes != 1, on_matrices);
    std::uint64_t workgroups =
        std::clamp<std::uint64_t>(kMostSlabBytes / (4 * slab), 1, std::min(kMostSlabs, Tiles()));
    const std::uint64_t fitting = builder_.out_room() / (4 * slab);
    if (fitting >= kManySlabs) workgroups = std::min(workgroups, fitting);
    params_.operand[OPERAND_ROUTER_SCRATCH].head_stride = CheckedStride(slab);
    builder_.AddScratch(OPERAND_ROUTER_SCRATCH, slab * workgroups * 4, Life::kPlanning);

    KernelShape processor = {"tile_processor", Threads(), PlanTileRows(params_), kGranuleRows};
    builder_
        .Add(builder_.ModuleName(processor), processor, kVisibilityFeatures,
             SuperTiles() * params_.kv_heads * params_.batch_count)
        .specialization.push_back(on_matrices ? 1 : 0);
    builder_.AddBarrier();
    Dispatch& dispatch = builder_.Add(builder_.ModuleName(router), router,
                                      kVisibilityFeatures | FEATURE_SOFT_CAP, workgroups);
    dispatch.flops = std::numeric_limits<double>::quiet_NaN();  // not counted
    dispatch.specialization.push_back(params_.level_count);
    dispatch.specialization.push_back(params_.candidate_share > 0 ? 2 : 1);
    dispatch.specialization.push_back(IsForemost() ? 1 : 0);
    dispatch.specialization.push_back(shared_notes);
  }

  // On cooperative matrices where they serve: they would round what float32 operands say.
  KernelShape RouterShape() const {
    KernelShape shape = {"cross_tile_router", Threads(), PlanTileRows(params_), kGranuleRows};
    const DeviceTraits& traits = builder_.traits();
    if (builder_.problem().dtype != DTYPE_F32 && HasMatrices(DTYPE_F16, traits) &&
        params_.head_dim % 16 == 0 && params_.head_dim <= 128 && shape.tile_rows >= 64 &&
        CoopmatStagedBytes() + RouterSharedBytes(kCoopmatThreads) <= traits.max_shared_memory) {
      shape.shader = "cross_tile_router_coopmat";
      shape.relays = !traits.coopmat_layout_known;
      shape.threads = kCoopmatThreads;
      shape.required_subgroup_size = 32;
    }
    return shape;
  }

  // With what elements pass through where the layout of matrices is not known.
  std::uint32_t CoopmatStagedBytes() const {
    const bool relays = !builder_.traits().coopmat_layout_known;
    return kCoopmatThreads / 2 * (params_.head_dim / 4 + 1) * 16 +
           (relays ? RelayBytes(kCoopmatThreads / 32) : 0);
  }

  // Words of notes that the router keeps in shared memory, or 1 where they do not fit. Few numbers,
  // as each makes another pipeline.
  std::uint32_t SharedNotes(const KernelShape& router) const {
    const std::uint32_t used =
        RouterSharedBytes(router.threads) +
        (router.required_subgroup_size != 0 ? CoopmatStagedBytes() : kPortableStagedBytes);
    for (const std::uint32_t words : {1024u, 2048u, 4096u}) {
      if (words < Notes()) continue;
      // Beside them lie the key tiles that a tile looks into, where these are not all.
      const std::uint32_t bytes = used + 4 * (words + (IsForemost() ? words / 8 : 0));
      return bytes <= builder_.traits().max_shared_memory ? words : 1;
    }
    return 1;
  }

  // Of the granules that a tile looks into.
  std::uint64_t Places() const { return params_.judged_key_tiles * kKeyTileGranules; }
  // Of these, or of key tiles.
  std::uint64_t Notes() const {
    return IsForemost() ? std::max<std::uint64_t>(Places(), KeyTiles(params_)) : Places();
  }

  std::uint64_t SuperTiles() const { return params_.coarse_rows - Granules(params_); }
  // Whether tiles look into some key tiles only.
  bool IsForemost() const { return params_.judged_key_tiles < KeyTiles(params_); }

  // Of one batch entry and key/value head (shaders/common/summaries.glsl).
  std::uint64_t SummaryFloats(bool in_halves) const {
    const std::uint64_t quads = DivideUp(params_.head_dim, 4);
    const std::uint64_t granules = SuperTiles() * params_.super_tile_granules;
    const std::uint64_t key_tiles = granules / kKeyTileGranules;
    const std::uint64_t parts = params_.candidate_share > 0 ? 4 : 0;
    const std::uint64_t keys = (in_halves ? 1 : 2) * (1 + parts) * quads;
    return 4 * (granules * (keys + quads + 1) + (SuperTiles() + 15) * quads + SuperTiles() +
                (2 * key_tiles + 15) * quads);
  }

  // What a workgroup of the router notes of a tile (shaders/common/router_slab.glsl).
  std::uint64_t SlabFloats(bool notes_are_shared, bool in_halves) const {
    const std::uint64_t quads = DivideUp(params_.head_dim, 4);
    const std::uint64_t sub_positions = std::min(params_.plan_positions, kSubQueryPositions);
    const std::uint64_t subs = params_.plan_positions / sub_positions * TileHeads(params_);
    const bool has_stage_2 = params_.candidate_share > 0;
    const std::uint64_t fine_subs =
        has_stage_2
            ? subs * (sub_positions / std::min<std::uint64_t>(sub_positions, kFinePositions))
            : 0;
    const double wanted = std::ceil(params_.candidate_share * Granules(params_));
    const std::uint64_t candidates =
        std::min<std::uint64_t>(static_cast<std::uint64_t>(wanted), Places()) + 1;
    const std::uint64_t quads_of_subs = DivideUp(subs, 4);
    const std::uint64_t of_key_tiles =
        IsForemost() ? KeyTiles(params_) * (4 * quads_of_subs + 2) : 0;
    const std::uint64_t notes = notes_are_shared ? 0 : Notes();
    const std::uint64_t queries =
        in_halves ? (kMatrixRows + fine_subs) * quads * 4 : (subs + fine_subs) * quads * 8;
    const std::uint64_t floats = queries + Places() * (8 * quads_of_subs + 1) + notes +
                                 of_key_tiles + SuperTiles() * subs + candidates * fine_subs;
    return DivideUp(floats, kSlabAlignment) * kSlabAlignment;
  }

  void AddPriceStage(PriceStage stage, std::uint64_t workgroups) {
    Dispatch& dispatch = Add("plan_price", 0, workgroups);
    dispatch.specialization[kTileRows] = kPriceTiles;
    dispatch.specialization.push_back(stage);
  }

  void AddLists() {
    builder_.AddBarrier();
    Add("plan_levels", kVisibilityFeatures | FEATURE_PREVIOUS_LEVELS, Tiles());
    builder_.AddBarrier();
    const std::uint32_t are_joined = builder_.problem().keeps_lists ? 0 : 1;
    Add("plan_list_starts", 0, std::uint64_t{Lists()} * params_.batch_count)
        .specialization.push_back(are_joined);
    AddKeyLists(kCount);
    builder_.AddBarrier();
    Add("plan_lists", kVisibilityFeatures, Tiles()).specialization.push_back(are_joined);
    AddKeyLists(kList);
  }

  void AddKeyLists(KeyListStage stage) {
    if (!builder_.Has(FEATURE_MAKES_KEY_LISTS)) return;
    const std::uint64_t tiles =
        std::uint64_t{KeyListTiles(params_)} * params_.kv_heads * params_.batch_count;
    Add("plan_key_lists", 0, tiles).specialization.push_back(stage);
  }

  PlanBuilder& builder_;
  AttentionParams& params_;
};

}  // namespace

void AddTilePlan(PlanBuilder& builder) { TilePlanner(builder).Plan(); }

void AddWorkCounts(PlanBuilder& builder) {
  const AttentionParams& params = builder.params();
  const std::uint64_t lists =
      std::uint64_t{params.query_heads / TileHeads(params)} * params.batch_count;
  const KernelShape shape = {"count_work", kCountThreads, PlanTileRows(params), kGranuleRows};
  builder.AddBarrier();
  builder.AddListKernel(shape.shader, shape, 0, lists);
  builder.CountLists(lists);
}

}  // namespace jax_aat
