// The Vulkan instance and the physical devices it shows.
#pragma once

#include <span>
#include <vector>

#include "vulkan/loader.h"
#include "vulkan/physical_device.h"

namespace jax_aat {

class Instance {
 public:
  // Throws Error (kUnavailable) with words that say what to install.
  Instance();
  ~Instance();
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;

  const InstanceTable& vk() const { return vk_; }
  std::span<const PhysicalDevice> devices() const { return devices_; }

  // The device that JAX_AAT_DEVICE names (an index or a part of the name), else the first of the
  // best kind: discrete, integrated, virtual, cpu. Throws Error (kUnavailable) where none serves.
  std::uint32_t ChooseDevice() const;

 private:
  explicit Instance(const GlobalTable& global) : global_(global) {}
  void Create();

  GlobalTable global_;
  VkInstance handle_ = VK_NULL_HANDLE;
  InstanceTable vk_;
  VkDebugUtilsMessengerEXT messenger_ = VK_NULL_HANDLE;
  std::vector<PhysicalDevice> devices_;
};

// Throws Error (kUnavailable) that names what the runtime requires and the device lacks.
void RequireServed(const PhysicalDevice& device);

}  // namespace jax_aat
