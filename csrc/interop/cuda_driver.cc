#include "interop/cuda_driver.h"

#include <dlfcn.h>

#include "vulkan/status.h"
#include "vulkan/text.h"

namespace jax_aat::cuda {

Driver::Driver() {
  // Already loaded by XLA's CUDA plugin wherever a CUDA stream exists; never closed.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(ErrorKind::kUnavailable,
                Concat("The CUDA driver library could not be opened (", dlerror(),
                       "). Install NVIDIA's driver, or run on JAX's CPU platform."));
  }
#define JAX_AAT_LOAD(name, symbol, ...)                                                      \
  name = reinterpret_cast<name##Function>(dlsym(library, symbol));                           \
  if (name == nullptr) {                                                                     \
    throw Error(ErrorKind::kUnavailable,                                                     \
                "The CUDA driver lacks " symbol ": install a driver for CUDA 12 or newer."); \
  }
  JAX_AAT_CUDA_FUNCTIONS(JAX_AAT_LOAD)
#undef JAX_AAT_LOAD
}

const Driver& Driver::Get() {
  static const Driver driver;
  return driver;
}

void Driver::Check(Result result, const char* what) const {
  constexpr Result kOutOfMemory = 2;
  if (result == 0) return;
  const char* words = nullptr;
  GetErrorString(result, &words);
  throw Error(result == kOutOfMemory ? ErrorKind::kOutOfMemory : ErrorKind::kInternal,
              Concat(what, " failed: ", words == nullptr ? "unknown CUDA error" : words, " (",
                     result, ")"));
}

CurrentContext::CurrentContext(Stream stream) {
  const Driver& driver = Driver::Get();
  Context context = nullptr;
  driver.Check(driver.StreamGetContext(stream, &context), "cuStreamGetCtx");
  driver.Check(driver.PushContext(context), "cuCtxPushCurrent");
}

CurrentContext::~CurrentContext() {
  Context context = nullptr;
  Driver::Get().PopContext(&context);
}

Uuid CurrentContext::DeviceUuid() const {
  const Driver& driver = Driver::Get();
  int device = 0;
  driver.Check(driver.GetDevice(&device), "cuCtxGetDevice");
  Uuid uuid = {};
  driver.Check(driver.GetUuid(&uuid, device), "cuDeviceGetUuid");
  return uuid;
}

}  // namespace jax_aat::cuda
