#include "interop/cuda_staging.h"

namespace jax_aat {

CudaStaging::CudaStaging(MemoryManager& manager, std::uint64_t bytes)
    : shared_(manager.ExportToCuda(bytes)) {
  const cuda::Driver& driver = cuda::Driver::Get();
  FileDescriptor fd = shared_.memory().ExportFd();
  const cuda::ExternalMemoryHandleDesc handle = {
      .handle = {.type = cuda::kOpaqueFd, .fd = fd.get()},
      .size = shared_.memory().allocated_bytes(),
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
