// The largest device-local heap and what the driver lets this process have of it.
#pragma once

#include <cstdint>
#include <optional>

#include "vulkan/device.h"

namespace jax_aat {

struct LocalHeap {
  struct Budget {
    std::uint64_t bytes = 0;  // that the process may use
    std::uint64_t usage = 0;  // that it uses, by whatever API
  };
  std::uint64_t bytes = 0;
  std::optional<Budget> budget;  // none without VK_EXT_memory_budget
};

LocalHeap LargestLocalHeap(const Device& device);

}  // namespace jax_aat
