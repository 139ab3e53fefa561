#include "vulkan/loader.h"

#include <dlfcn.h>

#include "vulkan/status.h"
#include "vulkan/text.h"

namespace jax_aat {

GlobalTable LoadGlobalTable() {
  // Never closed: drivers keep threads and exit handlers that live as long as the process.
  void* library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(ErrorKind::kUnavailable,
                Concat("The Vulkan loader could not be opened (", dlerror(),
                       "). Install it (Debian and Ubuntu: apt install libvulkan1) and a driver "
                       "(mesa-vulkan-drivers, or your GPU vendor's)."));
  }
  GlobalTable table;
  table.GetInstanceProcAddr =
      reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(library, "vkGetInstanceProcAddr"));
  if (table.GetInstanceProcAddr == nullptr) {
    throw Error(ErrorKind::kUnavailable,
                "libvulkan.so.1 has no vkGetInstanceProcAddr: it is not a Vulkan loader. Install "
                "the one of your distribution (Debian and Ubuntu: apt install libvulkan1).");
  }
#define JAX_AAT_LOAD(name) \
  table.name =             \
      reinterpret_cast<PFN_vk##name>(table.GetInstanceProcAddr(VK_NULL_HANDLE, "vk" #name));
  JAX_AAT_GLOBAL_FUNCTIONS(JAX_AAT_LOAD)
#undef JAX_AAT_LOAD
  return table;
}

InstanceTable LoadInstanceTable(const GlobalTable& global, VkInstance instance) {
  InstanceTable table;
#define JAX_AAT_LOAD(name) \
  table.name = reinterpret_cast<PFN_vk##name>(global.GetInstanceProcAddr(instance, "vk" #name));
  JAX_AAT_INSTANCE_FUNCTIONS(JAX_AAT_LOAD)
#undef JAX_AAT_LOAD
  return table;
}

DeviceTable LoadDeviceTable(const InstanceTable& instance, VkDevice device) {
  DeviceTable table;
#define JAX_AAT_LOAD(name) \
  table.name = reinterpret_cast<PFN_vk##name>(instance.GetDeviceProcAddr(device, "vk" #name));
  JAX_AAT_DEVICE_FUNCTIONS(JAX_AAT_LOAD)
#undef JAX_AAT_LOAD
  return table;
}

}  // namespace jax_aat
