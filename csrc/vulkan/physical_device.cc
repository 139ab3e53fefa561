#include "vulkan/physical_device.h"

#include <algorithm>

#include "vulkan/features.h"
#include "vulkan/status.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

// Lets heads of 16,384 queries and keys take turns on a GPU of 80 GB.
constexpr std::uint64_t kScoreGradientShareOfHeap = 32;

// What traits need beyond the plain properties.
struct Probed {
  VkPhysicalDeviceProperties2 core = {VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2};
  VkPhysicalDeviceVulkan11Properties vulkan11 = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES};
  VkPhysicalDeviceVulkan12Properties vulkan12 = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES};
  VkPhysicalDeviceVulkan13Properties vulkan13 = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_PROPERTIES};
  VkPhysicalDeviceExternalMemoryHostPropertiesEXT host = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_MEMORY_HOST_PROPERTIES_EXT};
};

DeviceKind KindOf(VkPhysicalDeviceType type) {
  switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
      return DeviceKind::kDiscrete;
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
      return DeviceKind::kIntegrated;
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU:
      return DeviceKind::kVirtual;
    case VK_PHYSICAL_DEVICE_TYPE_CPU:
      return DeviceKind::kCpu;
    default:
      return DeviceKind::kOther;
  }
}

void ProbeExtensions(const InstanceTable& vk, PhysicalDevice& device) {
  std::uint32_t count = 0;
  Check(vk.EnumerateDeviceExtensionProperties(device.handle, nullptr, &count, nullptr),
        "vkEnumerateDeviceExtensionProperties");
  std::vector<VkExtensionProperties> all(count);
  Check(vk.EnumerateDeviceExtensionProperties(device.handle, nullptr, &count, all.data()),
        "vkEnumerateDeviceExtensionProperties");
  for (const char* known : KnownExtensions()) {
    const auto found = std::ranges::any_of(all, [known](const auto& extension) {
      return std::string(extension.extensionName) == known;
    });
    if (found) device.extensions.insert(known);
  }
}

// The compute-only family is preferred: on some devices its kernels may hold more shared memory.
void ChooseQueueFamily(const InstanceTable& vk, PhysicalDevice& device) {
  std::uint32_t count = 0;
  vk.GetPhysicalDeviceQueueFamilyProperties(device.handle, &count, nullptr);
  std::vector<VkQueueFamilyProperties> families(count);
  vk.GetPhysicalDeviceQueueFamilyProperties(device.handle, &count, families.data());
  const auto take = [&](bool compute_only) {
    for (std::uint32_t i = 0; i < count; ++i) {
      const VkQueueFlags flags = families[i].queueFlags;
      if (!(flags & VK_QUEUE_COMPUTE_BIT) || families[i].queueCount == 0) continue;
      if (compute_only && (flags & VK_QUEUE_GRAPHICS_BIT)) continue;
      device.queue_family = i;
      device.queue_count = families[i].queueCount;
      device.timestamp_bits = families[i].timestampValidBits;
      return true;
    }
    return false;
  };
  if (!take(true) && !take(false)) device.missing.emplace_back("a compute queue");
}

void ProbeCooperativeMatrices(const InstanceTable& vk, FeatureChain& features,
                              PhysicalDevice& device) {
  DeviceTraits& traits = device.traits;
  if (!features.matrix.cooperativeMatrix || !features.vulkan12.vulkanMemoryModel ||
      !features.vulkan12.shaderFloat16 || !traits.storage_16bit || traits.min_subgroup_size > 32 ||
      traits.max_subgroup_size < 32) {
    return;
  }
  std::uint32_t count = 0;
  Check(vk.GetPhysicalDeviceCooperativeMatrixPropertiesKHR(device.handle, &count, nullptr),
        "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR");
  std::vector<VkCooperativeMatrixPropertiesKHR> shapes(
      count, {VK_STRUCTURE_TYPE_COOPERATIVE_MATRIX_PROPERTIES_KHR});
  Check(vk.GetPhysicalDeviceCooperativeMatrixPropertiesKHR(device.handle, &count, shapes.data()),
        "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR");
  const auto has = [&shapes](VkComponentTypeKHR type) {
    return std::ranges::any_of(shapes, [type](const VkCooperativeMatrixPropertiesKHR& shape) {
      return shape.MSize == 16 && shape.NSize == 16 && shape.KSize == 16 && shape.AType == type &&
             shape.BType == type && shape.CType == VK_COMPONENT_TYPE_FLOAT32_KHR &&
             shape.ResultType == VK_COMPONENT_TYPE_FLOAT32_KHR &&
             shape.scope == VK_SCOPE_SUBGROUP_KHR;
    });
  };
  traits.coopmat_float16 = has(VK_COMPONENT_TYPE_FLOAT16_KHR);
  traits.coopmat_bfloat16 = features.bfloat16.shaderBFloat16Type &&
                            features.bfloat16.shaderBFloat16CooperativeMatrix &&
                            has(VK_COMPONENT_TYPE_BFLOAT16_KHR);
}

