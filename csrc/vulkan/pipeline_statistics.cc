#include "vulkan/pipeline_statistics.h"

#include <cstdint>
#include <vector>

#include "vulkan/logging.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

std::string ValueWords(const VkPipelineExecutableStatisticKHR& statistic) {
  switch (statistic.format) {
    case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_BOOL32_KHR:
      return statistic.value.b32 ? "yes" : "no";
    case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_INT64_KHR:
      return Concat(statistic.value.i64);
    case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_UINT64_KHR:
      return Concat(statistic.value.u64);
    default:
      return Concat(statistic.value.f64);
  }
}

}  // namespace

VkPipelineCreateFlags StatisticsFlags(const Device& device) {
  const bool wanted =
      LogEnabled(LogLevel::kDebug) &&
      device.physical().HasExtension(VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME);
  return wanted ? VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR : 0;
}

std::string StatisticsWords(const Device& device, VkPipeline pipeline) {
  if (StatisticsFlags(device) == 0) return "";
  const DeviceTable& vk = device.vk();
  const VkPipelineInfoKHR info = {
      .sType = VK_STRUCTURE_TYPE_PIPELINE_INFO_KHR,
      .pipeline = pipeline,
  };
  std::uint32_t executables = 0;
  device.Check(vk.GetPipelineExecutablePropertiesKHR(device.handle(), &info, &executables, nullptr),
               "vkGetPipelineExecutablePropertiesKHR");
  std::string words;
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
      words += Concat(", ", statistic.name, " ", ValueWords(statistic));
    }
  }
  return words;
}

}  // namespace jax_aat
