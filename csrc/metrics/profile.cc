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

// Whether the device was lost and some caller was told: nothing more will come of it, and the
// calls that follow on a new context are not to fail for that.
bool Gone(const Context& context) { return context.device().loss_reported(); }

bool Gone(const DispatchRecord& record) {
  return (record.timestamps != nullptr && Gone(*record.timestamps->context())) ||
         (record.work != nullptr && Gone(*record.work->context()));
}

bool Ready(const DispatchRecord& record) {
  return (record.timestamps == nullptr || record.timestamps->Ready()) &&
         (record.work == nullptr || record.work->Ready()) &&
         (record.stream == nullptr || record.stream->Ready());
}

struct Profile {
  Timing timing_before = Timing::kOff;
  std::int64_t started = 0;
  std::deque<DispatchRecord> pending;  // oldest first
  std::vector<Entry> entries;
  std::map<std::shared_ptr<Context>, ClockSample> clocks;

  void Take(DispatchRecord record) {
    Entry entry;
    const bool measured = !Gone(record);
    if (measured && record.timestamps != nullptr) {
      entry.context = record.timestamps->context();
      entry.ticks = record.timestamps->Ticks();
      if (!clocks.contains(entry.context))
        clocks.emplace(entry.context, SampleClocks(*entry.context));
    }
    if (measured && record.work != nullptr) entry.call.work = record.work->Sum();
    if (measured && record.stream != nullptr) entry.call.stream_seconds = record.stream->Seconds();
    // Their memory serves later calls.
    record.timestamps = nullptr;
    record.work = nullptr;
    record.stream = nullptr;
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
  // Calls that come from now on are measured.
  profile->started = HostNow();
}

bool Profiling() { return profiling; }

void AddToProfile(DispatchRecord record) {
  if (!profiling) return;
  const std::lock_guard lock(mutex);
  // A call that came before was not measured.
  if (!profile || record.arrived < profile->started) return;
  profile->pending.push_back(std::move(record));
  while (!profile->pending.empty()) {
    if (!Gone(profile->pending.front()) && !Ready(profile->pending.front())) break;
    DispatchRecord oldest = std::move(profile->pending.front());
    profile->pending.pop_front();
    profile->Take(std::move(oldest));
  }
}

void ForgetProfile() {
  std::optional<Profile> forgotten;
  const std::lock_guard lock(mutex);
  profiling = false;
  if (profile) SetTiming(profile->timing_before);
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
    const ClockSample last = Gone(*context) ? sample : SampleClocks(*context);
    maps.emplace(context, ClockMap(context->device().physical(), sample, last));
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
