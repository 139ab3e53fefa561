// A queue: its ring of command buffers and its timeline.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "vulkan/device_handle.h"

namespace jax_aat {

// A command pool with its one command buffer.
class CommandSlot {
 public:
  explicit CommandSlot(const Device& device);

  VkCommandBuffer buffer() const { return buffer_; }
  void Begin();
  void End();

 private:
  const Device& device_;
  CommandPoolHandle pool_;
  VkCommandBuffer buffer_ = VK_NULL_HANDLE;
};

class Queue {
 public:
  Queue(const Device& device, std::uint32_t index);

  std::uint32_t index() const { return index_; }

  // A slot whose command buffer records. Dropping it instead of submitting it is harmless.
  std::unique_ptr<CommandSlot> Begin();

  // Submits what the slot recorded, after `waits`; then `signals` and the queue's own timeline are
  // signalled. Returns the point on that timeline.
  TimelinePoint Submit(std::unique_ptr<CommandSlot> slot, std::span<const TimelinePoint> waits,
                       std::span<const TimelinePoint> signals);

  // Submissions that the device has not finished.
  std::uint64_t Load() const;

 private:
  struct Submitted {
    std::unique_ptr<CommandSlot> slot;
    std::uint64_t value;
  };

  const Device& device_;
  const std::uint32_t index_;
  VkQueue handle_ = VK_NULL_HANDLE;
  SemaphoreHandle timeline_;
  std::mutex mutex_;
  std::atomic<std::uint64_t> last_value_ = 0;
  std::vector<Submitted> ring_;  // oldest first
};

// Orders what was recorded before against what follows.
void RecordBarrier(const Device& device, VkCommandBuffer commands, VkPipelineStageFlags2 from,
                   VkAccessFlags2 from_access, VkPipelineStageFlags2 to, VkAccessFlags2 to_access);

}  // namespace jax_aat
