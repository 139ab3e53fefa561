// What the driver's compiler tells of a pipeline (registers, spills): a kernel that spills is slow
// without any other sign.
#pragma once

#include <string>
#include <vector>

#include "vulkan/device.h"

namespace jax_aat {

struct PipelineStatistic {
  std::string name;  // the driver's
  double value = 0;  // 0 and 1 for no and yes
};

// Whether the driver tells anything. A pipeline must be created to be asked, with
// VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR.
bool HasStatistics(const Device& device);

// All of the pipeline's executables.
std::vector<PipelineStatistic> StatisticsOf(const Device& device, VkPipeline pipeline);

}  // namespace jax_aat
