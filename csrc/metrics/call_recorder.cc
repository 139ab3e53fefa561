#include "metrics/call_recorder.h"

#include <atomic>
#include <utility>

#include "attention/traffic.h"
#include "metrics/clocks.h"
#include "metrics/last_dispatch.h"
#include "metrics/profile.h"

namespace jax_aat {
namespace {

std::uint32_t ThreadNumber() {
  static std::atomic<std::uint32_t> threads = 0;
  thread_local const std::uint32_t number = threads++;
  return number;
}

}  // namespace

CallRecorder::CallRecorder(const char* platform, std::shared_ptr<Context> context,
                           const AttentionProblem& problem, const OperandBuffers& buffers)
    : context_(std::move(context)), problem_(problem), buffers_(buffers) {
  // Before the profile is asked for, which takes no call that came before it began.
  const std::int64_t arrived = HostNow();
  problem_.counts_work = Profiling();
  const AttentionParams& params = problem.params;
  record_ = {
      .pass = problem.pass,
      .platform = platform,
      .device = context_->device().physical().name,
      .device_index = context_->device().physical().index,
      .batch = params.batch_count,
      .queries = params.queries,
      .keys = params.keys,
      .query_heads = params.query_heads,
      .kv_heads = params.kv_heads,
      .head_dim = params.head_dim,
      .dtype = problem.dtype,
      .features = problem.features,
      .thread = ThreadNumber(),
      .arrived = arrived,
  };
}

void CallRecorder::Planned(const PreparedPlan& prepared, OperandAddresses& addresses) {
  const DispatchPlan& plan = prepared.plan;
  record_.path = plan.path;
  record_.scratch_bytes = plan.scratch_bytes;
  record_.lent_bytes = prepared.block ? 0 : plan.scratch_bytes;
  OperandBytes bytes = {};
  for (std::size_t i = 0; i < buffers_.size(); ++i) bytes[i] = buffers_[i].bytes;
  for (const Dispatch& dispatch : plan.dispatches) {
    record_.kernels.push_back({dispatch.shader, dispatch.flops, dispatch.flops_a_pair,
                               dispatch.key_rows, Traffic(plan, dispatch, bytes)});
  }
  timestamps_ = Timestamps::IfEnabled(context_, plan.dispatches.size());
  record_.timestamps = timestamps_;
  if (plan.counted_lists > 0) {
    work_ = std::make_shared<WorkCounts>(context_, plan.counted_lists);
    addresses[OPERAND_WORK_COUNTS] = work_->address();
    record_.work = work_;
  }
}

void CallRecorder::Submitted(const Submission& submission) {
  record_.submitted = HostNanoseconds(submission.handed_over);
  record_.queue = submission.queue;
  if (timestamps_ != nullptr) timestamps_->Submitted(submission.done);
  if (work_ != nullptr) work_->Submitted(submission.done);
}

void CallRecorder::Finish(std::uint64_t imported_bytes, std::uint64_t staged_bytes) {
  record_.imported_bytes = imported_bytes;
  record_.staged_bytes = staged_bytes;
  record_.ended = HostNow();
  RecordDispatch(std::move(record_));
}

}  // namespace jax_aat
