#include "ffi/call.h"

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "attention/kernels.h"
#include "attention/plan_shape.h"
#include "ffi/slots.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

namespace ffi = xla::ffi;

template <typename... Parts>
[[noreturn]] void Refuse(const Parts&... parts) {
  throw std::invalid_argument(Concat("jax_aat: ", parts...));
}

struct PassSlots {
  std::uint64_t required_operands;
  std::uint64_t optional_operands;
  std::uint64_t required_results;
  std::uint64_t optional_results;
};

constexpr std::uint64_t kQkv = Bit(OPERAND_Q) | Bit(OPERAND_K) | Bit(OPERAND_V);
constexpr std::uint64_t kLengthsAndSegments = Bit(OPERAND_Q_LENGTHS) | Bit(OPERAND_KV_LENGTHS) |
                                              Bit(OPERAND_Q_SEGMENTS) | Bit(OPERAND_KV_SEGMENTS);
constexpr std::uint64_t kKeyLists = Bit(OPERAND_KEY_LIST_HEADERS) | Bit(OPERAND_KEY_LIST_ENTRIES);
constexpr std::uint64_t kLevelsAndLists =
    Bit(OPERAND_LEVELS) | Bit(OPERAND_LIST_HEADERS) | Bit(OPERAND_LIST_ENTRIES) | kKeyLists;
constexpr std::uint64_t kCoarseRows = Bit(OPERAND_COARSE_K) | Bit(OPERAND_COARSE_V);
constexpr std::uint64_t kMeans = kCoarseRows | Bit(OPERAND_LEVEL_BIAS);

// A call that plans has one of them.
constexpr std::uint64_t kGoals = Bit(OPERAND_SPARE_ROWS) | Bit(OPERAND_LAMBDA);

// Of the pass that makes a plan, or prices only, or of what attends by a plan of its own, which may
// keep nothing of it, or no lists, or no transposed ones.
PassSlots SlotsOfPlanning(const CallAttributes& attributes, bool attends) {
  const auto keeps = [&](std::uint64_t slots) { return (attributes.results & slots) != 0; };
  if (!attends && !keeps(kLevelsAndLists) && !(attributes.operands & kGoals)) {
    return {kQkv, kLengthsAndSegments, Bit(OPERAND_PRICES), 0};
  }
  std::uint64_t kept = 0;
  if (keeps(kKeyLists)) {
    kept = kLevelsAndLists;
  } else if (!attends || keeps(Bit(OPERAND_LIST_ENTRIES))) {
    kept = kLevelsAndLists & ~kKeyLists;
  } else if (keeps(Bit(OPERAND_LEVELS))) {
    kept = Bit(OPERAND_LEVELS) | Bit(OPERAND_LIST_HEADERS);
  }
  if (attributes.operands & Bit(OPERAND_SPARE_ROWS)) {
    return {kQkv | Bit(OPERAND_SPARE_ROWS), kLengthsAndSegments | Bit(OPERAND_PRICES),
            kept == 0 ? 0 : kept | Bit(OPERAND_LAMBDA), 0};
  }
  return {kQkv | Bit(OPERAND_LAMBDA),
          kLengthsAndSegments | Bit(OPERAND_PRICES) | Bit(OPERAND_PREVIOUS_LEVELS), kept, 0};
}

PassSlots SlotsOf(Pass pass, const CallAttributes& attributes) {
  constexpr std::uint64_t kOut = Bit(OPERAND_OUT) | Bit(OPERAND_LSE);
  constexpr std::uint64_t kRowCounts = Bit(OPERAND_ROW_COUNTS);
  constexpr std::uint64_t kPlanDerivatives =
      Bit(OPERAND_DCOARSE_K) | Bit(OPERAND_DCOARSE_V) | Bit(OPERAND_DLEVEL_BIAS);
  if (pass == Pass::kForward && (attributes.operands & kGoals)) {
    // Makes its plan itself.
    PassSlots slots = SlotsOfPlanning(attributes, /*attends=*/true);
    slots.required_results |= kOut;
    slots.optional_results |= Bit(OPERAND_SHARES);
    return slots;
  }
  const bool planned = (attributes.operands & (kLevelsAndLists | kMeans)) != 0;
  // Tangents of coarse rows have to be given, and so have the rows.
  const bool given = planned && (pass == Pass::kTangent || (attributes.operands & kMeans) != 0);
  const std::uint64_t inputs = kQkv | (planned ? kLevelsAndLists : 0) | (given ? kCoarseRows : 0);
  const std::uint64_t options = Bit(OPERAND_BIAS) | Bit(OPERAND_MASK) | kLengthsAndSegments |
                                (given ? Bit(OPERAND_LEVEL_BIAS) : 0);
  const std::uint64_t out = kOut | (planned ? Bit(OPERAND_SHARES) : 0);
  const std::uint64_t derivatives = Bit(OPERAND_DQ) | Bit(OPERAND_DK) | Bit(OPERAND_DV) |
                                    Bit(OPERAND_DBIAS) | (given ? kPlanDerivatives : 0);
  const std::uint64_t out_derivatives =
      Bit(OPERAND_DOUT) | Bit(OPERAND_DLSE) | (given ? Bit(OPERAND_DSHARES) : 0);
  switch (pass) {
    case Pass::kForward:
      return {inputs, options, out, kRowCounts};
    case Pass::kTangent:
      return {inputs | out, options | derivatives, out_derivatives, 0};
    case Pass::kBackward:
      return {inputs | out, options | out_derivatives, 0, derivatives};
    case Pass::kPlan:
      break;
  }
  return SlotsOfPlanning(attributes, /*attends=*/false);
}

