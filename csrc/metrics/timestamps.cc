#include "metrics/timestamps.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "metrics/clocks.h"
#include "vulkan/logging.h"

namespace jax_aat {
namespace {

std::atomic<Timing> chosen_timing = Timing::kOff;

}  // namespace

Timing SetTiming(Timing timing) { return chosen_timing.exchange(timing); }

std::shared_ptr<Timestamps> Timestamps::IfEnabled(std::shared_ptr<Context> context,
                                                  std::size_t dispatches) {
  const Timing timing = chosen_timing;
  if (timing == Timing::kOff || dispatches == 0 ||
      context->device().physical().timestamp_bits == 0) {
    return nullptr;
  }
  return std::make_shared<Timestamps>(std::move(context), dispatches, timing == Timing::kByKernel);
}

Timestamps::Timestamps(std::shared_ptr<Context> context, std::size_t dispatches, bool by_kernel)
    : context_(std::move(context)),
      dispatches_(dispatches),
      by_kernel_(by_kernel),
      set_(context_->queries().Take(queries())) {}

Timestamps::~Timestamps() {
  try {
    if (done_.semaphore != VK_NULL_HANDLE) context_->device().Wait(done_);
    context_->queries().GiveBack(std::move(set_));
  } catch (const Error& error) {
    Log(LogLevel::kError, error.what());
  }
}

void Timestamps::RecordStart(VkCommandBuffer commands, std::size_t dispatch) const {
  if (by_kernel_ || dispatch == 0) Write(commands, dispatch * 2);
}

void Timestamps::RecordEnd(VkCommandBuffer commands, std::size_t dispatch) const {
  if (by_kernel_) {
    Write(commands, dispatch * 2 + 1);
  } else if (dispatch + 1 == dispatches_) {
    Write(commands, 1);
  }
}

void Timestamps::Write(VkCommandBuffer commands, std::size_t query) const {
  context_->device().vk().CmdWriteTimestamp2(commands, VK_PIPELINE_STAGE_2_COMPUTE_SHADER_BIT,
                                             set_->pool.get(), static_cast<std::uint32_t>(query));
}

void Timestamps::RecordResults(VkCommandBuffer commands) const {
  const Device& device = context_->device();
  device.vk().CmdCopyQueryPoolResults(
      commands, set_->pool.get(), 0, queries(), set_->results.buffer(), set_->results.offset(),
      sizeof(std::uint64_t), VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT);
  RecordBarrier(device, commands, VK_PIPELINE_STAGE_2_COPY_BIT, VK_ACCESS_2_TRANSFER_WRITE_BIT,
                VK_PIPELINE_STAGE_2_HOST_BIT, VK_ACCESS_2_HOST_READ_BIT);
}

std::vector<std::uint64_t> Timestamps::Ticks() const {
  context_->device().Wait(done_);
  std::vector<std::uint64_t> ticks(queries());
  std::memcpy(ticks.data(), set_->results.mapped(), ticks.size() * sizeof(std::uint64_t));
  return ticks;
}

KernelTimes Timestamps::Times() const {
  const std::vector<std::uint64_t> ticks = Ticks();
  const PhysicalDevice& physical = context_->device().physical();
  const auto between = [&](std::size_t start, std::size_t end) {
    return NanosecondsBetween(physical, ticks[start], ticks[end]) * 1e-6;
  };
  KernelTimes times;
  for (std::size_t i = 0; by_kernel_ && i < dispatches_; ++i) {
    times.milliseconds.push_back(between(i * 2, i * 2 + 1));
  }
  times.elapsed_milliseconds = between(0, ticks.size() - 1);
  return times;
}

}  // namespace jax_aat
