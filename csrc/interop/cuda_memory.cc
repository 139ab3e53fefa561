#include "interop/cuda_memory.h"

#include <array>
#include <utility>

#include "vulkan/logging.h"
#include "vulkan/text.h"

namespace jax_aat {

CudaMemory::CudaMemory(MemoryManager& manager) : manager_(manager) {
  const std::string allocator = Environment("XLA_PYTHON_CLIENT_ALLOCATOR");
  arena_ = allocator != "platform" && allocator != "cuda_async";
}

CudaMemory::Mapping CudaMemory::MappingOf(cuda::DevicePointer pointer) {
  Mapping mapping;
  std::array attributes = {cuda::kMappingBaseAddress, cuda::kMappingSize, cuda::kMemoryBlockId};
  std::array<void*, 3> values = {&mapping.base, &mapping.bytes, &mapping.block};
  const cuda::Driver& driver = cuda::Driver::Get();
  driver.Check(
      driver.GetPointerAttributes(attributes.size(), attributes.data(), values.data(), pointer),
      "cuPointerGetAttributes");
  return mapping;
}

std::optional<MemoryManager::SharedMemory> CudaMemory::Import(const Mapping& mapping) {
  const cuda::Driver& driver = cuda::Driver::Get();
  cuda::AllocationHandle allocation = 0;
  // Memory that does not come from cuMemCreate has no handle: it is copied.
  if (driver.RetainAllocation(&allocation, reinterpret_cast<void*>(mapping.base)) != 0) {
    return std::nullopt;
  }
  FileDescriptor fd;
  const cuda::Result exported =
      driver.ExportAllocation(fd.out(), allocation, cuda::kPosixFileDescriptor, 0);
  driver.ReleaseAllocation(allocation);
  if (exported != 0) return std::nullopt;
  return manager_.ImportCuda(std::move(fd), mapping.bytes);
}

std::optional<VkDeviceAddress> CudaMemory::Find(cuda::DevicePointer pointer, std::uint64_t bytes) {
  if (!arena_) return std::nullopt;
  const Mapping mapping = MappingOf(pointer);
  // A buffer may span two mappings of a growing arena, which are two Vulkan buffers.
  if (mapping.base == 0 || pointer + bytes > mapping.base + mapping.bytes) return std::nullopt;
  const std::lock_guard lock(mutex_);
  auto found = blocks_.find(mapping.block);
  if (found == blocks_.end()) {
    found = blocks_.emplace(mapping.block, Import(mapping)).first;
    Log(LogLevel::kInfo, Concat(found->second.has_value() ? "imported " : "could not import ",
                                mapping.bytes, " bytes of CUDA memory"));
  }
  if (!found->second.has_value()) return std::nullopt;
  return found->second->memory().address() + (pointer - mapping.base);
}

}  // namespace jax_aat
