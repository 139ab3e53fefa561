#include "vulkan/local_heap.h"

namespace jax_aat {

LocalHeap LargestLocalHeap(const Device& device) {
  VkPhysicalDeviceMemoryBudgetPropertiesEXT budget = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
  VkPhysicalDeviceMemoryProperties2 memory = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
  const bool budgeted = device.physical().HasExtension(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
  if (budgeted) memory.pNext = &budget;
  device.instance_vk().GetPhysicalDeviceMemoryProperties2(device.physical().handle, &memory);
  LocalHeap largest;
  for (std::uint32_t i = 0; i < memory.memoryProperties.memoryHeapCount; ++i) {
    const VkMemoryHeap& heap = memory.memoryProperties.memoryHeaps[i];
    if (!(heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) || heap.size <= largest.bytes) continue;
    largest.bytes = heap.size;
    if (budgeted) largest.budget = {budget.heapBudget[i], budget.heapUsage[i]};
  }
  return largest;
}

}  // namespace jax_aat
