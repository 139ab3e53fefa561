// What is known of one call.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention/dispatch_plan.h"
#include "metrics/stream_time.h"
#include "metrics/timestamps.h"
#include "metrics/work_counts.h"

namespace jax_aat {

struct KernelRecord {
  std::string shader;
  double flops = 0;
  double flops_a_pair = 0;
  KeyRows key_rows = KeyRows::kAll;
  double bytes = 0;
};

struct DispatchRecord {
  std::uint64_t sequence = 0;  // counts the calls of the process, from 1
  Pass pass = Pass::kForward;
  std::string path;      // family of kernels: "portable" or "coopmat"
  std::string platform;  // of JAX: "cpu" or "cuda"
  std::string device;
  std::uint32_t device_index = 0;
  // Sizes of the problem.
  std::uint32_t batch = 0, queries = 0, keys = 0, query_heads = 0, kv_heads = 0, head_dim = 0;
  std::uint32_t dtype = DTYPE_F32;
  std::uint32_t features = 0;
  std::vector<KernelRecord> kernels;  // in the order of their dispatches
  std::uint64_t imported_bytes = 0;   // operands used where they lie
  std::uint64_t scratch_bytes = 0;
  std::uint64_t lent_bytes = 0;    // scratch that XLA lent
  std::uint64_t staged_bytes = 0;  // operands copied
  std::uint32_t queue = 0;         // of the device
  std::uint32_t thread = 0;        // of the host, counted from 0
  // Nanoseconds of the host's steady clock: the call came, was submitted, the handler ended.
  std::int64_t arrived = 0, submitted = 0, ended = 0;
  std::shared_ptr<const Timestamps> timestamps;  // null: not timed
  std::shared_ptr<const WorkCounts> work;        // null: not counted
  std::shared_ptr<const StreamTime> stream;      // null: no stream, or not timed
};

}  // namespace jax_aat
