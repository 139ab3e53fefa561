#include "vulkan/validation.h"

#include <mutex>

#include "vulkan/logging.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

struct Collected {
  std::mutex mutex;
  std::vector<std::string> messages;
};

// Never destroyed: layers may report while the process exits.
Collected& Messages() {
  static auto* const collected = new Collected;
  return *collected;
}

VKAPI_ATTR VkBool32 VKAPI_CALL Collect(VkDebugUtilsMessageSeverityFlagBitsEXT severity,
                                       VkDebugUtilsMessageTypeFlagsEXT,
                                       const VkDebugUtilsMessengerCallbackDataEXT* data, void*) {
  const bool error = severity >= VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT;
  Log(error ? LogLevel::kError : LogLevel::kWarning, data->pMessage);
  Collected& collected = Messages();
  const std::lock_guard lock(collected.mutex);
  collected.messages.emplace_back(data->pMessage);
  return VK_FALSE;
}

}  // namespace

bool ValidationWanted() {
  static const bool wanted = [] {
    const std::string value = Environment("JAX_AAT_VALIDATION");
    return !value.empty() && value != "0";
  }();
  return wanted;
}

VkDebugUtilsMessengerCreateInfoEXT ValidationMessengerInfo() {
  return {
      .sType = VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT,
      .messageSeverity = VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT |
                         VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT,
      .messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT,
      .pfnUserCallback = Collect,
  };
}

std::vector<std::string> ValidationMessages() {
  Collected& collected = Messages();
  const std::lock_guard lock(collected.mutex);
  return collected.messages;
}

}  // namespace jax_aat
