#include "interop/host.h"

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention/dispatch_plan.h"
#include "metrics/call_recorder.h"
#include "vulkan/runtime.h"

namespace jax_aat {
namespace {

// Pinning pages costs more than copying fewer bytes than this. A device that is the CPU pins
// nothing.
constexpr std::uint64_t kMinImportBytes = std::uint64_t{16} << 20;

// The operands of one call on their way to the device and back. A device that shares the host's
// memory computes in the imported pages or in mapped staging memory; any other one gets copies in
// its own memory, since kernels read keys and values many times.
class HostOperands {
 public:
  HostOperands(Context& context, const OperandBuffers& buffers)
      : context_(context), buffers_(buffers), unified_(context.device().physical().Unified()) {
    ImportPages();
    for (std::size_t i = 0; i < OPERAND_COUNT; ++i) {
      if (buffers_[i].data != nullptr) Place(i);
    }
  }

  OperandAddresses& addresses() { return addresses_; }
  const std::vector<BufferCopy>& copies_in() const { return copies_in_; }
  const std::vector<BufferCopy>& copies_out() const { return copies_out_; }
  std::uint64_t imported_bytes() const { return imported_bytes_; }
  std::uint64_t staged_bytes() const { return staged_bytes_; }

  // Once the device is done.
  void CopyResults() const {
    for (const Staged& staged : staged_) {
      const OperandBuffer& buffer = buffers_[staged.operand];
      if (buffer.result) std::memcpy(buffer.data, staged.block.mapped(), buffer.bytes);
    }
  }

 private:
  // Page-aligned host memory that holds one or more operands.
  struct Pages {
    std::uintptr_t begin;
    std::uintptr_t end;
  };
  struct ImportedPages {
    Pages pages;
    MemoryManager::SharedMemory import;
  };
  struct Staged {
    std::size_t operand;
    Block block;
  };
  // A place of an operand that the device can address.
  struct View {
    VkBuffer buffer;
    std::uint64_t offset;
    VkDeviceAddress address;
  };

  // Imports the pages around the large operands, pages that operands share only once.
  void ImportPages() {
    const PhysicalDevice& physical = context_.device().physical();
    const std::uint64_t page = physical.host_import_alignment;
    if (page == 0) return;
    const std::uint64_t least = physical.kind == DeviceKind::kCpu ? 0 : kMinImportBytes;
    std::vector<Pages> wanted;
    for (const OperandBuffer& buffer : buffers_) {
      if (buffer.data == nullptr || buffer.bytes < least) continue;
      const auto begin = reinterpret_cast<std::uintptr_t>(buffer.data);
      wanted.push_back({begin / page * page, (begin + buffer.bytes + page - 1) / page * page});
    }
    std::ranges::sort(wanted, {}, &Pages::begin);
    std::vector<Pages> merged;
    for (const Pages& pages : wanted) {
      if (!merged.empty() && pages.begin < merged.back().end) {
        merged.back().end = std::max(merged.back().end, pages.end);
      } else {
        merged.push_back(pages);
      }
    }
    for (const Pages& pages : merged) {
      auto import = context_.memory().ImportHost(reinterpret_cast<void*>(pages.begin),
                                                 pages.end - pages.begin);
      if (import) imported_.push_back({pages, std::move(*import)});
    }
  }

  void Place(std::size_t operand) {
    const OperandBuffer& buffer = buffers_[operand];
    const View host = HostView(operand);
    if (unified_) {
      addresses_[operand] = host.address;
      return;
    }
    Block block = context_.memory().Allocate(Purpose::kTransfer, buffer.bytes);
    addresses_[operand] = block.address();
    if (buffer.result) {
      copies_out_.push_back(
          {block.buffer(), host.buffer, {block.offset(), host.offset, buffer.bytes}});
    } else {
      copies_in_.push_back(
          {host.buffer, block.buffer(), {host.offset, block.offset(), buffer.bytes}});
    }
    on_device_.push_back(std::move(block));
  }

  // Where the device sees the host's copy of the operand: imported, or staged.
  View HostView(std::size_t operand) {
    const OperandBuffer& buffer = buffers_[operand];
    const auto begin = reinterpret_cast<std::uintptr_t>(buffer.data);
    for (const ImportedPages& imported : imported_) {
      if (begin < imported.pages.begin || begin + buffer.bytes > imported.pages.end) continue;
      imported_bytes_ += buffer.bytes;
      const DeviceMemory& memory = imported.import.memory();
      const std::uint64_t offset = begin - imported.pages.begin;
      return {memory.buffer(), offset, memory.address() + offset};
    }
    staged_bytes_ += buffer.bytes;
    staged_.push_back({operand, context_.memory().Allocate(Purpose::kStaging, buffer.bytes)});
    const Block& block = staged_.back().block;
    if (!buffer.result) std::memcpy(block.mapped(), buffer.data, buffer.bytes);
    return {block.buffer(), block.offset(), block.address()};
  }

  Context& context_;
  const OperandBuffers& buffers_;
  const bool unified_;
  std::vector<ImportedPages> imported_;
  std::vector<Staged> staged_;
  std::vector<Block> on_device_;
  OperandAddresses addresses_ = {};
  std::vector<BufferCopy> copies_in_;
  std::vector<BufferCopy> copies_out_;
  std::uint64_t imported_bytes_ = 0;
  std::uint64_t staged_bytes_ = 0;
};

}  // namespace

void RunOnHost(const AttentionProblem& problem, const OperandBuffers& buffers) {
  Runtime& runtime = Runtime::Get();
  const std::shared_ptr<Context> context = runtime.Acquire(runtime.default_device());
  CallRecorder recorder("cpu", context, problem, buffers);
  PreparedPlan prepared = context->Prepare(recorder.problem());
  HostOperands operands(*context, buffers);
  recorder.Planned(prepared, operands.addresses());
  const Submission submission = context->Run(std::move(prepared), operands.addresses(),
                                             {
                                                 .copies_in = operands.copies_in(),
                                                 .copies_out = operands.copies_out(),
                                                 .host_reads = true,
                                                 .timestamps = recorder.timestamps(),
                                             });
  recorder.Submitted(submission);
  context->device().Wait(submission.done);
  operands.CopyResults();
  recorder.Finish(operands.imported_bytes(), operands.staged_bytes());
}

}  // namespace jax_aat
