#include "vulkan/query_ring.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace jax_aat {
namespace {

// Enough for the kernels of most calls, so that most sets fit any call.
constexpr std::uint32_t kMinQueries = 64;

}  // namespace

std::unique_ptr<QuerySet> QueryRing::Take(std::uint32_t queries) {
  std::unique_ptr<QuerySet> set;
  {
    const std::lock_guard lock(mutex_);
    const auto fits =
        std::ranges::find_if(idle_, [&](const auto& each) { return each->capacity >= queries; });
    if (fits != idle_.end()) {
      set = std::move(*fits);
      idle_.erase(fits);
    }
  }
  if (set == nullptr) {
    const std::uint32_t capacity = std::max(std::bit_ceil(queries), kMinQueries);
    set = std::make_unique<QuerySet>(capacity, QueryPoolHandle(device_));
    const VkQueryPoolCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
        .queryType = VK_QUERY_TYPE_TIMESTAMP,
        .queryCount = capacity,
    };
    device_.Check(device_.vk().CreateQueryPool(device_.handle(), &info, nullptr, set->pool.out()),
                  "vkCreateQueryPool");
  }
  set->results = memory_.Allocate(Purpose::kMetrics, queries * sizeof(std::uint64_t));
  device_.vk().ResetQueryPool(device_.handle(), set->pool.get(), 0, queries);
  return set;
}

void QueryRing::GiveBack(std::unique_ptr<QuerySet> set) {
  set->results = Block();  // idle sets hold no memory
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(set));
}

void QueryRing::Trim() {
  std::vector<std::unique_ptr<QuerySet>> idle;
  const std::lock_guard lock(mutex_);
  idle_.swap(idle);
}

}  // namespace jax_aat
