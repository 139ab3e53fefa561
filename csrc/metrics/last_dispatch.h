// What the latest attention call ran, so that callers can assert it.
#pragma once

#include <optional>

#include "metrics/dispatch_record.h"

namespace jax_aat {

// Gives the record its sequence number, keeps it as the latest, and hands it to the profile, if
// any.
void RecordDispatch(DispatchRecord record);
std::optional<DispatchRecord> LastDispatch();
// Lets go of what the record holds; sequence numbers go on.
void ForgetLastDispatch();

}  // namespace jax_aat
