// The device's clock beside the host's.
#pragma once

#include <chrono>
#include <cstdint>

#include "vulkan/context.h"

namespace jax_aat {

// Nanoseconds of the host's steady clock.
std::int64_t HostNanoseconds(std::chrono::steady_clock::time_point time);
std::int64_t HostNow();

// From one tick of the device to another, which may be the earlier one.
double NanosecondsBetween(const PhysicalDevice& device, std::uint64_t from, std::uint64_t to);

// One moment by both clocks.
struct ClockSample {
  std::uint64_t ticks = 0;
  std::int64_t host_nanoseconds = 0;
  std::int64_t deviation = 0;  // nanoseconds by which they may be apart
};

// By VK_EXT_calibrated_timestamps, else by a submission between two looks at the host's clock.
ClockSample SampleClocks(Context& context);

// Host time of ticks between, or near, two samples.
class ClockMap {
 public:
  ClockMap(const PhysicalDevice& device, const ClockSample& first, const ClockSample& second);
  double HostSeconds(std::uint64_t ticks) const;

 private:
  const PhysicalDevice& device_;
  ClockSample first_;
  double rate_ = 1;  // of the host's clock to the device's
};

}  // namespace jax_aat
