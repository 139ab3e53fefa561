#include "ffi/slots.h"

namespace jax_aat {
namespace {

using enum Axis;

constexpr std::array kQuery = {kQueries, kQueryHeads, kHeadDim};
constexpr std::array kKeyValue = {kKeys, kKvHeads, kHeadDim};
constexpr std::array kLogits = {kQueryHeads, kQueries, kKeys};
constexpr std::array kPerQuery = {kQueries};
constexpr std::array kPerKey = {kKeys};
constexpr std::array kPerRow = {kQueries, kQueryHeads};
constexpr std::array kCoarse = {kCoarseRows, kKvHeads, kHeadDim};
constexpr std::array kPerRowAndLevel = {kQueries, kQueryHeads, kLevelCount};
constexpr std::array kLevelsMap = {kLists, kPlanTiles, kLevelWords};
constexpr std::array kHeaders = {kLists, kPlanTiles, kHeaderWords};
constexpr std::array kEntries = {kLists, kListEntries};
constexpr std::array kPrices = {kLists, kPlanTiles, kGranules};
constexpr std::array kPerList = {kLists};
constexpr std::array kKeyHeaders = {kKvHeads, kKeyListTiles, kHeaderWords};
constexpr std::array kKeyEntries = {kKvHeads, kKeyListEntries};

// In the order of the OPERAND_* constants.
constexpr std::array<Slot, kCallSlots> kSlots = {{
    {"q", SlotType::kLikeQuery, kQuery, false},
    {"k", SlotType::kLikeQuery, kKeyValue, false},
    {"v", SlotType::kLikeQuery, kKeyValue, false},
    {"bias", SlotType::kLikeBias, kLogits, true},
    {"mask", SlotType::kBool, kLogits, true},
    {"query lengths", SlotType::kInt32, {}, false},
    {"key/value lengths", SlotType::kInt32, {}, false},
    {"query segment ids", SlotType::kInt32, kPerQuery, false},
    {"key/value segment ids", SlotType::kInt32, kPerKey, false},
    {"out", SlotType::kLikeQuery, kQuery, false},
    {"logsumexp", SlotType::kFloat32, kPerRow, false},
    {"dq", SlotType::kLikeQuery, kQuery, false},
    {"dk", SlotType::kLikeQuery, kKeyValue, false},
    {"dv", SlotType::kLikeQuery, kKeyValue, false},
    {"dbias", SlotType::kLikeBias, kLogits, true},
    {"dout", SlotType::kLikeQuery, kQuery, false},
    {"dlogsumexp", SlotType::kFloat32, kPerRow, false},
    {"coarse k", SlotType::kLikeQuery, kCoarse, false},
    {"coarse v", SlotType::kLikeQuery, kCoarse, false},
    {"level bias", SlotType::kFloat32, kPerRowAndLevel, false},
    {"levels", SlotType::kUint32, kLevelsMap, false},
    {"list headers", SlotType::kUint32, kHeaders, false},
    {"list entries", SlotType::kUint32, kEntries, false},
    {"key list headers", SlotType::kUint32, kKeyHeaders, false},
    {"key list entries", SlotType::kUint32, kKeyEntries, false},
    {"shares", SlotType::kFloat32, kPerRowAndLevel, false},
    {"dcoarse k", SlotType::kLikeQuery, kCoarse, false},
    {"dcoarse v", SlotType::kLikeQuery, kCoarse, false},
    {"dlevel bias", SlotType::kFloat32, kPerRowAndLevel, false},
    {"dshares", SlotType::kFloat32, kPerRowAndLevel, false},
    {"row counts", SlotType::kUint32, kPerRowAndLevel, false},
    {"prices", SlotType::kUint32, kPrices, false},
    {"spare rows", SlotType::kFloat32, {}, false},
    {"lambda", SlotType::kFloat32, kPerList, false},
    {"previous levels", SlotType::kUint32, kLevelsMap, false},
}};

}  // namespace

const std::array<Slot, kCallSlots>& Slots() { return kSlots; }

}  // namespace jax_aat
