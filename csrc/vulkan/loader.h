// The Vulkan loader, opened at run time, and the functions that the runtime calls.
#pragma once

#include "vulkan/extensions.h"

namespace jax_aat {

#define JAX_AAT_GLOBAL_FUNCTIONS(X)       \
  X(EnumerateInstanceVersion)             \
  X(EnumerateInstanceExtensionProperties) \
  X(EnumerateInstanceLayerProperties)     \
  X(CreateInstance)

#define JAX_AAT_INSTANCE_FUNCTIONS(X)                \
  X(DestroyInstance)                                 \
  X(EnumeratePhysicalDevices)                        \
  X(EnumerateDeviceExtensionProperties)              \
  X(GetPhysicalDeviceProperties2)                    \
  X(GetPhysicalDeviceFeatures2)                      \
  X(GetPhysicalDeviceMemoryProperties2)              \
  X(GetPhysicalDeviceQueueFamilyProperties)          \
  X(GetPhysicalDeviceCalibrateableTimeDomainsEXT)    \
  X(GetPhysicalDeviceCooperativeMatrixPropertiesKHR) \
  X(CreateDevice)                                    \
  X(GetDeviceProcAddr)                               \
  X(CreateDebugUtilsMessengerEXT)                    \
  X(DestroyDebugUtilsMessengerEXT)

#define JAX_AAT_DEVICE_FUNCTIONS(X)     \
  X(DestroyDevice)                      \
  X(DeviceWaitIdle)                     \
  X(GetDeviceQueue)                     \
  X(QueueSubmit2)                       \
  X(AllocateMemory)                     \
  X(FreeMemory)                         \
  X(MapMemory)                          \
  X(CreateBuffer)                       \
  X(DestroyBuffer)                      \
  X(BindBufferMemory)                   \
  X(GetBufferMemoryRequirements)        \
  X(GetBufferDeviceAddress)             \
  X(GetMemoryHostPointerPropertiesEXT)  \
  X(GetMemoryFdKHR)                     \
  X(GetSemaphoreFdKHR)                  \
  X(CreateSemaphore)                    \
  X(DestroySemaphore)                   \
  X(GetSemaphoreCounterValue)           \
  X(WaitSemaphores)                     \
  X(CreateShaderModule)                 \
  X(DestroyShaderModule)                \
  X(CreatePipelineCache)                \
  X(DestroyPipelineCache)               \
  X(GetPipelineCacheData)               \
  X(CreatePipelineLayout)               \
  X(DestroyPipelineLayout)              \
  X(CreateComputePipelines)             \
  X(DestroyPipeline)                    \
  X(CreateCommandPool)                  \
  X(DestroyCommandPool)                 \
  X(ResetCommandPool)                   \
  X(AllocateCommandBuffers)             \
  X(BeginCommandBuffer)                 \
  X(EndCommandBuffer)                   \
  X(CmdBindPipeline)                    \
  X(CmdPushConstants)                   \
  X(CmdDispatch)                        \
  X(CmdCopyBuffer)                      \
  X(CmdPipelineBarrier2)                \
  X(CreateQueryPool)                    \
  X(DestroyQueryPool)                   \
  X(ResetQueryPool)                     \
  X(CmdWriteTimestamp2)                 \
  X(GetCalibratedTimestampsEXT)         \
  X(GetPipelineExecutablePropertiesKHR) \
  X(GetPipelineExecutableStatisticsKHR) \
  X(CmdCopyQueryPoolResults)

struct GlobalTable {
  PFN_vkGetInstanceProcAddr GetInstanceProcAddr = nullptr;
#define JAX_AAT_MEMBER(name) PFN_vk##name name = nullptr;
  JAX_AAT_GLOBAL_FUNCTIONS(JAX_AAT_MEMBER)
};

// Functions of extensions that the instance or the device does not have are null.
struct InstanceTable {
  JAX_AAT_INSTANCE_FUNCTIONS(JAX_AAT_MEMBER)
};

struct DeviceTable {
  JAX_AAT_DEVICE_FUNCTIONS(JAX_AAT_MEMBER)
#undef JAX_AAT_MEMBER
};

// Opens the loader. Throws Error (kUnavailable) with what to install.
GlobalTable LoadGlobalTable();
InstanceTable LoadInstanceTable(const GlobalTable& global, VkInstance instance);
DeviceTable LoadDeviceTable(const InstanceTable& table, VkDevice device);

}  // namespace jax_aat
