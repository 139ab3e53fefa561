// What the validation layers say (JAX_AAT_VALIDATION=1), collected for the whole process.
#pragma once

#include <string>
#include <vector>

#include "vulkan/extensions.h"

namespace jax_aat {

inline constexpr const char* kValidationLayer = "VK_LAYER_KHRONOS_validation";

bool ValidationWanted();

// Where the layers report to, for instance creation and for the messenger.
VkDebugUtilsMessengerCreateInfoEXT ValidationMessengerInfo();

std::vector<std::string> ValidationMessages();

}  // namespace jax_aat
