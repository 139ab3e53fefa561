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
}};

}  // namespace

const std::array<Slot, kCallSlots>& Slots() { return kSlots; }

}  // namespace jax_aat
