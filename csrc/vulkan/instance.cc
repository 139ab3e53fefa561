#include "vulkan/instance.h"

#include <algorithm>
#include <cctype>
#include <string>

#include "vulkan/logging.h"
#include "vulkan/status.h"
#include "vulkan/text.h"
#include "vulkan/validation.h"

namespace jax_aat {
namespace {

constexpr const char* kInstallDriver =
    "Install a Vulkan 1.3 driver: your GPU vendor's, or Mesa's (Debian and Ubuntu: apt install "
    "mesa-vulkan-drivers), which also computes on the CPU.";

std::string Lowered(std::string text) {
  std::ranges::transform(text, text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

void RequireValidationLayer(const GlobalTable& global) {
  std::uint32_t count = 0;
  Check(global.EnumerateInstanceLayerProperties(&count, nullptr),
        "vkEnumerateInstanceLayerProperties");
  std::vector<VkLayerProperties> layers(count);
  Check(global.EnumerateInstanceLayerProperties(&count, layers.data()),
        "vkEnumerateInstanceLayerProperties");
  const bool found = std::ranges::any_of(layers, [](const VkLayerProperties& layer) {
    return std::string(layer.layerName) == kValidationLayer;
  });
  if (!found) {
    throw Error(ErrorKind::kUnavailable, Concat("JAX_AAT_VALIDATION is set, but ", kValidationLayer,
                                                " is not installed (Debian and Ubuntu: apt install "
                                                "vulkan-validationlayers)."));
  }
}

int Preference(DeviceKind kind) {
  switch (kind) {
    case DeviceKind::kDiscrete:
      return 0;
    case DeviceKind::kIntegrated:
      return 1;
    case DeviceKind::kVirtual:
      return 2;
    case DeviceKind::kCpu:
      return 3;
    case DeviceKind::kOther:
      break;
  }
  return 4;
}

bool Matches(const PhysicalDevice& device, const std::string& wanted) {
  if (std::ranges::all_of(wanted, [](unsigned char c) { return std::isdigit(c); })) {
    return std::to_string(device.index) == wanted;
  }
  return Lowered(device.name).find(Lowered(wanted)) != std::string::npos;
}

}  // namespace

// Delegates first, so that a failure on the way destroys what was made.
Instance::Instance() : Instance(LoadGlobalTable()) {
  Create();
  std::uint32_t count = 0;
  Check(vk_.EnumeratePhysicalDevices(handle_, &count, nullptr), "vkEnumeratePhysicalDevices");
  std::vector<VkPhysicalDevice> handles(count);
  Check(vk_.EnumeratePhysicalDevices(handle_, &count, handles.data()),
        "vkEnumeratePhysicalDevices");
  for (std::uint32_t i = 0; i < count; ++i) {
    devices_.push_back(ProbePhysicalDevice(vk_, handles[i], i));
  }
}

void Instance::Create() {
  std::uint32_t version = VK_API_VERSION_1_0;
  if (global_.EnumerateInstanceVersion != nullptr) {
    Check(global_.EnumerateInstanceVersion(&version), "vkEnumerateInstanceVersion");
  }
  if (version < VK_API_VERSION_1_3) {
    throw Error(ErrorKind::kUnavailable,
                Concat("The Vulkan loader is of version ", VK_API_VERSION_MAJOR(version), ".",
                       VK_API_VERSION_MINOR(version), "; 1.3 or newer is needed."));
  }

  const bool validation = ValidationWanted();
  const VkApplicationInfo application = {
      .sType = VK_STRUCTURE_TYPE_APPLICATION_INFO,
      .pApplicationName = "jax_aat",
      .apiVersion = VK_API_VERSION_1_3,
  };
  VkInstanceCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
      .pApplicationInfo = &application,
  };
  constexpr VkValidationFeatureEnableEXT kSynchronization =
      VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT;
  VkDebugUtilsMessengerCreateInfoEXT messenger = ValidationMessengerInfo();
  const VkValidationFeaturesEXT checks = {
      .sType = VK_STRUCTURE_TYPE_VALIDATION_FEATURES_EXT,
      .pNext = &messenger,
      .enabledValidationFeatureCount = 1,
      .pEnabledValidationFeatures = &kSynchronization,
  };
  constexpr const char* kExtensions[] = {VK_EXT_DEBUG_UTILS_EXTENSION_NAME,
                                         VK_EXT_VALIDATION_FEATURES_EXTENSION_NAME};
  if (validation) {
    RequireValidationLayer(global_);
    info.pNext = &checks;
    info.enabledLayerCount = 1;
    info.ppEnabledLayerNames = &kValidationLayer;
    info.enabledExtensionCount = 2;
    info.ppEnabledExtensionNames = kExtensions;
  }
  const VkResult result = global_.CreateInstance(&info, nullptr, &handle_);
  if (result == VK_ERROR_INCOMPATIBLE_DRIVER) {
    throw Error(ErrorKind::kUnavailable, Concat("No Vulkan driver was found. ", kInstallDriver));
  }
  Check(result, "vkCreateInstance");
  vk_ = LoadInstanceTable(global_, handle_);
  if (validation) {
    Check(vk_.CreateDebugUtilsMessengerEXT(handle_, &messenger, nullptr, &messenger_),
          "vkCreateDebugUtilsMessengerEXT");
  }
}

Instance::~Instance() {
  if (messenger_ != VK_NULL_HANDLE) {
    vk_.DestroyDebugUtilsMessengerEXT(handle_, messenger_, nullptr);
  }
  if (handle_ != VK_NULL_HANDLE) vk_.DestroyInstance(handle_, nullptr);
}

std::uint32_t Instance::ChooseDevice() const {
  if (devices_.empty()) {
    throw Error(ErrorKind::kUnavailable, Concat("No Vulkan device was found. ", kInstallDriver));
  }
  const std::string wanted = Environment("JAX_AAT_DEVICE");
  const PhysicalDevice* chosen = nullptr;
  std::string names;
  for (const PhysicalDevice& device : devices_) {
    names += Concat(names.empty() ? "" : ", ", device.index, ": ", device.name);
    if (!wanted.empty()) {
      if (chosen == nullptr && Matches(device, wanted)) chosen = &device;
    } else if (device.missing.empty() &&
               (chosen == nullptr || Preference(device.kind) < Preference(chosen->kind))) {
      chosen = &device;
    }
  }
  if (chosen == nullptr && !wanted.empty()) {
    throw Error(ErrorKind::kUnavailable, Concat("JAX_AAT_DEVICE=", wanted,
                                                " is neither the index nor a part of the name of "
                                                "a device here (",
                                                names, ")."));
  }
  if (chosen == nullptr) chosen = &devices_.front();
  RequireServed(*chosen);
  Log(LogLevel::kInfo, Concat("device ", chosen->index, ": ", chosen->name));
  return chosen->index;
}

void RequireServed(const PhysicalDevice& device) {
  if (device.missing.empty()) return;
  std::string list;
  for (const std::string& name : device.missing) list += (list.empty() ? "" : ", ") + name;
  throw Error(ErrorKind::kUnavailable,
              Concat("The Vulkan device ", device.index, " (", device.name,
                     ") cannot be used, it lacks: ", list, ". ", kInstallDriver));
}

}  // namespace jax_aat
