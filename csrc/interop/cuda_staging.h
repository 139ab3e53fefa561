// Where XLA's memory cannot be imported: a buffer that Vulkan makes and CUDA maps, into which
// operands are copied on the device.
#pragma once

#include <cstdint>

#include "interop/cuda_driver.h"
#include "vulkan/memory.h"

namespace jax_aat {

class CudaStaging {
 public:
  CudaStaging(MemoryManager& manager, std::uint64_t bytes);
  ~CudaStaging();
  CudaStaging(const CudaStaging&) = delete;
  CudaStaging& operator=(const CudaStaging&) = delete;

  std::uint64_t bytes() const { return shared_.memory().bytes(); }
  VkDeviceAddress address() const { return shared_.memory().address(); }
  cuda::DevicePointer pointer() const { return pointer_; }

 private:
  MemoryManager::SharedMemory shared_;
  cuda::ExternalMemory imported_ = nullptr;
  cuda::DevicePointer pointer_ = 0;
};

}  // namespace jax_aat
