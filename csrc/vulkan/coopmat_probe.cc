#include "vulkan/coopmat_probe.h"

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

namespace jax_aat {
namespace {

constexpr std::uint32_t kLanes = 32;
constexpr std::uint32_t kLaneElements = 8;

// What coopmat_layout_probe.comp writes: row * 16 + column of each element, for an accumulator and
// for a left factor.
using Layouts = std::array<std::uint32_t, 2 * kLanes * kLaneElements>;

Layouts AssumedLayouts() {
  Layouts layouts;
  for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
    for (std::uint32_t i = 0; i < kLaneElements; ++i) {
      const std::uint32_t row = lane / 4 + 8 * (i >> 2);
      const std::uint32_t column = 2 * (lane % 4) + (i & 1) + 8 * ((i >> 1) & 1);
      const std::uint32_t index = lane * kLaneElements + i;
      layouts[index] = layouts[kLanes * kLaneElements + index] = row * 16 + column;
    }
  }
  return layouts;
}

}  // namespace

bool CoopmatLayoutMatches(const Device& device, MemoryManager& memory, Pipelines& pipelines,
                          Queue& queue, const std::string& shader, bool relays) {
  const VkPipeline pipeline =
      pipelines.Get({.shader = shader,
                     .specialization = {kLanes, kLanes, relays ? FEATURE_RELAYS : 0},
                     .required_subgroup_size = kLanes});
  Layouts layouts;
  const Block block = memory.Allocate(Purpose::kMetrics, sizeof(layouts));
  // Elements that a lane lacks stay as no matrix has them.
  std::memset(block.mapped(), 0xff, sizeof(layouts));

  const DeviceTable& vk = device.vk();
  std::unique_ptr<CommandSlot> slot = queue.Begin();
  const VkDeviceAddress address = block.address();
  vk.CmdPushConstants(slot->buffer(), pipelines.layout(), VK_SHADER_STAGE_COMPUTE_BIT, 0,
                      sizeof(address), &address);
  vk.CmdBindPipeline(slot->buffer(), VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
  vk.CmdDispatch(slot->buffer(), 1, 1, 1);
  RecordBarrier(device, slot->buffer(), VK_PIPELINE_STAGE_2_COMPUTE_SHADER_BIT,
                VK_ACCESS_2_SHADER_WRITE_BIT, VK_PIPELINE_STAGE_2_HOST_BIT,
                VK_ACCESS_2_HOST_READ_BIT);
  device.Wait(queue.Submit(std::move(slot), {}, {}));
  std::memcpy(layouts.data(), block.mapped(), sizeof(layouts));
  return layouts == AssumedLayouts();
}

}  // namespace jax_aat
