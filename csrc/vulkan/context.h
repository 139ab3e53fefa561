// Everything of one device that outlives a call, and the running of plans on it.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "attention/dispatch_plan.h"
#include "attention/tuning.h"
#include "vulkan/commands.h"
#include "vulkan/device.h"
#include "vulkan/memory.h"
#include "vulkan/pipelines.h"
#include "vulkan/query_ring.h"

namespace jax_aat {

class Timestamps;

// Device addresses by operand slot; those of absent operands and of scratch are not read.
using OperandAddresses = std::array<VkDeviceAddress, OPERAND_COUNT>;

struct BufferCopy {
  VkBuffer source = VK_NULL_HANDLE;
  VkBuffer target = VK_NULL_HANDLE;
  VkBufferCopy range = {};
};

// What happens around the dispatches of a plan, in this order: the waits, the copies to the
// device, the dispatches, the copies back, the signals.
struct Surroundings {
  std::span<const TimelinePoint> waits;
  std::span<const BufferCopy> copies_in;
  std::span<const BufferCopy> copies_out;
  bool host_reads = false;  // the host reads what the device wrote
  std::span<const TimelinePoint> signals;
  const Timestamps* timestamps = nullptr;  // times the dispatches
};

// A plan with the scratch that it takes: a block of the context's, or somebody else's.
struct PreparedPlan {
  DispatchPlan plan;
  VkDeviceAddress scratch = 0;
  std::optional<Block> block;
};

// What was handed to the device.
struct Submission {
  TimelinePoint done;  // reached when all of it is
  std::uint32_t queue = 0;
  std::chrono::steady_clock::time_point handed_over;  // just before
};

class Context {
 public:
  Context(const Instance& instance, const PhysicalDevice& physical);
  // Waits until the device is idle.
  ~Context();

  const Device& device() const { return device_; }
  // With the tuning in use, which may be another one for the next call.
  DeviceTraits traits() const;
  // Later calls use it.
  void SetTuning(Tuning tuning);
  // Keeps the tuning in use for later processes, see WriteTuning.
  void SaveTuning() const;
  // Asks the device how it lays out cooperative matrices. With `hide_layout`, for tests, later
  // calls know no layout even where it is the one that kernels assume.
  void ProbeCoopmatLayout(bool hide_layout);
  MemoryManager& memory() { return memory_; }
  QueryRing& queries() { return queries_; }
  Pipelines& pipelines() { return pipelines_; }

  // Plans a call within the memory that can be had. `lent` may give scratch of so many bytes that
  // is its caller's, in order with the submission; where it answers 0 the context takes its own.
  PreparedPlan Prepare(const AttentionProblem& problem,
                       const std::function<VkDeviceAddress(std::uint64_t)>& lent = {});

  // Submits the plan and returns without waiting for it. The parameter block is the context's own.
  Submission Run(PreparedPlan prepared, const OperandAddresses& addresses,
                 const Surroundings& around);

  // Submits what `record` records.
  TimelinePoint Submit(const std::function<void(VkCommandBuffer)>& record);

  // What the interop layer keeps for the context's life: one object, made when first asked for and
  // destroyed before the device.
  template <typename T>
  T& Companion() {
    std::call_once(companion_made_, [this] { companion_ = std::make_shared<T>(*this); });
    return *static_cast<T*>(companion_.get());
  }

 private:
  Queue& LeastLoadedQueue();
  void Record(VkCommandBuffer commands, const DispatchPlan& plan,
              std::span<const VkPipeline> pipelines, VkDeviceAddress parameters,
              const Surroundings& around) const;

  const Device device_;
  mutable std::mutex traits_mutex_;  // of tuning and matrices among the traits; the rest stays
  DeviceTraits traits_;
  MemoryManager memory_;
  QueryRing queries_;
  Pipelines pipelines_;
  std::vector<std::unique_ptr<Queue>> queues_;
  std::atomic<std::uint32_t> next_queue_ = 0;
  std::once_flag companion_made_;
  std::shared_ptr<void> companion_;
};

}  // namespace jax_aat