void CheckPresence(const char* what, std::uint64_t present, std::uint64_t required,
                   std::uint64_t optional) {
  for (std::uint32_t slot = 0; slot < 64; ++slot) {
    const std::uint64_t bit = Bit(slot);
    if ((present & bit) && !((required | optional) & bit)) {
      Refuse("slot ", slot, " is not among the ", what, " of this pass.");
    }
    if ((required & bit) && !(present & bit)) {
      Refuse(Slots()[slot].name, " is missing among the ", what, ".");
    }
  }
}

std::optional<std::uint32_t> FloatDtype(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return DTYPE_F32;
    case ffi::DataType::F16:
      return DTYPE_F16;
    case ffi::DataType::BF16:
      return DTYPE_BF16;
    default:
      return std::nullopt;
  }
}

// Collects the buffers of a call, then derives the problem from their shapes.
class CallBuilder {
 public:
  CallBuilder(Pass pass, const CallAttributes& attributes) : attributes_(attributes) {
    problem().pass = pass;
  }

  void Add(std::uint32_t slot, const ffi::AnyBuffer& buffer, bool result) {
    buffers_[slot] = buffer;
    call_.buffers[slot] = {buffer.untyped_data(), buffer.size_bytes(), result};
  }

  AttentionCall Build() {
    FindDtypes();
    FindExtents();
    for (std::uint32_t slot = 0; slot < kCallSlots; ++slot) {
      if (buffers_[slot]) SetLayout(slot);
    }
    SetDbiasExtent();
    SetOptions();
    return call_;
  }

 private:
  AttentionProblem& problem() { return call_.problem; }
  AttentionParams& params() { return call_.problem.params; }
  bool Has(std::uint32_t slot) const { return buffers_[slot].has_value(); }

  // Whether it attends by a plan of its own.
  bool Plans() const {
    return call_.problem.pass == Pass::kForward && (attributes_.operands & kGoals) != 0;
  }

  void SetFeature(std::uint32_t bit, bool on) {
    if (on) problem().features |= bit;
  }

  void FindDtypes() {
    const auto dtype_of = [this](std::uint32_t slot) {
      const auto dtype = FloatDtype(buffers_[slot]->element_type());
      if (!dtype) Refuse(Slots()[slot].name, " must be float32, float16 or bfloat16.");
      return *dtype;
    };
    problem().dtype = dtype_of(OPERAND_Q);
    if (Has(OPERAND_BIAS)) problem().bias_dtype = dtype_of(OPERAND_BIAS);
    if (Has(OPERAND_DBIAS) && !Has(OPERAND_BIAS)) Refuse("dbias needs bias.");
    for (std::uint32_t slot = 0; slot < kCallSlots; ++slot) {
      if (buffers_[slot]) CheckDtype(slot);
    }
  }

  void CheckDtype(std::uint32_t slot) {
    const ffi::DataType type = buffers_[slot]->element_type();
    const std::string_view name = Slots()[slot].name;
    switch (Slots()[slot].type) {
      case SlotType::kLikeQuery:
        if (FloatDtype(type) != problem().dtype) Refuse(name, " must have the dtype of q.");
        break;
      case SlotType::kLikeBias:
        if (FloatDtype(type) != problem().bias_dtype) Refuse(name, " must have the dtype of bias.");
        break;
      case SlotType::kFloat32:
        if (type != ffi::DataType::F32) Refuse(name, " must be float32.");
        break;
      case SlotType::kBool:
        if (type != ffi::DataType::PRED) Refuse(name, " must be boolean.");
        break;
      case SlotType::kInt32:
        if (type != ffi::DataType::S32) Refuse(name, " must be int32.");
        break;
      case SlotType::kUint32:
        if (type != ffi::DataType::U32) Refuse(name, " must be uint32.");
        break;
    }
  }

