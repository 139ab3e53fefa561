#include "vulkan/status.h"

#include "vulkan/text.h"

namespace jax_aat {
namespace {

const char* ResultName(VkResult result) {
  switch (result) {
#define JAX_AAT_RESULT(name) \
  case name:                 \
    return #name;
    JAX_AAT_RESULT(VK_SUCCESS)
    JAX_AAT_RESULT(VK_NOT_READY)
    JAX_AAT_RESULT(VK_TIMEOUT)
    JAX_AAT_RESULT(VK_INCOMPLETE)
    JAX_AAT_RESULT(VK_ERROR_OUT_OF_HOST_MEMORY)
    JAX_AAT_RESULT(VK_ERROR_OUT_OF_DEVICE_MEMORY)
    JAX_AAT_RESULT(VK_ERROR_INITIALIZATION_FAILED)
    JAX_AAT_RESULT(VK_ERROR_DEVICE_LOST)
    JAX_AAT_RESULT(VK_ERROR_MEMORY_MAP_FAILED)
    JAX_AAT_RESULT(VK_ERROR_LAYER_NOT_PRESENT)
    JAX_AAT_RESULT(VK_ERROR_EXTENSION_NOT_PRESENT)
    JAX_AAT_RESULT(VK_ERROR_FEATURE_NOT_PRESENT)
    JAX_AAT_RESULT(VK_ERROR_INCOMPATIBLE_DRIVER)
    JAX_AAT_RESULT(VK_ERROR_TOO_MANY_OBJECTS)
    JAX_AAT_RESULT(VK_ERROR_FRAGMENTED_POOL)
    JAX_AAT_RESULT(VK_ERROR_INVALID_EXTERNAL_HANDLE)
    JAX_AAT_RESULT(VK_ERROR_INVALID_OPAQUE_CAPTURE_ADDRESS)
    JAX_AAT_RESULT(VK_ERROR_UNKNOWN)
#undef JAX_AAT_RESULT
    default:
      return "an unknown Vulkan result";
  }
}

}  // namespace

void Check(VkResult result, const char* operation) {
  if (result >= 0) return;
  const std::string words =
      Concat(operation, " failed: ", ResultName(result), " (", static_cast<int>(result), ")");
  switch (result) {
    case VK_ERROR_OUT_OF_HOST_MEMORY:
    case VK_ERROR_OUT_OF_DEVICE_MEMORY:
    case VK_ERROR_TOO_MANY_OBJECTS:
      throw Error(ErrorKind::kOutOfMemory, words);
    case VK_ERROR_DEVICE_LOST:
    case VK_ERROR_INITIALIZATION_FAILED:
    case VK_ERROR_INCOMPATIBLE_DRIVER:
      throw Error(ErrorKind::kUnavailable, words);
    default:
      throw Error(ErrorKind::kInternal, words);
  }
}

}  // namespace jax_aat
