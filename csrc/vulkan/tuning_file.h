// The tuning of a device on disk, beside its compiled pipelines.
#pragma once

#include <filesystem>

#include "attention/tuning.h"
#include "vulkan/physical_device.h"

namespace jax_aat {

// Where the tuning of a device lies, as CacheFile has it.
std::filesystem::path TuningPath(const PhysicalDevice& device);

// Empty where there is no file. A file that is damaged or of another device, and shapes that do not
// fit the device, are ignored with a warning: they cost speed, nothing else depends on them.
Tuning ReadTuning(const PhysicalDevice& device, const DeviceTraits& traits);

// Replaces the file in one step; an empty tuning removes it. Throws Error where that fails.
void WriteTuning(const PhysicalDevice& device, const Tuning& tuning);

}  // namespace jax_aat