  // The extents of all axes; along a batch axis the largest size that any operand has.
  void FindExtents() {
    const std::size_t query_rank = buffers_[OPERAND_Q]->dimensions().size();
    if (query_rank < 3 || query_rank > MAX_BATCH_AXES + 3) {
      Refuse("q has ", query_rank, " axes, 3 to ", MAX_BATCH_AXES + 3, " are served.");
    }
    batch_axes_ = query_rank - 3;
    std::ranges::fill(params().batch, 1u);
    for (std::uint32_t slot = 0; slot < kCallSlots; ++slot) {
      if (!buffers_[slot]) continue;
      const auto dimensions = buffers_[slot]->dimensions();
      const std::size_t rank = batch_axes_ + Slots()[slot].axes.size();
      if (dimensions.size() != rank) {
        Refuse(Slots()[slot].name, " has ", dimensions.size(), " axes, ", rank, " are expected.");
      }
      std::uint64_t elements = 1;
      for (const std::int64_t size : dimensions) {
        if (size < 1) Refuse(Slots()[slot].name, " has an axis of size ", size, ".");
        elements *= static_cast<std::uint64_t>(size);
        if (elements > UINT32_MAX) Refuse(Slots()[slot].name, " has 2^32 elements or more.");
      }
      for (std::size_t i = 0; i < batch_axes_; ++i) {
        std::uint32_t& extent = params().batch[FirstBatchAxis() + i];
        extent = std::max(extent, static_cast<std::uint32_t>(dimensions[i]));
      }
    }
    std::uint64_t count = 1;
    for (const std::uint32_t extent : params().batch) {
      count *= extent;
      if (count > UINT32_MAX) Refuse("there are 2^32 batch entries or more.");
    }
    params().batch_count = static_cast<std::uint32_t>(count);

    const auto trailing = [this](std::uint32_t slot, std::size_t axis) {
      return static_cast<std::uint32_t>(buffers_[slot]->dimensions()[batch_axes_ + axis]);
    };
    params().queries = trailing(OPERAND_Q, 0);
    params().query_heads = trailing(OPERAND_Q, 1);
    params().head_dim = trailing(OPERAND_Q, 2);
    params().keys = trailing(OPERAND_K, 0);
    params().kv_heads = trailing(OPERAND_K, 1);
    if (params().query_heads % params().kv_heads != 0) {
      Refuse("the ", params().query_heads, " heads of q are no multiple of the ", params().kv_heads,
             " heads of k and v.");
    }
    if (Has(OPERAND_LIST_ENTRIES)) {
      SetPlanShape(params(), attributes_.query_tile, attributes_.super_tile,
                   trailing(OPERAND_LIST_ENTRIES, 1),
                   Has(OPERAND_KEY_LIST_ENTRIES) ? trailing(OPERAND_KEY_LIST_ENTRIES, 1) : 0);
    } else if (problem().pass == Pass::kPlan || Plans()) {
      const std::uint32_t capacity = Plans() ? attributes_.list_capacity : 0;
      SetPlanShape(params(), attributes_.query_tile, attributes_.super_tile, capacity, 0);
    }
  }

  // Batch axes are kept at the end of the four, so that the last is the innermost.
  std::size_t FirstBatchAxis() const { return MAX_BATCH_AXES - batch_axes_; }

  std::uint32_t Extent(Axis axis) {
    switch (axis) {
      case Axis::kQueries:
        return params().queries;
      case Axis::kKeys:
        return params().keys;
      case Axis::kQueryHeads:
        return params().query_heads;
      case Axis::kKvHeads:
        return params().kv_heads;
      case Axis::kHeadDim:
        return params().head_dim;
      case Axis::kCoarseRows:
        return params().coarse_rows;
      case Axis::kLevelCount:
        return 2;
      case Axis::kLists:
        return params().query_heads / TileHeads(params());
      case Axis::kPlanTiles:
        return params().plan_tiles;
      case Axis::kLevelWords:
        return LevelWords(params());
      case Axis::kGranules:
        return Granules(params());
      case Axis::kHeaderWords:
        return 4;
      case Axis::kListEntries:
        return params().list_capacity;
      case Axis::kKeyListTiles:
        return KeyListTiles(params());
      case Axis::kKeyListEntries:
        break;
    }
    return params().key_list_capacity;
  }

