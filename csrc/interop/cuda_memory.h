// XLA's GPU memory as Vulkan memory: the allocation that a CUDA pointer lies in is imported once
// and then addressed in place.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>

#include "interop/cuda_driver.h"
#include "vulkan/memory.h"

namespace jax_aat {

class CudaMemory {
 public:
  explicit CudaMemory(MemoryManager& manager);

  // Whether anything can be imported at all.
  bool imports() const { return arena_; }

  // The device address under which Vulkan sees `bytes` bytes at `pointer`; empty where the
  // allocation cannot be imported and must be copied.
  std::optional<VkDeviceAddress> Find(cuda::DevicePointer pointer, std::uint64_t bytes);

 private:
  struct Mapping {
    cuda::DevicePointer base = 0;
    std::uint64_t bytes = 0;
    std::uint64_t block = 0;  // unique in the process: tells a later allocation at the same address
  };
  static Mapping MappingOf(cuda::DevicePointer pointer);
  std::optional<MemoryManager::SharedMemory> Import(const Mapping& mapping);

  MemoryManager& manager_;
  // An import keeps the allocation alive: memory that XLA gives back buffer by buffer is copied.
  bool arena_;
  std::mutex mutex_;
  // By Mapping::block.
  std::map<std::uint64_t, std::optional<MemoryManager::SharedMemory>> blocks_;
};

}  // namespace jax_aat
