#include "vulkan/pipeline_statistics.h"

#include <cstdint>

namespace jax_aat {
namespace {

double ValueOf(const VkPipelineExecutableStatisticKHR& statistic) {
  switch (statistic.format) {
    case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_BOOL32_KHR:
      return statistic.value.b32 != 0 ? 1 : 0;
    case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_INT64_KHR:
      return static_cast<double>(statistic.value.i64);
    case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_UINT64_KHR:
      return static_cast<double>(statistic.value.u64);
    default:
      return statistic.value.f64;
  }
}

}  // namespace

bool HasStatistics(const Device& device) {
  return device.physical().HasExtension(VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME);
}

std::vector<PipelineStatistic> StatisticsOf(const Device& device, VkPipeline pipeline) {
  const DeviceTable& vk = device.vk();
  const VkPipelineInfoKHR info = {
      .sType = VK_STRUCTURE_TYPE_PIPELINE_INFO_KHR,
      .pipeline = pipeline,
  };
  std::uint32_t executables = 0;
  device.Check(vk.GetPipelineExecutablePropertiesKHR(device.handle(), &info, &executables, nullptr),
               "vkGetPipelineExecutablePropertiesKHR");
  std::vector<PipelineStatistic> found;
  for (std::uint32_t i = 0; i < executables; ++i) {
    const VkPipelineExecutableInfoKHR executable = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR,
        .pipeline = pipeline,
        .executableIndex = i,
    };
    std::uint32_t count = 0;
    const auto get = [&](VkPipelineExecutableStatisticKHR* statistics) {
      device.Check(
          vk.GetPipelineExecutableStatisticsKHR(device.handle(), &executable, &count, statistics),
          "vkGetPipelineExecutableStatisticsKHR");
    };
    get(nullptr);
    std::vector<VkPipelineExecutableStatisticKHR> statistics(
        count, {VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR});
    get(statistics.data());
    for (const auto& statistic : statistics) {
      found.push_back({statistic.name, ValueOf(statistic)});
    }
  }
  return found;
}

}  // namespace jax_aat