void FillTraits(const InstanceTable& vk, const Probed& probed, FeatureChain& features,
                PhysicalDevice& device) {
  DeviceTraits& traits = device.traits;
  traits.subgroup_size = probed.vulkan11.subgroupSize;
  const bool selectable = probed.vulkan13.requiredSubgroupSizeStages & VK_SHADER_STAGE_COMPUTE_BIT;
  traits.min_subgroup_size = selectable ? probed.vulkan13.minSubgroupSize : traits.subgroup_size;
  traits.max_subgroup_size = selectable ? probed.vulkan13.maxSubgroupSize : traits.subgroup_size;
  traits.max_shared_memory = device.limits.maxComputeSharedMemorySize;
  traits.max_workgroup_invocations = std::min(device.limits.maxComputeWorkGroupInvocations,
                                              device.limits.maxComputeWorkGroupSize[0]);
  traits.max_workgroup_count = std::min(device.limits.maxComputeWorkGroupCount[0],
                                        device.limits.maxComputeWorkGroupCount[1]);
  // LP_MAX_TGSI_LOOP_ITERATIONS of Mesa: what is left of a loop then does not run, silently.
  if (probed.vulkan12.driverID == VK_DRIVER_ID_MESA_LLVMPIPE) traits.max_loop_iterations = 65535;
  for (std::uint32_t heap = 0; heap < device.memory.memoryHeapCount; ++heap) {
    if (!(device.memory.memoryHeaps[heap].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT)) continue;
    traits.max_score_gradient_bytes =
        std::max(traits.max_score_gradient_bytes,
                 device.memory.memoryHeaps[heap].size / kScoreGradientShareOfHeap);
  }
  traits.storage_16bit = features.vulkan11.storageBuffer16BitAccess;
  ProbeCooperativeMatrices(vk, features, device);
}

}  // namespace

const char* DeviceKindName(DeviceKind kind) {
  switch (kind) {
    case DeviceKind::kDiscrete:
      return "discrete";
    case DeviceKind::kIntegrated:
      return "integrated";
    case DeviceKind::kVirtual:
      return "virtual";
    case DeviceKind::kCpu:
      return "cpu";
    case DeviceKind::kOther:
      break;
  }
  return "other";
}

std::optional<std::uint32_t> PhysicalDevice::MemoryType(VkMemoryPropertyFlags flags,
                                                        std::uint32_t allowed) const {
  for (std::uint32_t type = 0; type < memory.memoryTypeCount; ++type) {
    const bool has = (memory.memoryTypes[type].propertyFlags & flags) == flags;
    if (has && (allowed >> type & 1)) return type;
  }
  return std::nullopt;
}

PhysicalDevice ProbePhysicalDevice(const InstanceTable& vk, VkPhysicalDevice handle,
                                   std::uint32_t index) {
  PhysicalDevice device;
  device.handle = handle;
  device.index = index;
  ProbeExtensions(vk, device);

  Probed probed;
  probed.core.pNext = &probed.vulkan11;
  probed.vulkan11.pNext = &probed.vulkan12;
  probed.vulkan12.pNext = &probed.vulkan13;
  if (device.HasExtension(VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME)) {
    probed.vulkan13.pNext = &probed.host;
  }
  vk.GetPhysicalDeviceProperties2(handle, &probed.core);
  const VkPhysicalDeviceProperties& properties = probed.core.properties;
  device.name = properties.deviceName;
  device.kind = KindOf(properties.deviceType);
  device.vendor_id = properties.vendorID;
  device.driver_version = properties.driverVersion;
  device.api_version = properties.apiVersion;
  device.limits = properties.limits;
  if (properties.apiVersion < VK_API_VERSION_1_3) {
    device.missing.push_back(Concat("Vulkan 1.3 (it has ",
                                    VK_API_VERSION_MAJOR(properties.apiVersion), ".",
                                    VK_API_VERSION_MINOR(properties.apiVersion), ")"));
    return device;
  }
  device.uuid = Hexadecimal(probed.vulkan11.deviceUUID);
  device.driver_name = probed.vulkan12.driverName;
  device.driver_info = probed.vulkan12.driverInfo;
  device.max_allocation_bytes =
      std::min(probed.vulkan11.maxMemoryAllocationSize, probed.vulkan13.maxBufferSize);
  device.host_import_alignment = probed.host.minImportedHostPointerAlignment;
  device.max_subgroups = probed.vulkan13.maxComputeWorkgroupSubgroups;

  VkPhysicalDeviceMemoryProperties2 memory = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
  vk.GetPhysicalDeviceMemoryProperties2(handle, &memory);
  device.memory = memory.memoryProperties;

  FeatureChain features(device.extensions);
  vk.GetPhysicalDeviceFeatures2(handle, &features.core);
  for (const Feature& feature : KnownFeatures()) {
    const bool present = feature.of(features);
    device.features.emplace_back(feature.name, present);
    if (feature.required && !present) device.missing.emplace_back(feature.name);
  }
  if (!(probed.vulkan11.subgroupSupportedOperations & VK_SUBGROUP_FEATURE_SHUFFLE_BIT)) {
    device.missing.emplace_back("subgroup shuffles");
  }
  ChooseQueueFamily(vk, device);
  FillTraits(vk, probed, features, device);
  return device;
}

}  // namespace jax_aat
