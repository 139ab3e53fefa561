// Times of the dispatches of one call, or of the call, by timestamps of the device around them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "vulkan/context.h"
#include "vulkan/device_handle.h"

namespace jax_aat {

// Off at the start; calls that run while it is off pay nothing. By kernel, each dispatch waits for
// the one before it; else the call runs as it does untimed.
void SetTiming(bool enabled, bool by_kernel);

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

  // Waits for the device.
  KernelTimes Times() const;

 private:
  void Write(VkCommandBuffer commands, std::size_t query) const;
  std::size_t queries() const { return by_kernel_ ? 2 * dispatches_ : 2; }

  const std::shared_ptr<Context> context_;
  const std::size_t dispatches_;
  const bool by_kernel_;
  QueryPoolHandle queries_;
  Block results_;
  TimelinePoint done_;
};

}  // namespace jax_aat
