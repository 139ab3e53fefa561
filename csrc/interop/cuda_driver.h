// The part of the CUDA driver API that the hand-over between CUDA streams and Vulkan needs.
//
// libcuda is opened at run time, so that neither building nor importing needs a CUDA toolkit or an
// NVIDIA driver. Names, values and layouts are those of cuda.h (CUDA 12 and 13).
#pragma once

#include <array>
#include <cstddef>

namespace jax_aat::cuda {

using Result = int;
using DevicePointer = unsigned long long;
using Stream = struct StreamOpaque*;
using Context = struct ContextOpaque*;
using Event = struct EventOpaque*;
using ExternalSemaphore = struct ExternalSemaphoreOpaque*;
using ExternalMemory = struct ExternalMemoryOpaque*;
using AllocationHandle = unsigned long long;
using Uuid = std::array<unsigned char, 16>;

enum PointerAttribute : int {
  kMappingSize = 18,
  kMappingBaseAddress = 19,
  kMemoryBlockId = 20,
};

constexpr int kPosixFileDescriptor = 1;  // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
constexpr int kOpaqueFd = 1;             // CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD
constexpr int kTimelineSemaphoreFd = 9;  // CU_EXTERNAL_SEMAPHORE_HANDLE_TYPE_TIMELINE_SEMAPHORE_FD

struct ExternalHandle {
  int type;
  union {
    int fd;
    struct {
      void* handle;
      const void* name;
    } win32;
  };
};

struct ExternalMemoryHandleDesc {
  ExternalHandle handle;
  unsigned long long size;
  unsigned flags;
  unsigned reserved[16];
};

struct ExternalMemoryBufferDesc {
  unsigned long long offset;
  unsigned long long size;
  unsigned flags;
  unsigned reserved[16];
};

struct ExternalSemaphoreHandleDesc {
  ExternalHandle handle;
  unsigned flags;
  unsigned reserved[16];
};

// Signal and wait parameters: alike up to the fence value, the only field a timeline uses.
struct ExternalSemaphoreParams {
  unsigned long long value;
  unsigned reserved_params[16];
  unsigned flags;
  unsigned reserved[16];
};

// name in this table, symbol in libcuda, type
#define JAX_AAT_CUDA_FUNCTIONS(X)                                                           \
  X(GetErrorString, "cuGetErrorString", Result (*)(Result, const char**))                   \
  X(StreamGetContext, "cuStreamGetCtx", Result (*)(Stream, Context*))                       \
  X(SynchronizeStream, "cuStreamSynchronize", Result (*)(Stream))                           \
  X(CreateEvent, "cuEventCreate", Result (*)(Event*, unsigned))                             \
  X(DestroyEvent, "cuEventDestroy_v2", Result (*)(Event))                                   \
  X(RecordEvent, "cuEventRecord", Result (*)(Event, Stream))                                \
  X(QueryEvent, "cuEventQuery", Result (*)(Event))                                          \
  X(SynchronizeEvent, "cuEventSynchronize", Result (*)(Event))                              \
  X(ElapsedTime, "cuEventElapsedTime", Result (*)(float*, Event, Event))                    \
  X(PushContext, "cuCtxPushCurrent_v2", Result (*)(Context))                                \
  X(PopContext, "cuCtxPopCurrent_v2", Result (*)(Context*))                                 \
  X(GetDevice, "cuCtxGetDevice", Result (*)(int*))                                          \
  X(GetUuid, "cuDeviceGetUuid_v2", Result (*)(Uuid*, int))                                  \
  X(GetPointerAttributes, "cuPointerGetAttributes",                                         \
    Result (*)(unsigned, PointerAttribute*, void**, DevicePointer))                         \
  X(RetainAllocation, "cuMemRetainAllocationHandle", Result (*)(AllocationHandle*, void*))  \
  X(ExportAllocation, "cuMemExportToShareableHandle",                                       \
    Result (*)(void*, AllocationHandle, int, unsigned long long))                           \
  X(ReleaseAllocation, "cuMemRelease", Result (*)(AllocationHandle))                        \
  X(ImportSemaphore, "cuImportExternalSemaphore",                                           \
    Result (*)(ExternalSemaphore*, const ExternalSemaphoreHandleDesc*))                     \
  X(DestroySemaphore, "cuDestroyExternalSemaphore", Result (*)(ExternalSemaphore))          \
  X(SignalSemaphores, "cuSignalExternalSemaphoresAsync",                                    \
    Result (*)(const ExternalSemaphore*, const ExternalSemaphoreParams*, unsigned, Stream)) \
  X(WaitSemaphores, "cuWaitExternalSemaphoresAsync",                                        \
    Result (*)(const ExternalSemaphore*, const ExternalSemaphoreParams*, unsigned, Stream)) \
  X(ImportMemory, "cuImportExternalMemory",                                                 \
    Result (*)(ExternalMemory*, const ExternalMemoryHandleDesc*))                           \
  X(MapMemory, "cuExternalMemoryGetMappedBuffer",                                           \
    Result (*)(DevicePointer*, ExternalMemory, const ExternalMemoryBufferDesc*))            \
  X(DestroyMemory, "cuDestroyExternalMemory", Result (*)(ExternalMemory))                   \
  X(FreeMapped, "cuMemFree_v2", Result (*)(DevicePointer))                                  \
  X(CopyAsync, "cuMemcpyDtoDAsync_v2",                                                      \
    Result (*)(DevicePointer, DevicePointer, std::size_t, Stream))

class Driver {
 public:
  // The process's driver, opened on first use. Throws when there is none.
  static const Driver& Get();

  // Throws, saying what was tried, unless `result` is success.
  void Check(Result result, const char* what) const;

#define JAX_AAT_DECLARE(name, symbol, ...) \
  using name##Function = __VA_ARGS__;      \
  name##Function name = nullptr;
  JAX_AAT_CUDA_FUNCTIONS(JAX_AAT_DECLARE)
#undef JAX_AAT_DECLARE

 private:
  Driver();
};

// Makes the context of a stream current while it lives.
class CurrentContext {
 public:
  explicit CurrentContext(Stream stream);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

  Uuid DeviceUuid() const;
};

}  // namespace jax_aat::cuda
