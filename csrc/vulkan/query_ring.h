// Timestamp queries, taken by calls that are timed and used again.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "vulkan/device_handle.h"
#include "vulkan/memory.h"

namespace jax_aat {

struct QuerySet {
  std::uint32_t capacity = 0;
  QueryPoolHandle pool;
  Block results;  // a 64-bit word each, mapped; of a set that is taken
};

class QueryRing {
 public:
  QueryRing(const Device& device, MemoryManager& memory) : device_(device), memory_(memory) {}

  // So many queries at least, reset.
  std::unique_ptr<QuerySet> Take(std::uint32_t queries);
  // Once the device is done with them.
  void GiveBack(std::unique_ptr<QuerySet> set);
  // Lets go of those that no call has.
  void Trim();

 private:
  const Device& device_;
  MemoryManager& memory_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<QuerySet>> idle_;
};

}  // namespace jax_aat
