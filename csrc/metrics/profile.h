// Collects the records of all calls between a start and a stop. Results of the device are taken as
// it writes them, by the calls that come later: nobody waits before the stop.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "metrics/dispatch_record.h"

namespace jax_aat {

struct ProfiledCall {
  DispatchRecord record;
  // Seconds of the host's steady clock, start and end of each kernel, or of the call; empty where
  // the device has no timestamps.
  std::vector<double> stamps;
  std::optional<Work> work;
  std::optional<double> stream_seconds;
};

// Throws std::logic_error if one was started already.
void StartProfile(bool by_kernel);
bool Profiling();
// Waits for the device. Calls in the order in which their handlers ended.
std::vector<ProfiledCall> StopProfile();

void AddToProfile(DispatchRecord record);
// Lets go of what a profile that was not stopped holds.
void ForgetProfile();

}  // namespace jax_aat
