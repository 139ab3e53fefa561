// Times of the dispatches of one call, by timestamps of the device around each of them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "vulkan/context.h"
#include "vulkan/device_handle.h"

namespace jax_aat {

// Off at the start; calls that run while it is off pay nothing.
bool TimingEnabled();
void SetTiming(bool enabled);

struct KernelTimes {
  // Of each dispatch. Those without a barrier between them overlap, and so do their times.
  std::vector<double> milliseconds;
  double elapsed_milliseconds = 0;  // from the start of the first to the end of the last
};

class Timestamps {
 public:
  // For a call of so many dispatches; null while timing is off or the device has no timestamps.
  static std::shared_ptr<Timestamps> IfEnabled(std::shared_ptr<Context> context,
                                               std::size_t dispatches);
  Timestamps(std::shared_ptr<Context> context, std::size_t dispatches);
  // Waits until the device has written them.
  ~Timestamps();
  Timestamps(const Timestamps&) = delete;
  Timestamps& operator=(const Timestamps&) = delete;

  // Recorded before and after each dispatch, and once after the last one.
  void RecordStart(VkCommandBuffer commands, std::size_t dispatch) const;
  void RecordEnd(VkCommandBuffer commands, std::size_t dispatch) const;
  void RecordResults(VkCommandBuffer commands) const;
  void Submitted(const TimelinePoint& done) { done_ = done; }

  // Waits for the device.
  KernelTimes Times() const;

 private:
  void Write(VkCommandBuffer commands, std::size_t query) const;

  const std::shared_ptr<Context> context_;
  const std::size_t dispatches_;
  QueryPoolHandle queries_;
  Block results_;
  TimelinePoint done_;
};

}  // namespace jax_aat
