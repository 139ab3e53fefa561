#include "metrics/ceilings.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "metrics/clocks.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

constexpr int kRuns = 8;
constexpr double kSeconds = 4e-3;  // of a run, so that starting it does not count
// As in shaders/ceiling_*.comp.
constexpr std::uint32_t kQuadsOfThread = 4;
constexpr std::uint32_t kSteps = 1024;
constexpr std::uint32_t kChains = 8;
constexpr std::uint32_t kThreads = 128;
constexpr std::uint64_t kMostCopied = std::uint64_t{256} << 20;
constexpr std::uint32_t kFirstGroups = 64;

class Measurement {
 public:
  explicit Measurement(Context& context) : context_(context) {}

  // The most units of work a second that a kernel does of which a workgroup does so many.
  double Highest(const std::string& shader, std::uint32_t subgroup_size,
                 std::span<const std::uint32_t> push, double units_of_group,
                 std::uint32_t most_groups) {
    const VkPipeline pipeline = context_.pipelines().Get(
        {.shader = shader, .specialization = {kThreads}, .required_subgroup_size = subgroup_size});
    std::uint32_t groups = std::min(kFirstGroups, most_groups);
    // The first run finds caches and clocks cold; more work until a run is long enough.
    while (Seconds(pipeline, push, groups) < kSeconds && groups < most_groups) {
      groups = std::min(2 * groups, most_groups);
    }
    double least = Seconds(pipeline, push, groups);
    for (int run = 1; run < kRuns; ++run) {
      least = std::min(least, Seconds(pipeline, push, groups));
    }
    return units_of_group * groups / least;
  }

 private:
  double Seconds(VkPipeline pipeline, std::span<const std::uint32_t> push, std::uint32_t groups) {
    const Device& device = context_.device();
    const DeviceTable& vk = device.vk();
    std::unique_ptr<QuerySet> set = context_.queries().Take(2);
    const auto stamp = [&](VkCommandBuffer commands, std::uint32_t query) {
      vk.CmdWriteTimestamp2(commands, VK_PIPELINE_STAGE_2_COMPUTE_SHADER_BIT, set->pool.get(),
                            query);
    };
    device.Wait(context_.Submit([&](VkCommandBuffer commands) {
      vk.CmdPushConstants(commands, context_.pipelines().layout(), VK_SHADER_STAGE_COMPUTE_BIT, 0,
                          static_cast<std::uint32_t>(push.size_bytes()), push.data());
      vk.CmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
      stamp(commands, 0);
      vk.CmdDispatch(commands, groups, 1, 1);
      stamp(commands, 1);
      vk.CmdCopyQueryPoolResults(commands, set->pool.get(), 0, 2, set->results.buffer(),
                                 set->results.offset(), sizeof(std::uint64_t),
                                 VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT);
      RecordBarrier(device, commands, VK_PIPELINE_STAGE_2_COPY_BIT, VK_ACCESS_2_TRANSFER_WRITE_BIT,
                    VK_PIPELINE_STAGE_2_HOST_BIT, VK_ACCESS_2_HOST_READ_BIT);
    }));
    std::array<std::uint64_t, 2> ticks;
    std::memcpy(ticks.data(), set->results.mapped(), sizeof(ticks));
    context_.queries().GiveBack(std::move(set));
    return NanosecondsBetween(device.physical(), ticks[0], ticks[1]) * 1e-9;
  }

  Context& context_;
};

std::array<std::uint32_t, 2> Words(VkDeviceAddress address) {
  return {static_cast<std::uint32_t>(address), static_cast<std::uint32_t>(address >> 32)};
}

}  // namespace

Ceilings MeasureCeilings(Context& context) {
  const PhysicalDevice& physical = context.device().physical();
  if (physical.timestamp_bits == 0) {
    throw Error(ErrorKind::kUnavailable,
                Concat("The device ", physical.name, " has no timestamps to measure with."));
  }
  Measurement measurement(context);
  Ceilings ceilings;
  const std::uint32_t most_groups = context.traits().max_workgroup_count;
  constexpr std::uint64_t kGroupBytes = std::uint64_t{16} * kQuadsOfThread * kThreads;
  // Far more than a cache holds, if there is so much.
  const std::uint64_t copied = std::min(kMostCopied, context.memory().limit() / 8);
  const auto groups = static_cast<std::uint32_t>(
      std::min<std::uint64_t>(most_groups, std::max<std::uint64_t>(copied / kGroupBytes, 1)));
  {
    const Block source = context.memory().Allocate(Purpose::kState, groups * kGroupBytes);
    const Block target = context.memory().Allocate(Purpose::kState, groups * kGroupBytes);
    const auto from = Words(source.address()), to = Words(target.address());
    ceilings.bandwidth =
        measurement.Highest("ceiling_bandwidth.f32", 0, std::array{from[0], from[1], to[0], to[1]},
                            2.0 * kGroupBytes, groups);
  }
  const Block sums = context.memory().Allocate(Purpose::kState, 16 * kThreads);
  const auto target = Words(sums.address());
  constexpr double kFlops = 2.0 * kSteps * kChains;
  ceilings.products =
      measurement.Highest("ceiling_products.f32", 0, target, kFlops * 4 * kThreads, most_groups);
  constexpr std::uint32_t kLanes = 32;
  constexpr double kMatrixFlops = kFlops * 16 * 16 * 16 * (kThreads / kLanes);
  if (context.traits().coopmat_float16) {
    ceilings.float16_matrices = measurement.Highest("ceiling_products_coopmat.f16", kLanes, target,
                                                    kMatrixFlops, most_groups);
  }
  if (context.traits().coopmat_bfloat16) {
    ceilings.bfloat16_matrices = measurement.Highest("ceiling_products_coopmat.bf16", kLanes,
                                                     target, kMatrixFlops, most_groups);
  }
  return ceilings;
}

}  // namespace jax_aat
