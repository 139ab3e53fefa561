// What a plan leaves to compute, counted on the device from its work lists.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "vulkan/context.h"

namespace jax_aat {

struct Work {
  double exact_pairs = 0;       // of a row of queries and an exact row, over all lists
  double coarse_pairs = 0;      // likewise with coarse rows
  std::uint32_t most_rows = 0;  // that one tile reads
};

// Memory that count_work.comp writes, for so many lists.
class WorkCounts {
 public:
  WorkCounts(std::shared_ptr<Context> context, std::uint64_t lists);
  ~WorkCounts() {
    if (done_.semaphore != VK_NULL_HANDLE) std::move(block_).ReleaseAt(done_);
  }
  WorkCounts(const WorkCounts&) = delete;
  WorkCounts& operator=(const WorkCounts&) = delete;

  VkDeviceAddress address() const { return block_.address(); }
  void Submitted(const TimelinePoint& done) { done_ = done; }
  // Whether the device has written them.
  bool Ready() const { return context_->device().Reached(done_); }
  // Waits for the device.
  Work Sum() const;

 private:
  std::shared_ptr<Context> context_;  // outlives the block
  std::uint64_t lists_;
  Block block_;
  TimelinePoint done_;
};

}  // namespace jax_aat
