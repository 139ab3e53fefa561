#include "metrics/last_dispatch.h"

#include <mutex>
#include <utility>

namespace jax_aat {
namespace {

std::mutex mutex;
std::optional<DispatchRecord> latest;
std::uint64_t calls = 0;

// The replaced record is destroyed by the caller, outside the lock: its timestamps may wait.
std::optional<DispatchRecord> Exchange(std::optional<DispatchRecord> record) {
  const std::lock_guard lock(mutex);
  if (record) record->sequence = ++calls;
  latest.swap(record);
  return record;
}

}  // namespace

void RecordDispatch(Pass pass, const DispatchPlan& plan, DispatchRecord record) {
  record.pass = pass;
  record.path = plan.path;
  for (const Dispatch& dispatch : plan.dispatches) {
    record.shaders.push_back(dispatch.shader);
    record.flops.push_back(dispatch.flops);
  }
  Exchange(std::move(record));
}

void ForgetLastDispatch() { Exchange(std::nullopt); }

std::optional<DispatchRecord> LastDispatch() {
  const std::lock_guard lock(mutex);
  return latest;
}

}  // namespace jax_aat
