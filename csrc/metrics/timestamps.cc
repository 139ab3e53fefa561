#include "metrics/timestamps.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "vulkan/logging.h"

namespace jax_aat {
namespace {

enum class Timing { kOff, kByCall, kByKernel };
std::atomic<Timing> timing = Timing::kOff;

}  // namespace

void SetTiming(bool enabled, bool by_kernel) {
  timing = !enabled ? Timing::kOff : by_kernel ? Timing::kByKernel : Timing::kByCall;
}

std::shared_ptr<Timestamps> Timestamps::IfEnabled(std::shared_ptr<Context> context,
                                                  std::size_t dispatches) {
  const Timing chosen = timing;
  if (chosen == Timing::kOff || dispatches == 0 ||
      context->device().physical().timestamp_bits == 0) {
    return nullptr;
  }
  return std::make_shared<Timestamps>(std::move(context), dispatches, chosen == Timing::kByKernel);
}

Timestamps::Timestamps(std::shared_ptr<Context> context, std::size_t dispatches, bool by_kernel)
    : context_(std::move(context)),
      dispatches_(dispatches),
      by_kernel_(by_kernel),
      queries_(context_->device()),
      results_(context_->memory().Allocate(Purpose::kMetrics, queries() * sizeof(uint64_t))) {
  const Device& device = context_->device();
  const auto count = static_cast<std::uint32_t>(queries());
  const VkQueryPoolCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
      .queryType = VK_QUERY_TYPE_TIMESTAMP,
      .queryCount = count,
  };
  device.Check(device.vk().CreateQueryPool(device.handle(), &info, nullptr, queries_.out()),
               "vkCreateQueryPool");
  device.vk().ResetQueryPool(device.handle(), queries_.get(), 0, count);
}

Timestamps::~Timestamps() {
  try {
    if (done_.semaphore != VK_NULL_HANDLE) context_->device().Wait(done_);
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
                                             queries_.get(), static_cast<std::uint32_t>(query));
}

void Timestamps::RecordResults(VkCommandBuffer commands) const {
  const Device& device = context_->device();
  device.vk().CmdCopyQueryPoolResults(
      commands, queries_.get(), 0, static_cast<std::uint32_t>(queries()), results_.buffer(),
      results_.offset(), sizeof(std::uint64_t), VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT);
  RecordBarrier(device, commands, VK_PIPELINE_STAGE_2_COPY_BIT, VK_ACCESS_2_TRANSFER_WRITE_BIT,
                VK_PIPELINE_STAGE_2_HOST_BIT, VK_ACCESS_2_HOST_READ_BIT);
}

KernelTimes Timestamps::Times() const {
  const Device& device = context_->device();
  device.Wait(done_);
  std::vector<std::uint64_t> ticks(queries());
  std::memcpy(ticks.data(), results_.mapped(), ticks.size() * sizeof(std::uint64_t));
  const std::uint32_t bits = device.physical().timestamp_bits;
  const std::uint64_t mask = bits >= 64 ? UINT64_MAX : (std::uint64_t{1} << bits) - 1;
  const double period = device.physical().limits.timestampPeriod * 1e-6;
  const auto between = [&](std::size_t start, std::size_t end) {
    return static_cast<double>((ticks[end] - ticks[start]) & mask) * period;
  };
  KernelTimes times;
  for (std::size_t i = 0; by_kernel_ && i < dispatches_; ++i) {
    times.milliseconds.push_back(between(i * 2, i * 2 + 1));
  }
  times.elapsed_milliseconds = between(0, ticks.size() - 1);
  return times;
}

}  // namespace jax_aat
