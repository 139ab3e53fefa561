// What the driver's compiler tells of a pipeline (registers, spills), for the debug log: a kernel
// that spills is slow without any other sign.
#pragma once

#include <string>

#include "vulkan/device.h"

namespace jax_aat {

// Flags with which a pipeline must be created to be asked: none below log level debug.
VkPipelineCreateFlags StatisticsFlags(const Device& device);

// ", name value" for every statistic; empty where the driver has none.
std::string StatisticsWords(const Device& device, VkPipeline pipeline);

}  // namespace jax_aat
