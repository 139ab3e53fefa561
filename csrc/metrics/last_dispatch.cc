#include "metrics/last_dispatch.h"

#include <mutex>
#include <utility>

namespace jax_aat {
namespace {

std::mutex mutex;
std::optional<DispatchRecord> latest;

}  // namespace

void RecordDispatch(DispatchRecord record) {
  const std::lock_guard lock(mutex);
  record.sequence = latest ? latest->sequence + 1 : 1;
  latest = std::move(record);
}

std::optional<DispatchRecord> LastDispatch() {
  const std::lock_guard lock(mutex);
  return latest;
}

}  // namespace jax_aat
