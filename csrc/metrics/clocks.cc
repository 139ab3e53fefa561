#include "metrics/clocks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

namespace jax_aat {
namespace {

// Of the time between two samples, at most one part in so many may come from their deviations for a
// drift to be told from these.
constexpr double kDriftPrecision = 1e5;
// Of clocks that tick as they say.
constexpr double kMostDrift = 1e-3;

bool CanCalibrate(const Context& context) {
  const Device& device = context.device();
  if (!device.physical().HasExtension(VK_EXT_CALIBRATED_TIMESTAMPS_EXTENSION_NAME)) return false;
  const auto list = device.instance_vk().GetPhysicalDeviceCalibrateableTimeDomainsEXT;
  std::uint32_t count = 0;
  device.Check(list(device.physical().handle, &count, nullptr),
               "vkGetPhysicalDeviceCalibrateableTimeDomainsEXT");
  std::vector<VkTimeDomainEXT> domains(count);
  device.Check(list(device.physical().handle, &count, domains.data()),
               "vkGetPhysicalDeviceCalibrateableTimeDomainsEXT");
  const auto has = [&](VkTimeDomainEXT domain) {
    return std::ranges::find(domains, domain) != domains.end();
  };
  return has(VK_TIME_DOMAIN_DEVICE_EXT) && has(VK_TIME_DOMAIN_CLOCK_MONOTONIC_EXT);
}

ClockSample Calibrated(const Device& device) {
  constexpr auto info = [](VkTimeDomainEXT domain) {
    return VkCalibratedTimestampInfoEXT{
        .sType = VK_STRUCTURE_TYPE_CALIBRATED_TIMESTAMP_INFO_EXT,
        .timeDomain = domain,
    };
  };
  // CLOCK_MONOTONIC is the host's steady clock.
  const std::array infos = {info(VK_TIME_DOMAIN_DEVICE_EXT),
                            info(VK_TIME_DOMAIN_CLOCK_MONOTONIC_EXT)};
  std::array<std::uint64_t, 2> stamps = {};
  std::uint64_t deviation = 0;
  device.Check(device.vk().GetCalibratedTimestampsEXT(device.handle(), 2, infos.data(),
                                                      stamps.data(), &deviation),
               "vkGetCalibratedTimestampsEXT");
  return {stamps[0], static_cast<std::int64_t>(stamps[1]), static_cast<std::int64_t>(deviation)};
}

ClockSample Bracketed(Context& context) {
  const Device& device = context.device();
  std::unique_ptr<QuerySet> set = context.queries().Take(1);
  const std::int64_t before = HostNow();
  const TimelinePoint done = context.Submit([&](VkCommandBuffer commands) {
    device.vk().CmdWriteTimestamp2(commands, VK_PIPELINE_STAGE_2_ALL_COMMANDS_BIT, set->pool.get(),
                                   0);
    device.vk().CmdCopyQueryPoolResults(commands, set->pool.get(), 0, 1, set->results.buffer(),
                                        set->results.offset(), sizeof(std::uint64_t),
                                        VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT);
    RecordBarrier(device, commands, VK_PIPELINE_STAGE_2_COPY_BIT, VK_ACCESS_2_TRANSFER_WRITE_BIT,
                  VK_PIPELINE_STAGE_2_HOST_BIT, VK_ACCESS_2_HOST_READ_BIT);
  });
  device.Wait(done);
  const std::int64_t after = HostNow();
  ClockSample sample = {0, (before + after) / 2, (after - before) / 2};
  std::memcpy(&sample.ticks, set->results.mapped(), sizeof(sample.ticks));
  context.queries().GiveBack(std::move(set));
  return sample;
}

}  // namespace

std::int64_t HostNanoseconds(std::chrono::steady_clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

std::int64_t HostNow() { return HostNanoseconds(std::chrono::steady_clock::now()); }

double NanosecondsBetween(const PhysicalDevice& device, std::uint64_t from, std::uint64_t to) {
  const std::uint32_t bits = device.timestamp_bits;
  const std::uint64_t mask = bits >= 64 ? UINT64_MAX : (std::uint64_t{1} << bits) - 1;
  const std::uint64_t forward = (to - from) & mask, backward = (from - to) & mask;
  const double ticks =
      forward <= backward ? static_cast<double>(forward) : -static_cast<double>(backward);
  return ticks * device.limits.timestampPeriod;
}

ClockSample SampleClocks(Context& context) {
  return CanCalibrate(context) ? Calibrated(context.device()) : Bracketed(context);
}

ClockMap::ClockMap(const PhysicalDevice& device, const ClockSample& first,
                   const ClockSample& second)
    : device_(device), first_(first) {
  const auto host = static_cast<double>(second.host_nanoseconds - first.host_nanoseconds);
  const double ticks = NanosecondsBetween(device, first.ticks, second.ticks);
  const auto deviation = static_cast<double>(first.deviation + second.deviation);
  // A clock of few bits can have begun anew between the samples.
  if (ticks <= 0 || host <= kDriftPrecision * deviation) return;
  if (std::abs(host / ticks - 1) < kMostDrift) rate_ = host / ticks;
}

double ClockMap::HostSeconds(std::uint64_t ticks) const {
  return (static_cast<double>(first_.host_nanoseconds) +
          rate_ * NanosecondsBetween(device_, first_.ticks, ticks)) *
         1e-9;
}

}  // namespace jax_aat
