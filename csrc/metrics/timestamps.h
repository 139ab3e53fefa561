// Times of the dispatches of one call, or of the call, by timestamps of the device around them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "vulkan/context.h"

namespace jax_aat {

// Off at the start; calls that run while it is off pay nothing. By kernel, each dispatch waits for
// the one before it; else the call runs as it does untimed.
enum class Timing { kOff, kByCall, kByKernel };
// Returns what it was.
Timing SetTiming(Timing timing);

struct KernelTimes {
  std::vector<double> milliseconds;  // of each dispatch; empty if not timed by kernel
  double elapsed_milliseconds = 0;   // from the start of the first to the end of the last
};

class Timestamps {
 public:
  // For a call of so many dispatches; null while timing is off or the device has no timestamps.
  static std::shared_ptr<Timestamps> IfEnabled(std::shared_ptr<Context> context,
                                               std::size_t dispatches);
  Timestamps(std::shared_ptr<Context> context, std::size_t dispatches, bool by_kernel);
  // Waits until the device has written them.
  ~Timestamps();
  Timestamps(const Timestamps&) = delete;
  Timestamps& operator=(const Timestamps&) = delete;

  // Recorded before and after each dispatch, and once after the last one.
  void RecordStart(VkCommandBuffer commands, std::size_t dispatch) const;
  void RecordEnd(VkCommandBuffer commands, std::size_t dispatch) const;
  void RecordResults(VkCommandBuffer commands) const;
  void Submitted(const TimelinePoint& done) { done_ = done; }

  bool by_kernel() const { return by_kernel_; }
  const std::shared_ptr<Context>& context() const { return context_; }
  // Whether the device has written them.
  bool Ready() const { return context_->device().Reached(done_); }
  // Wait for the device. Ticks: start and end of each dispatch, or of the call.
  std::vector<std::uint64_t> Ticks() const;
  KernelTimes Times() const;

 private:
  void Write(VkCommandBuffer commands, std::size_t query) const;
  std::uint32_t queries() const {
    return by_kernel_ ? 2 * static_cast<std::uint32_t>(dispatches_) : 2;
  }

  const std::shared_ptr<Context> context_;
  const std::size_t dispatches_;
  const bool by_kernel_;
  std::unique_ptr<QuerySet> set_;
  TimelinePoint done_;
};

}  // namespace jax_aat
