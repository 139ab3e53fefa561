// What a physical device is and can do, probed once when the instance is made.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "attention/dispatch_plan.h"
#include "vulkan/extensions.h"
#include "vulkan/loader.h"

namespace jax_aat {

enum class DeviceKind { kDiscrete, kIntegrated, kVirtual, kCpu, kOther };

const char* DeviceKindName(DeviceKind kind);

struct PhysicalDevice {
  VkPhysicalDevice handle = VK_NULL_HANDLE;
  std::uint32_t index = 0;
  std::string name;
  DeviceKind kind = DeviceKind::kOther;
  std::uint32_t vendor_id = 0;
  std::string uuid;  // 32 hexadecimal digits
  std::string driver_name;
  std::string driver_info;
  std::uint32_t driver_version = 0;
  std::uint32_t api_version = 0;

  std::set<std::string> extensions;  // those of KnownExtensions() that it has
  std::vector<std::pair<std::string, bool>> features;
  std::vector<std::string> missing;  // what the runtime requires and it lacks

  VkPhysicalDeviceLimits limits = {};
  VkPhysicalDeviceMemoryProperties memory = {};
  std::uint64_t max_allocation_bytes = 0;   // of memory under one buffer
  std::uint64_t host_import_alignment = 0;  // 0: host memory cannot be imported
  std::uint32_t max_subgroups = 0;          // of a workgroup with a required subgroup size
  std::uint32_t queue_family = 0;
  std::uint32_t queue_count = 0;
  std::uint32_t timestamp_bits = 0;

  DeviceTraits traits;

  bool HasExtension(const char* extension) const { return extensions.contains(extension); }
  // Host memory and device memory are the same.
  bool Unified() const { return kind == DeviceKind::kCpu || kind == DeviceKind::kIntegrated; }
  // The first of the allowed memory types (one bit each) that has all the flags. Vulkan orders
  // types with fewer flags first.
  std::optional<std::uint32_t> MemoryType(VkMemoryPropertyFlags flags, std::uint32_t allowed) const;
};

PhysicalDevice ProbePhysicalDevice(const InstanceTable& vk, VkPhysicalDevice handle,
                                   std::uint32_t index);

}  // namespace jax_aat
