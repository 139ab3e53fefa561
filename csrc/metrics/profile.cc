#include "metrics/profile.h"

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "metrics/clocks.h"

namespace jax_aat {
namespace {

struct Entry {
  ProfiledCall call;
  std::shared_ptr<Context> context;
  std::vector<std::uint64_t> ticks;
};

struct Profile {
  Timing timing_before = Timing::kOff;
  std::int64_t started = HostNow();
  std::deque<DispatchRecord> pending;  // oldest first
  std::vector<Entry> entries;
  std::map<std::shared_ptr<Context>, ClockSample> clocks;

  void Take(DispatchRecord record) {
    Entry entry;
    if (record.timestamps != nullptr) {
      entry.context = record.timestamps->context();
      entry.ticks = record.timestamps->Ticks();
      if (!clocks.contains(entry.context))
        clocks.emplace(entry.context, SampleClocks(*entry.context));
    }
    if (record.work != nullptr) entry.call.work = record.work->Sum();
    // Their memory serves later calls.
    record.timestamps = nullptr;
    record.work = nullptr;
    entry.call.record = std::move(record);
    entries.push_back(std::move(entry));
  }
};

std::mutex mutex;
std::optional<Profile> profile;
std::atomic<bool> profiling = false;

}  // namespace

void StartProfile(bool by_kernel) {
  const std::lock_guard lock(mutex);
  if (profile) throw std::logic_error("a profile is being taken already: end it first");
  profile.emplace();
  profile->timing_before = SetTiming(by_kernel ? Timing::kByKernel : Timing::kByCall);
  profiling = true;
}

bool Profiling() { return profiling; }

void AddToProfile(DispatchRecord record) {
  if (!profiling) return;
  const std::lock_guard lock(mutex);
  // A call that came before was not measured.
  if (!profile || record.arrived < profile->started) return;
  profile->pending.push_back(std::move(record));
  while (!profile->pending.empty()) {
    const DispatchRecord& front = profile->pending.front();
    if (front.timestamps != nullptr && !front.timestamps->Ready()) break;
    if (front.work != nullptr && !front.work->Ready()) break;
    DispatchRecord oldest = std::move(profile->pending.front());
    profile->pending.pop_front();
    profile->Take(std::move(oldest));
  }
}

void ForgetProfile() {
  std::optional<Profile> forgotten;
  const std::lock_guard lock(mutex);
  profiling = false;
  profile.swap(forgotten);
}

std::vector<ProfiledCall> StopProfile() {
  std::optional<Profile> ended;
  {
    const std::lock_guard lock(mutex);
    if (!profile) throw std::logic_error("no profile is being taken");
    profiling = false;
    SetTiming(profile->timing_before);
    ended = std::exchange(profile, std::nullopt);
  }
  std::vector<ProfiledCall> calls;
  while (!ended->pending.empty()) {
    DispatchRecord oldest = std::move(ended->pending.front());
    ended->pending.pop_front();
    ended->Take(std::move(oldest));
  }
  std::map<std::shared_ptr<Context>, ClockMap> maps;
  for (const auto& [context, sample] : ended->clocks) {
    maps.emplace(context, ClockMap(context->device().physical(), sample, SampleClocks(*context)));
  }
  for (Entry& entry : ended->entries) {
    if (entry.context != nullptr) {
      const ClockMap& map = maps.at(entry.context);
      for (const std::uint64_t tick : entry.ticks)
        entry.call.stamps.push_back(map.HostSeconds(tick));
    }
    calls.push_back(std::move(entry.call));
  }
  return calls;
}

}  // namespace jax_aat
