#include "vulkan/features.h"

namespace jax_aat {
namespace {

#define JAX_AAT_FEATURE(required, part, member)                                            \
  {                                                                                        \
#member, required, [](FeatureChain & chain) -> VkBool32& { return chain.part.member; } \
  }

constexpr Feature kFeatures[] = {
    JAX_AAT_FEATURE(true, vulkan12, bufferDeviceAddress),
    JAX_AAT_FEATURE(true, vulkan12, timelineSemaphore),
    JAX_AAT_FEATURE(true, vulkan12, hostQueryReset),
    JAX_AAT_FEATURE(true, vulkan13, synchronization2),
    JAX_AAT_FEATURE(true, vulkan13, subgroupSizeControl),
    JAX_AAT_FEATURE(false, vulkan13, computeFullSubgroups),
    JAX_AAT_FEATURE(false, vulkan13, maintenance4),
    JAX_AAT_FEATURE(false, core.features, shaderInt16),
    JAX_AAT_FEATURE(false, core.features, shaderInt64),
    JAX_AAT_FEATURE(false, vulkan11, storageBuffer16BitAccess),
    JAX_AAT_FEATURE(false, vulkan12, storageBuffer8BitAccess),
    JAX_AAT_FEATURE(false, vulkan12, shaderFloat16),
    JAX_AAT_FEATURE(false, vulkan12, shaderInt8),
    JAX_AAT_FEATURE(false, vulkan12, shaderSubgroupExtendedTypes),
    JAX_AAT_FEATURE(false, vulkan12, vulkanMemoryModel),
    JAX_AAT_FEATURE(false, vulkan12, vulkanMemoryModelDeviceScope),
    JAX_AAT_FEATURE(false, matrix, cooperativeMatrix),
    JAX_AAT_FEATURE(false, bfloat16, shaderBFloat16Type),
    JAX_AAT_FEATURE(false, bfloat16, shaderBFloat16CooperativeMatrix),
    JAX_AAT_FEATURE(false, reconvergence, shaderMaximalReconvergence),
    JAX_AAT_FEATURE(false, executables, pipelineExecutableInfo),
};
#undef JAX_AAT_FEATURE

constexpr const char* kExtensions[] = {
    VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME,
    VK_KHR_SHADER_BFLOAT16_EXTENSION_NAME,
    VK_KHR_SHADER_MAXIMAL_RECONVERGENCE_EXTENSION_NAME,
    VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME,
    VK_KHR_EXTERNAL_MEMORY_FD_EXTENSION_NAME,
    VK_KHR_EXTERNAL_SEMAPHORE_FD_EXTENSION_NAME,
    VK_EXT_MEMORY_BUDGET_EXTENSION_NAME,
    VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME,
    VK_EXT_CALIBRATED_TIMESTAMPS_EXTENSION_NAME,
};

}  // namespace

FeatureChain::FeatureChain(const std::set<std::string>& extensions) {
  void** next = &core.pNext;
  const auto link = [&next](auto& part) {
    *next = &part;
    next = &part.pNext;
  };
  link(vulkan11);
  link(vulkan12);
  link(vulkan13);
  if (extensions.contains(VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME)) link(matrix);
  if (extensions.contains(VK_KHR_SHADER_BFLOAT16_EXTENSION_NAME)) link(bfloat16);
  if (extensions.contains(VK_KHR_SHADER_MAXIMAL_RECONVERGENCE_EXTENSION_NAME)) link(reconvergence);
  if (extensions.contains(VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME)) link(executables);
}

std::span<const Feature> KnownFeatures() { return kFeatures; }
std::span<const char* const> KnownExtensions() { return kExtensions; }

}  // namespace jax_aat
