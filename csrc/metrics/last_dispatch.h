// What the latest attention call ran, so that callers can assert it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention/dispatch_plan.h"
#include "metrics/timestamps.h"

namespace jax_aat {

struct DispatchRecord {
  std::uint64_t sequence = 0;  // counts the calls of the process, from 1
  Pass pass = Pass::kForward;
  std::string path;      // family of kernels: "portable" or "coopmat"
  std::string platform;  // of JAX: "cpu" or "cuda"
  std::string device;
  std::vector<std::string> shaders;              // in the order of their dispatches
  std::vector<double> flops;                     // of each dispatch
  std::uint64_t imported_bytes = 0;              // operands used where they lie
  std::uint64_t staged_bytes = 0;                // operands copied
  std::shared_ptr<const Timestamps> timestamps;  // null: not timed
};

// Completes the record by what the plan tells and by the sequence number, and keeps it as the
// latest.
void RecordDispatch(Pass pass, const DispatchPlan& plan, DispatchRecord record);
std::optional<DispatchRecord> LastDispatch();
// Lets go of what the record holds; sequence numbers go on.
void ForgetLastDispatch();

}  // namespace jax_aat