  static bool IsColumn(Axis axis) {
    switch (axis) {
      case Axis::kHeadDim:
      case Axis::kLevelCount:
      case Axis::kLevelWords:
      case Axis::kGranules:
      case Axis::kHeaderWords:
      case Axis::kListEntries:
      case Axis::kKeyListEntries:
        return true;
      default:
        return false;
    }
  }

  // Checks the sizes of a buffer and sets its strides: row-major, 0 along broadcast axes.
  void SetLayout(std::uint32_t slot) {
    const Slot& description = Slots()[slot];
    const auto dimensions = buffers_[slot]->dimensions();
    OperandLayout& layout = params().operand[slot];
    // Results cover the whole batch; only the gradient of bias may be summed over axes of it.
    const bool full_batch = call_.buffers[slot].result && slot != OPERAND_DBIAS;
    std::uint32_t stride = 1;
    const auto take = [&](std::size_t axis, std::uint32_t extent, bool may_broadcast) {
      const auto size = static_cast<std::uint32_t>(dimensions[axis]);
      if (size != extent && !(size == 1 && may_broadcast)) {
        Refuse("axis ", axis, " of ", description.name, " has size ", size, ", ", extent,
               may_broadcast ? " or 1 is" : " is", " expected.");
      }
      const std::uint32_t own = size == extent ? stride : 0;
      stride *= size;
      return own;
    };
    const bool logits = description.broadcast_axes;
    for (std::size_t i = description.axes.size(); i-- > 0;) {
      const Axis axis = description.axes[i];
      const std::uint32_t own = take(batch_axes_ + i, Extent(axis), description.broadcast_axes);
      if (axis == Axis::kQueryHeads || axis == Axis::kKvHeads || axis == Axis::kLists) {
        layout.head_stride = own;
      } else if (IsColumn(axis) || (logits && axis == Axis::kKeys)) {
        layout.column_stride = own;
      } else {
        layout.row_stride = own;
      }
    }
    for (std::size_t i = batch_axes_; i-- > 0;) {
      const std::size_t axis = FirstBatchAxis() + i;
      layout.batch_stride[axis] = take(i, params().batch[axis], !full_batch);
    }
  }

  void SetDbiasExtent() {
    if (problem().pass != Pass::kBackward || !Has(OPERAND_DBIAS)) return;
    const auto dimensions = buffers_[OPERAND_DBIAS]->dimensions();
    problem().dbias_extent.fill(1);
    for (std::size_t i = 0; i < dimensions.size(); ++i) {
      problem().dbias_extent[FirstBatchAxis() + i] = static_cast<std::uint32_t>(dimensions[i]);
    }
  }

