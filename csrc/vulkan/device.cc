#include "vulkan/device.h"

#include <algorithm>
#include <vector>

#include "vulkan/features.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

// More queues than calls that overlap on one device bring nothing.
constexpr std::uint32_t kMaxQueues = 4;

}  // namespace

Device::Device(const Instance& instance, const PhysicalDevice& physical)
    : instance_(instance),
      physical_(physical),
      queue_count_(std::min(physical.queue_count, kMaxQueues)) {
  RequireServed(physical);
  const InstanceTable& vk = instance.vk();
  FeatureChain present(physical.extensions);
  vk.GetPhysicalDeviceFeatures2(physical.handle, &present.core);
  FeatureChain enabled(physical.extensions);
  for (const Feature& feature : KnownFeatures()) feature.of(enabled) = feature.of(present);

  std::vector<const char*> extensions;
  for (const std::string& extension : physical.extensions) extensions.push_back(extension.c_str());
  const std::vector<float> priorities(queue_count_, 1.0f);
  const VkDeviceQueueCreateInfo queues = {
      .sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO,
      .queueFamilyIndex = physical.queue_family,
      .queueCount = queue_count_,
      .pQueuePriorities = priorities.data(),
  };
  const VkDeviceCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
      .pNext = &enabled.core,
      .queueCreateInfoCount = 1,
      .pQueueCreateInfos = &queues,
      .enabledExtensionCount = static_cast<std::uint32_t>(extensions.size()),
      .ppEnabledExtensionNames = extensions.data(),
  };
  jax_aat::Check(vk.CreateDevice(physical.handle, &info, nullptr, &handle_), "vkCreateDevice");
  vk_ = LoadDeviceTable(vk, handle_);
}

Device::~Device() { vk_.DestroyDevice(handle_, nullptr); }

void Device::Check(VkResult result, const char* operation) const {
  if (result == VK_ERROR_DEVICE_LOST) {
    MarkLost();
    RequireAlive();
  }
  jax_aat::Check(result, operation);
}

void Device::MarkLost() const {
  Loss expected = Loss::kNone;
  loss_.compare_exchange_strong(expected, Loss::kLatched);
}

void Device::RequireAlive() const {
  if (!lost()) return;
  loss_ = Loss::kReported;
  throw Error(ErrorKind::kUnavailable,
              Concat("The Vulkan device ", physical_.name,
                     " was lost (a reset by the driver, or a kernel that ran too long). This call "
                     "failed; the next one starts the device anew."));
}

std::uint64_t Device::CounterValue(VkSemaphore timeline) const {
  std::uint64_t value = 0;
  Check(vk_.GetSemaphoreCounterValue(handle_, timeline, &value), "vkGetSemaphoreCounterValue");
  return value;
}

void Device::Wait(const TimelinePoint& point) const {
  const VkSemaphoreWaitInfo info = {
      .sType = VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO,
      .semaphoreCount = 1,
      .pSemaphores = &point.semaphore,
      .pValues = &point.value,
  };
  const VkResult result = vk_.WaitSemaphores(handle_, &info, UINT64_MAX);
  // Without the wait nobody can tell when memory may be used again: as good as lost.
  if (result != VK_SUCCESS) MarkLost();
  Check(result, "vkWaitSemaphores");
}

}  // namespace jax_aat
