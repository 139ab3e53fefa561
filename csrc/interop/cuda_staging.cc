#include "interop/cuda_staging.h"

namespace jax_aat {

CudaStaging::CudaStaging(const Device& device, std::uint64_t bytes)
    : memory_(DeviceMemory::Exportable(device, bytes)) {
  const cuda::Driver& driver = cuda::Driver::Get();
  FileDescriptor fd = memory_.ExportFd();
  const cuda::ExternalMemoryHandleDesc handle = {
      .handle = {.type = cuda::kOpaqueFd, .fd = fd.get()},
      .size = memory_.allocated_bytes(),
  };
  driver.Check(driver.ImportMemory(&imported_, &handle), "cuImportExternalMemory");
  fd.Release();
  const cuda::ExternalMemoryBufferDesc range = {.size = bytes};
  const cuda::Result mapped = driver.MapMemory(&pointer_, imported_, &range);
  if (mapped != 0) driver.DestroyMemory(imported_);
  driver.Check(mapped, "cuExternalMemoryGetMappedBuffer");
}

CudaStaging::~CudaStaging() {
  const cuda::Driver& driver = cuda::Driver::Get();
  driver.FreeMapped(pointer_);
  driver.DestroyMemory(imported_);
}

}  // namespace jax_aat
