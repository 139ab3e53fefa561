// Compute pipelines by shader and specialisation constants, each compiled once when first asked
// for.
#pragma once

#include <cstdint>
#include <future>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "attention/dispatch_plan.h"
#include "vulkan/device.h"
#include "vulkan/pipeline_cache.h"
#include "vulkan/pipeline_statistics.h"

namespace jax_aat {

// As in shaders/common/problem.glsl.
struct PushConstants {
  VkDeviceAddress parameters;
  std::uint32_t first_head;
  std::uint32_t heads;
};

class Pipelines {
 public:
  explicit Pipelines(const Device& device);

  VkPipelineLayout layout() const { return layout_.get(); }

  // The pipeline of a dispatch. Compiles without holding a lock; threads that ask for a pipeline
  // in the making wait for it. Throws Error where the device's limits do not allow it.
  VkPipeline Get(const Dispatch& dispatch);

  struct Statistics {
    std::string shader;
    std::vector<std::uint32_t> specialization;
    std::vector<PipelineStatistic> statistics;
  };
  // Of all pipelines so far, which are compiled once more for it; empty where the driver has none.
  std::vector<Statistics> CollectStatistics();

 private:
  using Key = std::tuple<std::string, std::vector<std::uint32_t>, std::uint32_t>;

  void CheckLimits(const Dispatch& dispatch) const;
  VkShaderModule Module(const std::string& shader);
  // With statistics: to be asked, not to run; no cache is used, which may lack them.
  PipelineHandle Compile(const Dispatch& dispatch, bool with_statistics);

  const Device& device_;
  PipelineCache cache_;
  PipelineLayoutHandle layout_;
  std::mutex mutex_;
  std::map<std::string, ShaderModuleHandle> modules_;
  std::map<Key, std::shared_future<PipelineHandle>> pipelines_;
};

}  // namespace jax_aat
