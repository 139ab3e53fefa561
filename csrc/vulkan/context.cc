#include "vulkan/context.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "metrics/timestamps.h"
#include "vulkan/coopmat_probe.h"
#include "vulkan/logging.h"
#include "vulkan/text.h"
#include "vulkan/tuning_file.h"

namespace jax_aat {
namespace {

constexpr VkPipelineStageFlags2 kCompute = VK_PIPELINE_STAGE_2_COMPUTE_SHADER_BIT;
constexpr VkPipelineStageFlags2 kCopy = VK_PIPELINE_STAGE_2_COPY_BIT;
constexpr VkAccessFlags2 kShaderRead = VK_ACCESS_2_SHADER_READ_BIT;
constexpr VkAccessFlags2 kShaderWrite = VK_ACCESS_2_SHADER_WRITE_BIT;
constexpr VkAccessFlags2 kCopyRead = VK_ACCESS_2_TRANSFER_READ_BIT;
constexpr VkAccessFlags2 kCopyWrite = VK_ACCESS_2_TRANSFER_WRITE_BIT;

AttentionParams WithAddresses(const DispatchPlan& plan, OperandAddresses addresses,
                              VkDeviceAddress scratch) {
  AttentionParams params = plan.params;
  for (const DispatchPlan::Scratch& part : plan.scratch) {
    addresses[part.operand] = (part.in_out ? addresses[OPERAND_OUT] : scratch) + part.offset;
  }
  for (std::size_t i = 0; i < addresses.size(); ++i) {
    params.operand[i].address_low = static_cast<std::uint32_t>(addresses[i]);
    params.operand[i].address_high = static_cast<std::uint32_t>(addresses[i] >> 32);
  }
  return params;
}

}  // namespace

Context::Context(const Instance& instance, const PhysicalDevice& physical)
    : device_(instance, physical),
      traits_(physical.traits),
      memory_(device_),
      queries_(device_, memory_),
      pipelines_(device_) {
  for (std::uint32_t i = 0; i < device_.queue_count(); ++i) {
    queues_.push_back(std::make_unique<Queue>(device_, i));
  }
  ProbeCoopmatLayout(/*hide_layout=*/false);
  // Several calls may be on their way at once, and the rest of a call's scratch lies under the same
  // buffer.
  traits_.max_score_gradient_bytes = std::min(
      {traits_.max_score_gradient_bytes, memory_.limit() / 4, physical.max_allocation_bytes / 2});
  SetTuning(ReadTuning(physical, traits_));
}

DeviceTraits Context::traits() const {
  const std::lock_guard lock(traits_mutex_);
  return traits_;
}

void Context::SetTuning(Tuning tuning) {
  auto shared = std::make_shared<const Tuning>(std::move(tuning));
  const std::lock_guard lock(traits_mutex_);
  traits_.tuning = std::move(shared);
}

void Context::SaveTuning() const { WriteTuning(device_.physical(), *traits().tuning); }

void Context::ProbeCoopmatLayout(bool hide_layout) {
  const DeviceTraits found = traits();
  if (!found.coopmat_float16 && !found.coopmat_bfloat16) return;
  const auto matches = [&](bool relays) {
    const auto probe = [&](const char* shader) {
      return CoopmatLayoutMatches(device_, memory_, pipelines_, *queues_.front(), shader, relays);
    };
    return (!found.coopmat_float16 || probe("coopmat_layout_probe.f16")) &&
           (!found.coopmat_bfloat16 || probe("coopmat_layout_probe.bf16"));
  };
  bool known = false, relays = false;
  try {
    known = !hide_layout && matches(/*relays=*/false);
    relays = !known && matches(/*relays=*/true);
  } catch (const Error& error) {
    device_.RequireAlive();
    Log(LogLevel::kWarning, Concat("Cooperative matrices are not used: ", error.what()));
  }
  const std::lock_guard lock(traits_mutex_);
  traits_.coopmat_layout_known = known;
  traits_.coopmat_relays = relays;
}

Context::~Context() {
  // A lost device answers with an error, which changes nothing any more.
  device_.vk().DeviceWaitIdle(device_.handle());
}

PreparedPlan Context::Prepare(const AttentionProblem& problem,
                              const std::function<VkDeviceAddress(std::uint64_t)>& lent) {
  DeviceTraits traits = this->traits();
  while (true) {
    PreparedPlan prepared = {.plan = PlanAttention(problem, traits)};
    const std::uint64_t bytes = prepared.plan.scratch_bytes;
    if (bytes == 0) return prepared;
    if (lent) prepared.scratch = lent(bytes);
    if (prepared.scratch != 0) return prepared;
    try {
      prepared.block = memory_.Allocate(Purpose::kState, bytes);
      prepared.scratch = prepared.block->address();
      return prepared;
    } catch (const Error& error) {
      const bool can_do_with_less = prepared.plan.params.score_gradient_heads > 0;
      if (error.kind() != ErrorKind::kOutOfMemory || !can_do_with_less) throw;
      traits.max_score_gradient_bytes = 0;
    }
  }
}

Submission Context::Run(PreparedPlan prepared, const OperandAddresses& addresses,
                        const Surroundings& around) {
  device_.RequireAlive();
  const DispatchPlan& plan = prepared.plan;
  std::vector<VkPipeline> pipelines;
  for (const Dispatch& dispatch : plan.dispatches) {
    if (*std::ranges::max_element(dispatch.groups) > traits_.max_workgroup_count) {
      throw Error(ErrorKind::kInternal, Concat("The kernel ", dispatch.shader,
                                               " needs more workgroups than the device allows."));
    }
    pipelines.push_back(pipelines_.Get(dispatch));
  }
  Block parameters = memory_.Allocate(Purpose::kParameters, sizeof(AttentionParams));
  const AttentionParams params = WithAddresses(plan, addresses, prepared.scratch);
  std::memcpy(parameters.mapped(), &params, sizeof(params));

  Queue& queue = LeastLoadedQueue();
  std::unique_ptr<CommandSlot> slot = queue.Begin();
  Record(slot->buffer(), plan, pipelines, parameters.address(), around);
  const auto now = std::chrono::steady_clock::now();
  const TimelinePoint done = queue.Submit(std::move(slot), around.waits, around.signals);
  std::move(parameters).ReleaseAt(done);
  if (prepared.block) std::move(*prepared.block).ReleaseAt(done);
  return {done, queue.index(), now};
}

TimelinePoint Context::Submit(const std::function<void(VkCommandBuffer)>& record) {
  Queue& queue = LeastLoadedQueue();
  std::unique_ptr<CommandSlot> slot = queue.Begin();
  record(slot->buffer());
  return queue.Submit(std::move(slot), {}, {});
}

Queue& Context::LeastLoadedQueue() {
  if (queues_.size() == 1) return *queues_.front();
  const std::size_t first = next_queue_++ % queues_.size();
  Queue* best = nullptr;
  std::uint64_t least = UINT64_MAX;
  for (std::size_t i = 0; i < queues_.size() && least > 0; ++i) {
    Queue& queue = *queues_[(first + i) % queues_.size()];
    const std::uint64_t load = queue.Load();
    if (load < least) {
      best = &queue;
      least = load;
    }
  }
  return *best;
}

void Context::Record(VkCommandBuffer commands, const DispatchPlan& plan,
                     std::span<const VkPipeline> pipelines, VkDeviceAddress parameters,
                     const Surroundings& around) const {
  const DeviceTable& vk = device_.vk();
  const auto copy = [&](std::span<const BufferCopy> copies) {
    for (const BufferCopy& each : copies) {
      vk.CmdCopyBuffer(commands, each.source, each.target, 1, &each.range);
    }
  };
  copy(around.copies_in);
  if (!around.copies_in.empty()) {
    RecordBarrier(device_, commands, kCopy, kCopyWrite, kCompute, kShaderRead | kShaderWrite);
  }
  for (std::size_t i = 0; i < plan.dispatches.size(); ++i) {
    const Dispatch& dispatch = plan.dispatches[i];
    const bool waits = around.timestamps != nullptr && around.timestamps->by_kernel() && i > 0;
    if (dispatch.barrier_before || waits) {
      RecordBarrier(device_, commands, kCompute, kShaderWrite, kCompute,
                    kShaderRead | kShaderWrite);
    }
    const PushConstants push = {parameters, dispatch.first_head, dispatch.heads};
    vk.CmdPushConstants(commands, pipelines_.layout(), VK_SHADER_STAGE_COMPUTE_BIT, 0, sizeof(push),
                        &push);
    vk.CmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipelines[i]);
    if (around.timestamps != nullptr) around.timestamps->RecordStart(commands, i);
    vk.CmdDispatch(commands, dispatch.groups[0], dispatch.groups[1], dispatch.groups[2]);
    if (around.timestamps != nullptr) around.timestamps->RecordEnd(commands, i);
  }
  if (around.timestamps != nullptr) around.timestamps->RecordResults(commands);
  if (!around.copies_out.empty()) {
    RecordBarrier(device_, commands, kCompute, kShaderWrite, kCopy, kCopyRead);
    copy(around.copies_out);
  }
  if (around.host_reads) {
    RecordBarrier(device_, commands, kCompute | kCopy, kShaderWrite | kCopyWrite,
                  VK_PIPELINE_STAGE_2_HOST_BIT, VK_ACCESS_2_HOST_READ_BIT);
  }
}

}  // namespace jax_aat
