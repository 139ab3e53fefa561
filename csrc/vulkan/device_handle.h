// Ownership of one Vulkan object that a device made.
#pragma once

#include <utility>

#include "vulkan/device.h"

namespace jax_aat {

// `Destroy` is the member of DeviceTable that destroys a T.
template <typename T, auto Destroy>
class DeviceHandle {
 public:
  explicit DeviceHandle(const Device& device) : device_(&device) {}
  ~DeviceHandle() {
    if (handle_ != VK_NULL_HANDLE) (device_->vk().*Destroy)(device_->handle(), handle_, nullptr);
  }
  DeviceHandle(DeviceHandle&& other) noexcept
      : device_(other.device_), handle_(std::exchange(other.handle_, VK_NULL_HANDLE)) {}
  DeviceHandle& operator=(DeviceHandle&&) = delete;

  const T& get() const { return handle_; }
  // Where a function of Vulkan writes the new object.
  T* out() { return &handle_; }

 private:
  const Device* device_;
  T handle_ = VK_NULL_HANDLE;
};

using BufferHandle = DeviceHandle<VkBuffer, &DeviceTable::DestroyBuffer>;
using CommandPoolHandle = DeviceHandle<VkCommandPool, &DeviceTable::DestroyCommandPool>;
using MemoryHandle = DeviceHandle<VkDeviceMemory, &DeviceTable::FreeMemory>;
using PipelineHandle = DeviceHandle<VkPipeline, &DeviceTable::DestroyPipeline>;
using PipelineCacheHandle = DeviceHandle<VkPipelineCache, &DeviceTable::DestroyPipelineCache>;
using PipelineLayoutHandle = DeviceHandle<VkPipelineLayout, &DeviceTable::DestroyPipelineLayout>;
using QueryPoolHandle = DeviceHandle<VkQueryPool, &DeviceTable::DestroyQueryPool>;
using SemaphoreHandle = DeviceHandle<VkSemaphore, &DeviceTable::DestroySemaphore>;
using ShaderModuleHandle = DeviceHandle<VkShaderModule, &DeviceTable::DestroyShaderModule>;

}  // namespace jax_aat
