#include "vulkan/pipelines.h"

#include <algorithm>
#include <bit>
#include <chrono>

#include "vulkan/logging.h"
#include "vulkan/shaders.h"
#include "vulkan/text.h"

namespace jax_aat {

Pipelines::Pipelines(const Device& device) : device_(device), cache_(device), layout_(device) {
  const VkPushConstantRange push = {
      .stageFlags = VK_SHADER_STAGE_COMPUTE_BIT,
      .size = sizeof(PushConstants),
  };
  const VkPipelineLayoutCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO,
      .pushConstantRangeCount = 1,
      .pPushConstantRanges = &push,
  };
  device.Check(device.vk().CreatePipelineLayout(device.handle(), &info, nullptr, layout_.out()),
               "vkCreatePipelineLayout");
}

VkPipeline Pipelines::Get(const Dispatch& dispatch) {
  const Key key(dispatch.shader, dispatch.specialization, dispatch.required_subgroup_size);
  std::promise<PipelineHandle> promise;
  std::shared_future<PipelineHandle> future;
  bool mine = false;
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = pipelines_.find(key); found != pipelines_.end()) {
      future = found->second;
    } else {
      future = pipelines_.emplace(key, promise.get_future().share()).first->second;
      mine = true;
    }
  }
  if (!mine) return future.get().get();
  try {
    promise.set_value(Compile(dispatch, /*with_statistics=*/false));
  } catch (...) {
    // Those who wait get the error, the next to ask tries again.
    promise.set_exception(std::current_exception());
    const std::lock_guard lock(mutex_);
    pipelines_.erase(key);
    throw;
  }
  cache_.Save();
  return future.get().get();
}

std::vector<Pipelines::Statistics> Pipelines::CollectStatistics() {
  if (!HasStatistics(device_)) return {};
  std::vector<Dispatch> dispatches;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, pipeline] : pipelines_) {
      const auto& [shader, specialization, subgroup_size] = key;
      dispatches.push_back({.shader = shader,
                            .specialization = specialization,
                            .required_subgroup_size = subgroup_size});
    }
  }
  std::vector<Statistics> collected;
  for (const Dispatch& dispatch : dispatches) {
    const PipelineHandle pipeline = Compile(dispatch, /*with_statistics=*/true);
    collected.push_back(
        {dispatch.shader, dispatch.specialization, StatisticsOf(device_, pipeline.get())});
  }
  return collected;
}

void Pipelines::CheckLimits(const Dispatch& dispatch) const {
  const PhysicalDevice& physical = device_.physical();
  const DeviceTraits& traits = physical.traits;
  const std::uint32_t invocations =
      dispatch.specialization.empty() ? 1 : dispatch.specialization.front();
  const std::uint32_t subgroup = dispatch.required_subgroup_size;
  const auto refuse = [&](const std::string& reason) {
    throw Error(ErrorKind::kInternal,
                Concat("The kernel ", dispatch.shader, " does not fit the device ", physical.name,
                       ": ", reason));
  };
  if (invocations == 0 || invocations > traits.max_workgroup_invocations) {
    refuse(Concat(invocations, " invocations a workgroup, at most ",
                  traits.max_workgroup_invocations, " are allowed"));
  }
  if (subgroup == 0) return;
  if (!std::has_single_bit(subgroup) || subgroup < traits.min_subgroup_size ||
      subgroup > traits.max_subgroup_size) {
    refuse(Concat("subgroups of ", subgroup, " wanted, possible are ", traits.min_subgroup_size,
                  " to ", traits.max_subgroup_size));
  }
  if (invocations > subgroup * physical.max_subgroups) {
    refuse(Concat(invocations, " invocations in subgroups of ", subgroup, ", at most ",
                  physical.max_subgroups, " subgroups are allowed"));
  }
}

VkShaderModule Pipelines::Module(const std::string& shader) {
  const std::lock_guard lock(mutex_);
  if (const auto found = modules_.find(shader); found != modules_.end()) return found->second.get();
  const auto modules = EmbeddedShaders();
  const auto embedded = std::ranges::find(modules, shader, &ShaderModule::name);
  if (embedded == modules.end()) {
    throw Error(ErrorKind::kInternal, Concat("There is no shader module called ", shader, "."));
  }
  const VkShaderModuleCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO,
      .codeSize = embedded->words.size_bytes(),
      .pCode = embedded->words.data(),
  };
  ShaderModuleHandle module(device_);
  device_.Check(device_.vk().CreateShaderModule(device_.handle(), &info, nullptr, module.out()),
                "vkCreateShaderModule");
  return modules_.emplace(shader, std::move(module)).first->second.get();
}

PipelineHandle Pipelines::Compile(const Dispatch& dispatch, bool with_statistics) {
  CheckLimits(dispatch);
  const auto start = std::chrono::steady_clock::now();
  std::vector<VkSpecializationMapEntry> entries;
  for (std::uint32_t i = 0; i < dispatch.specialization.size(); ++i) {
    entries.push_back({i, i * 4, 4});
  }
  const VkSpecializationInfo specialization = {
      .mapEntryCount = static_cast<std::uint32_t>(entries.size()),
      .pMapEntries = entries.data(),
      .dataSize = dispatch.specialization.size() * 4,
      .pData = dispatch.specialization.data(),
  };
  const VkPipelineShaderStageRequiredSubgroupSizeCreateInfo subgroup = {
      .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO,
      .requiredSubgroupSize = dispatch.required_subgroup_size,
  };
  const VkComputePipelineCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
      .flags = with_statistics
                   ? VkPipelineCreateFlags{VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR}
                   : 0,
      .stage =
          {
              .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
              .pNext = dispatch.required_subgroup_size == 0 ? nullptr : &subgroup,
              .stage = VK_SHADER_STAGE_COMPUTE_BIT,
              .module = Module(dispatch.shader),
              .pName = "main",
              .pSpecializationInfo = &specialization,
          },
      .layout = layout_.get(),
  };
  PipelineHandle pipeline(device_);
  const VkPipelineCache cache = with_statistics ? VK_NULL_HANDLE : cache_.handle();
  device_.Check(device_.vk().CreateComputePipelines(device_.handle(), cache, 1, &info, nullptr,
                                                    pipeline.out()),
                "vkCreateComputePipelines");
  if (LogEnabled(LogLevel::kDebug)) {
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    Log(LogLevel::kDebug, Concat("compiled ", dispatch.shader, " in ", took.count(), " ms"));
  }
  return pipeline;
}

}  // namespace jax_aat
