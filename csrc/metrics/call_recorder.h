// Measures one call, from its arrival to the end of its handler.
#pragma once

#include <memory>
#include <utility>

#include "attention/dispatch_plan.h"
#include "interop/operands.h"
#include "metrics/dispatch_record.h"
#include "vulkan/context.h"

namespace jax_aat {

class CallRecorder {
 public:
  CallRecorder(const char* platform, std::shared_ptr<Context> context,
               const AttentionProblem& problem, const OperandBuffers& buffers);

  // What is to be planned: the problem, and the counting of its work while a profile wants that.
  const AttentionProblem& problem() const { return problem_; }
  // Before the plan is run, with the addresses that it gets.
  void Planned(const PreparedPlan& prepared, OperandAddresses& addresses);
  const Timestamps* timestamps() const { return record_.timestamps.get(); }
  // Whether the host will read what kernels wrote.
  bool host_reads() const { return work_ != nullptr; }
  void Submitted(const Submission& submission);
  // Whether the stream that calls, if there is one, is to be timed.
  bool times_stream() const { return record_.timestamps != nullptr && problem_.counts_work; }
  void StreamTimed(std::shared_ptr<const StreamTime> time) { record_.stream = std::move(time); }
  void Finish(std::uint64_t imported_bytes, std::uint64_t staged_bytes);

 private:
  std::shared_ptr<Context> context_;
  AttentionProblem problem_;
  const OperandBuffers& buffers_;
  DispatchRecord record_;
  std::shared_ptr<Timestamps> timestamps_;
  std::shared_ptr<WorkCounts> work_;
};

}  // namespace jax_aat