  void SetOptions() {
    if (Has(OPERAND_Q_SEGMENTS) != Has(OPERAND_KV_SEGMENTS)) {
      Refuse("segment ids must be given for both queries and keys.");
    }
    if (attributes_.window_left < -1 || attributes_.window_right < -1) {
      Refuse("a window is -1 (unbounded) or not negative.");
    }
    if (!(attributes_.soft_cap >= 0)) Refuse("soft_cap is 0 (none) or positive.");
    params().window_left = attributes_.window_left;
    params().window_right = attributes_.window_right;
    params().scale = attributes_.scale;
    params().soft_cap = attributes_.soft_cap;

    SetFeature(FEATURE_CAUSAL, attributes_.causal != 0);
    SetFeature(FEATURE_WINDOW, attributes_.window_left >= 0 || attributes_.window_right >= 0);
    SetFeature(FEATURE_SOFT_CAP, attributes_.soft_cap != 0);
    SetFeature(FEATURE_Q_LENGTHS, Has(OPERAND_Q_LENGTHS));
    SetFeature(FEATURE_KV_LENGTHS, Has(OPERAND_KV_LENGTHS));
    SetFeature(FEATURE_SEGMENTS, Has(OPERAND_Q_SEGMENTS));
    SetFeature(FEATURE_MASK, Has(OPERAND_MASK));
    SetFeature(FEATURE_BIAS, Has(OPERAND_BIAS));
    SetFeature(FEATURE_DQ, Has(OPERAND_DQ));
    SetFeature(FEATURE_DK, Has(OPERAND_DK));
    SetFeature(FEATURE_DV, Has(OPERAND_DV));
    SetFeature(FEATURE_DBIAS, Has(OPERAND_DBIAS));
    const bool is_planned = Has(OPERAND_LEVELS) || Plans();
    SetFeature(FEATURE_PLAN, is_planned || problem().pass == Pass::kPlan);
    const bool makes_means = is_planned && problem().pass != Pass::kPlan && !Has(OPERAND_COARSE_K);
    const bool corrects = makes_means && attributes_.corrects != 0;
    SetFeature(FEATURE_MAKES_MEANS, makes_means);
    SetFeature(FEATURE_CORRECTS, corrects);
    SetFeature(FEATURE_LEVEL_BIAS, Has(OPERAND_LEVEL_BIAS) || corrects);
    SetFeature(FEATURE_DCOARSE_K, Has(OPERAND_DCOARSE_K));
    SetFeature(FEATURE_DCOARSE_V, Has(OPERAND_DCOARSE_V));
    SetFeature(FEATURE_DLEVEL_BIAS, Has(OPERAND_DLEVEL_BIAS));
    SetFeature(FEATURE_ROW_COUNTS, Has(OPERAND_ROW_COUNTS));
    SetFeature(FEATURE_SHARES, problem().pass == Pass::kForward && Has(OPERAND_SHARES));
    if (problem().pass == Pass::kBackward) {
      SetFeature(FEATURE_DOUT, Has(OPERAND_DOUT));
      SetFeature(FEATURE_DLSE, Has(OPERAND_DLSE));
      SetFeature(FEATURE_DSHARES, Has(OPERAND_DSHARES) || (corrects && Has(OPERAND_DOUT)));
      SetFeature(FEATURE_DCOARSE_K, makes_means && Has(OPERAND_DK));
      SetFeature(FEATURE_DCOARSE_V, makes_means && Has(OPERAND_DV));
      SetFeature(FEATURE_DLEVEL_BIAS, corrects && (Has(OPERAND_DQ) || Has(OPERAND_DK)));
    }
    if (problem().pass == Pass::kPlan || Plans()) SetPlanningOptions();
  }

  void SetPlanningOptions() {
    params().level_count = attributes_.level_count;
    params().candidate_share = attributes_.candidate_share;
    params().floor_share = attributes_.floor_share;
    params().judged_key_tiles = attributes_.judged_key_tiles;
    SetFeature(FEATURE_PRICES, Has(OPERAND_PRICES) && !call_.buffers[OPERAND_PRICES].result);
    SetFeature(FEATURE_SPARE_ROWS, Has(OPERAND_SPARE_ROWS));
    SetFeature(FEATURE_PREVIOUS_LEVELS, Has(OPERAND_PREVIOUS_LEVELS));
    SetFeature(FEATURE_MAKES_LISTS, Has(OPERAND_LEVELS) || Plans());
    problem().keeps_levels = Has(OPERAND_LEVELS) || !Plans();
    problem().keeps_lists = Has(OPERAND_LIST_ENTRIES) || !Plans();
    SetFeature(FEATURE_MAKES_KEY_LISTS, Has(OPERAND_KEY_LIST_HEADERS));
  }

  const CallAttributes& attributes_;
  AttentionCall call_;
  std::array<std::optional<ffi::AnyBuffer>, kCallSlots> buffers_;
  std::size_t batch_axes_ = 0;
};

}  // namespace

AttentionCall MakeCall(Pass pass, const CallAttributes& attributes, ffi::RemainingArgs args,
                       ffi::RemainingRets rets) {
  const PassSlots slots = SlotsOf(pass, attributes);
  CheckPresence("arguments", attributes.operands, slots.required_operands, slots.optional_operands);
  CheckPresence("results", attributes.results, slots.required_results, slots.optional_results);
  const auto check_count = [](const char* what, std::uint64_t bits, std::size_t count) {
    const auto expected = static_cast<std::size_t>(std::popcount(bits));
    if (count != expected) {
      Refuse("there are ", count, " ", what, ", the attribute says ", expected, ".");
    }
  };
  check_count("arguments", attributes.operands, args.size());
  check_count("results", attributes.results, rets.size());

  CallBuilder builder(pass, attributes);
  std::size_t next_argument = 0;
  std::size_t next_result = 0;
  for (std::uint32_t slot = 0; slot < kCallSlots; ++slot) {
    if (attributes.operands & Bit(slot)) {
      builder.Add(slot, args.get<ffi::AnyBuffer>(next_argument++).value(), false);
    }
    if (attributes.results & Bit(slot)) {
      builder.Add(slot, *rets.get<ffi::AnyBuffer>(next_result++).value(), true);
    }
  }
  return builder.Build();
}

}  // namespace jax_aat
