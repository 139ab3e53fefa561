#include "metrics/last_dispatch.h"

#include <mutex>
#include <utility>

#include "metrics/profile.h"

namespace jax_aat {
namespace {

std::mutex mutex;
std::optional<DispatchRecord> latest;
std::uint64_t calls = 0;

}  // namespace

void RecordDispatch(DispatchRecord record) {
  std::optional<DispatchRecord> replaced;
  {
    const std::lock_guard lock(mutex);
    record.sequence = ++calls;
    replaced = std::exchange(latest, record);
  }
  // The replaced record is destroyed outside the lock: its timestamps may wait.
  AddToProfile(std::move(record));
}

void ForgetLastDispatch() {
  std::optional<DispatchRecord> forgotten;
  const std::lock_guard lock(mutex);
  latest.swap(forgotten);
}

std::optional<DispatchRecord> LastDispatch() {
  const std::lock_guard lock(mutex);
  return latest;
}

}  // namespace jax_aat
