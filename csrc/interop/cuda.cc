#include "interop/cuda.h"

#include <bit>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "attention/dispatch_plan.h"
#include "interop/cuda_channel.h"
#include "interop/cuda_memory.h"
#include "interop/cuda_staging.h"
#include "interop/cuda_stopwatch.h"
#include "metrics/call_recorder.h"
#include "vulkan/runtime.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

constexpr std::uint64_t kAlignment = 256;

// What one CUDA stream keeps between calls.
struct StreamState {
  StreamState(const Device& device, cuda::Stream stream) : channel(device, stream) {}

  std::mutex mutex;  // a call's copies and its turn of the channel belong together
  CudaChannel channel;
  std::unique_ptr<CudaStaging> staging;
};

// What one device keeps for CUDA; destroyed with its context.
class CudaBridge {
 public:
  explicit CudaBridge(Context& context) : memory(context.memory()), device_(context.device()) {
    for (const char* extension :
         {VK_KHR_EXTERNAL_MEMORY_FD_EXTENSION_NAME, VK_KHR_EXTERNAL_SEMAPHORE_FD_EXTENSION_NAME}) {
      if (!device_.physical().HasExtension(extension)) {
        throw Error(ErrorKind::kUnavailable,
                    Concat(device_.physical().name, " has no ", extension,
                           ", which JAX's CUDA platform needs: update the driver, or use "
                           "implementation='xla'."));
      }
    }
  }

  StreamState& StateOf(cuda::Stream stream) {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<StreamState>& state = streams_[stream];
    if (state == nullptr) state = std::make_unique<StreamState>(device_, stream);
    return *state;
  }

  CudaMemory memory;

 private:
  const Device& device_;
  std::mutex mutex_;
  std::map<cuda::Stream, std::unique_ptr<StreamState>> streams_;
};

// The index of the Vulkan device that is the CUDA device with this identity.
std::uint32_t DeviceIndex(const cuda::Uuid& uuid) {
  const std::string digits = Hexadecimal(uuid);
  for (const PhysicalDevice& device : Runtime::Get().instance().devices()) {
    if (device.uuid == digits) return device.index;
  }
  throw Error(ErrorKind::kUnavailable,
              Concat("No Vulkan device is the CUDA device ", digits,
                     ": make NVIDIA's Vulkan driver visible (VK_DRIVER_FILES), or use "
                     "implementation='xla'."));
}

// The operands of one call: where Vulkan finds them, and which had to be copied.
class CudaOperands {
 public:
  CudaOperands(MemoryManager& manager, CudaMemory& memory, StreamState& state,
               const OperandBuffers& buffers, cuda::Stream stream)
      : state_(state), buffers_(buffers), stream_(stream) {
    std::uint64_t staging_bytes = 0;
    for (std::uint32_t i = 0; i < OPERAND_COUNT; ++i) {
      if (buffers[i].data == nullptr) continue;
      if (const auto address = memory.Find(PointerOf(i), buffers[i].bytes)) {
        addresses_[i] = *address;
        imported_bytes_ += buffers[i].bytes;
      } else {
        copies_.push_back({i, staging_bytes});
        staging_bytes += (buffers[i].bytes + kAlignment - 1) / kAlignment * kAlignment;
        staged_bytes_ += buffers[i].bytes;
      }
    }
    if (copies_.empty()) return;
    if (state.staging == nullptr || state.staging->bytes() < staging_bytes) {
      // Rare: the work and the copies of earlier calls use the smaller buffer.
      state.channel.WaitOnHost();
      state.staging.reset();
      state.staging = std::make_unique<CudaStaging>(manager, std::bit_ceil(staging_bytes));
    }
    for (const Copy& copy : copies_) {
      addresses_[copy.operand] = state.staging->address() + copy.offset;
    }
  }

  OperandAddresses& addresses() { return addresses_; }
  std::uint64_t imported_bytes() const { return imported_bytes_; }
  std::uint64_t staged_bytes() const { return staged_bytes_; }

  void CopyIn() const { CopyWhere(false); }
  void CopyOut() const { CopyWhere(true); }

 private:
  struct Copy {
    std::uint32_t operand;
    std::uint64_t offset;  // in the staging buffer
  };

  cuda::DevicePointer PointerOf(std::uint32_t operand) const {
    return reinterpret_cast<cuda::DevicePointer>(buffers_[operand].data);
  }

  void CopyWhere(bool result) const {
    const cuda::Driver& driver = cuda::Driver::Get();
    for (const Copy& copy : copies_) {
      const OperandBuffer& buffer = buffers_[copy.operand];
      if (buffer.result != result) continue;
      const cuda::DevicePointer staged = state_.staging->pointer() + copy.offset;
      const cuda::DevicePointer own = PointerOf(copy.operand);
      driver.Check(
          driver.CopyAsync(result ? own : staged, result ? staged : own, buffer.bytes, stream_),
          "cuMemcpyDtoDAsync");
    }
  }

  StreamState& state_;
  const OperandBuffers& buffers_;
  const cuda::Stream stream_;
  OperandAddresses addresses_ = {};
  std::vector<Copy> copies_;
  std::uint64_t imported_bytes_ = 0;
  std::uint64_t staged_bytes_ = 0;
};

}  // namespace

void RunOnCuda(const AttentionProblem& problem, const OperandBuffers& buffers, cuda::Stream stream,
               const std::function<void*(std::uint64_t)>& allocate_scratch) {
  const cuda::CurrentContext current(stream);
  const std::shared_ptr<Context> context =
      Runtime::Get().Acquire(DeviceIndex(current.DeviceUuid()));
  CudaBridge& bridge = context->Companion<CudaBridge>();
  // Calls of a stream follow each other, so they can share scratch that XLA hands out in its order.
  CallRecorder recorder("cuda", context, problem, buffers);
  PreparedPlan prepared =
      context->Prepare(recorder.problem(), [&](std::uint64_t bytes) -> VkDeviceAddress {
        void* scratch = bridge.memory.imports() ? allocate_scratch(bytes) : nullptr;
        if (scratch == nullptr) return 0;
        return bridge.memory.Find(reinterpret_cast<cuda::DevicePointer>(scratch), bytes)
            .value_or(0);
      });
  StreamState& state = bridge.StateOf(stream);

  const std::lock_guard lock(state.mutex);
  CudaOperands operands(context->memory(), bridge.memory, state, buffers, stream);
  recorder.Planned(prepared, operands.addresses());
  std::shared_ptr<CudaStopwatch> stopwatch;
  if (recorder.times_stream()) stopwatch = std::make_shared<CudaStopwatch>(stream);
  operands.CopyIn();
  state.channel.Turn([&](const TimelinePoint& ready, const TimelinePoint& done) {
    recorder.Submitted(context->Run(std::move(prepared), operands.addresses(),
                                    {
                                        .waits = {&ready, 1},
                                        .host_reads = recorder.host_reads(),
                                        .signals = {&done, 1},
                                        .timestamps = recorder.timestamps(),
                                    }));
  });
  operands.CopyOut();
  if (stopwatch != nullptr) {
    stopwatch->Stop();
    recorder.StreamTimed(std::move(stopwatch));
  }
  recorder.Finish(operands.imported_bytes(), operands.staged_bytes());
}

}  // namespace jax_aat
