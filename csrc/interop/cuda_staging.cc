#include "interop/cuda_staging.h"

namespace jax_aat {

CudaStaging::CudaStaging(const Device& device, std::uint64_t bytes)
    : memory_(DeviceMemory::Exportable(device, bytes)) {
  const cuda::Driver& driver = cuda::Driver::Get();
  const cuda::ExternalMemoryHandleDesc handle = {
      // The import takes the file descriptor over.
      .handle = {.type = cuda::kOpaqueFd, .fd = memory_.ExportFd()},
      .size = memory_.allocated_bytes(),
  };
  driver.Check(driver.ImportMemory(&imported_, &handle), "cuImportExternalMemory");
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
