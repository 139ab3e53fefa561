// A logical device, its queues' handles and its lost-device latch.
#pragma once

#include <atomic>
#include <cstdint>

#include "vulkan/instance.h"
#include "vulkan/status.h"

namespace jax_aat {

// A moment in the device's work: the semaphore reaches the value.
struct TimelinePoint {
  VkSemaphore semaphore = VK_NULL_HANDLE;
  std::uint64_t value = 0;
};

class Device {
 public:
  Device(const Instance& instance, const PhysicalDevice& physical);
  // Every object made from the device must be gone by then.
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceTable& vk() const { return vk_; }
  VkDevice handle() const { return handle_; }
  const InstanceTable& instance_vk() const { return instance_.vk(); }
  const PhysicalDevice& physical() const { return physical_; }
  std::uint32_t queue_count() const { return queue_count_; }

  // As jax_aat::Check, and latches a lost device.
  void Check(VkResult result, const char* operation) const;

  // Latches the loss of the device; nobody was told of it yet.
  void MarkLost() const;
  bool lost() const { return loss_ != Loss::kNone; }
  // Whether some caller got the error that the device is lost.
  bool loss_reported() const { return loss_ == Loss::kReported; }
  // Throws Error (kUnavailable) if the device was lost.
  void RequireAlive() const;

  std::uint64_t CounterValue(VkSemaphore timeline) const;
  bool Reached(const TimelinePoint& point) const {
    return CounterValue(point.semaphore) >= point.value;
  }
  void Wait(const TimelinePoint& point) const;

 private:
  enum class Loss { kNone, kLatched, kReported };

  const Instance& instance_;
  const PhysicalDevice& physical_;
  std::uint32_t queue_count_;
  VkDevice handle_ = VK_NULL_HANDLE;
  DeviceTable vk_;
  mutable std::atomic<Loss> loss_ = Loss::kNone;
};

}  // namespace jax_aat
