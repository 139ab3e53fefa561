#include "vulkan/commands.h"

#include <utility>

namespace jax_aat {
namespace {

// Callers that never wait on the host may not run ahead of the device further than this.
constexpr std::size_t kMaxSubmitted = 64;

VkSemaphoreSubmitInfo SubmitInfo(const TimelinePoint& point) {
  return {
      .sType = VK_STRUCTURE_TYPE_SEMAPHORE_SUBMIT_INFO,
      .semaphore = point.semaphore,
      .value = point.value,
      .stageMask = VK_PIPELINE_STAGE_2_ALL_COMMANDS_BIT,
  };
}

}  // namespace

CommandSlot::CommandSlot(const Device& device) : device_(device), pool_(device) {
  const VkCommandPoolCreateInfo pool = {
      .sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
      .flags = VK_COMMAND_POOL_CREATE_TRANSIENT_BIT,
      .queueFamilyIndex = device.physical().queue_family,
  };
  device.Check(device.vk().CreateCommandPool(device.handle(), &pool, nullptr, pool_.out()),
               "vkCreateCommandPool");
  const VkCommandBufferAllocateInfo buffer = {
      .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
      .commandPool = pool_.get(),
      .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
      .commandBufferCount = 1,
  };
  device.Check(device.vk().AllocateCommandBuffers(device.handle(), &buffer, &buffer_),
               "vkAllocateCommandBuffers");
}

void CommandSlot::Begin() {
  device_.Check(device_.vk().ResetCommandPool(device_.handle(), pool_.get(), 0),
                "vkResetCommandPool");
  const VkCommandBufferBeginInfo info = {
      .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
      .flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT,
  };
  device_.Check(device_.vk().BeginCommandBuffer(buffer_, &info), "vkBeginCommandBuffer");
}

void CommandSlot::End() {
  device_.Check(device_.vk().EndCommandBuffer(buffer_), "vkEndCommandBuffer");
}

Queue::Queue(const Device& device, std::uint32_t index)
    : device_(device), index_(index), timeline_(device) {
  device.vk().GetDeviceQueue(device.handle(), device.physical().queue_family, index, &handle_);
  const VkSemaphoreTypeCreateInfo timeline = {
      .sType = VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO,
      .semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE,
  };
  const VkSemaphoreCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO,
      .pNext = &timeline,
  };
  device.Check(device.vk().CreateSemaphore(device.handle(), &info, nullptr, timeline_.out()),
               "vkCreateSemaphore");
}

std::unique_ptr<CommandSlot> Queue::Begin() {
  std::unique_ptr<CommandSlot> slot;
  {
    const std::lock_guard lock(mutex_);
    if (!ring_.empty()) {
      const TimelinePoint oldest = {timeline_.get(), ring_.front().value};
      if (ring_.size() >= kMaxSubmitted) device_.Wait(oldest);
      if (device_.Reached(oldest)) {
        slot = std::move(ring_.front().slot);
        ring_.erase(ring_.begin());
      }
    }
  }
  if (slot == nullptr) slot = std::make_unique<CommandSlot>(device_);
  slot->Begin();
  return slot;
}

TimelinePoint Queue::Submit(std::unique_ptr<CommandSlot> slot, std::span<const TimelinePoint> waits,
                            std::span<const TimelinePoint> signals) {
  slot->End();
  const VkCommandBufferSubmitInfo commands = {
      .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_SUBMIT_INFO,
      .commandBuffer = slot->buffer(),
  };
  std::vector<VkSemaphoreSubmitInfo> wait_infos;
  for (const TimelinePoint& point : waits) wait_infos.push_back(SubmitInfo(point));
  std::vector<VkSemaphoreSubmitInfo> signal_infos;
  for (const TimelinePoint& point : signals) signal_infos.push_back(SubmitInfo(point));

  const std::lock_guard lock(mutex_);
  const TimelinePoint done = {timeline_.get(), last_value_ + 1};
  signal_infos.push_back(SubmitInfo(done));
  const VkSubmitInfo2 info = {
      .sType = VK_STRUCTURE_TYPE_SUBMIT_INFO_2,
      .waitSemaphoreInfoCount = static_cast<std::uint32_t>(wait_infos.size()),
      .pWaitSemaphoreInfos = wait_infos.data(),
      .commandBufferInfoCount = 1,
      .pCommandBufferInfos = &commands,
      .signalSemaphoreInfoCount = static_cast<std::uint32_t>(signal_infos.size()),
      .pSignalSemaphoreInfos = signal_infos.data(),
  };
  ring_.push_back({std::move(slot), done.value});
  const VkResult result = device_.vk().QueueSubmit2(handle_, 1, &info, VK_NULL_HANDLE);
  if (result != VK_SUCCESS) ring_.pop_back();
  device_.Check(result, "vkQueueSubmit2");
  last_value_ = done.value;
  return done;
}

std::uint64_t Queue::Load() const {
  // The device can be done with a submission before Submit has noted it.
  const std::uint64_t done = device_.CounterValue(timeline_.get());
  const std::uint64_t submitted = last_value_;
  return submitted > done ? submitted - done : 0;
}

void RecordBarrier(const Device& device, VkCommandBuffer commands, VkPipelineStageFlags2 from,
                   VkAccessFlags2 from_access, VkPipelineStageFlags2 to, VkAccessFlags2 to_access) {
  const VkMemoryBarrier2 barrier = {
      .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER_2,
      .srcStageMask = from,
      .srcAccessMask = from_access,
      .dstStageMask = to,
      .dstAccessMask = to_access,
  };
  const VkDependencyInfo info = {
      .sType = VK_STRUCTURE_TYPE_DEPENDENCY_INFO,
      .memoryBarrierCount = 1,
      .pMemoryBarriers = &barrier,
  };
  device.vk().CmdPipelineBarrier2(commands, &info);
}

}  // namespace jax_aat
