// The operand slots as docs/architecture.md lists them: names, axes, dtypes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "common/params.h"

namespace jax_aat {

inline constexpr std::uint32_t kCallSlots = 35;  // those that cross the FFI boundary

// Axes after the batch axes.
enum class Axis {
  kQueries,
  kKeys,
  kQueryHeads,
  kKvHeads,
  kHeadDim,
  // Of a plan.
  kCoarseRows,
  kLevelCount,
  kLists,
  kPlanTiles,
  kLevelWords,
  kGranules,
  kHeaderWords,
  kListEntries,
  kKeyListTiles,
  kKeyListEntries,
};

enum class SlotType { kLikeQuery, kLikeBias, kFloat32, kBool, kInt32, kUint32 };

struct Slot {
  std::string_view name;
  SlotType type;
  std::span<const Axis> axes;
  bool broadcast_axes;  // the axes after the batch axes may have size 1 as well
};

const std::array<Slot, kCallSlots>& Slots();

constexpr std::uint64_t Bit(std::uint32_t slot) { return std::uint64_t{1} << slot; }

}  // namespace jax_aat
