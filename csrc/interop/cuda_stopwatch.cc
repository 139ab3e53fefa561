#include "interop/cuda_stopwatch.h"

#include "vulkan/logging.h"
#include "vulkan/status.h"

namespace jax_aat {
namespace {

constexpr unsigned kPlainEvent = 0;

}  // namespace

CudaStopwatch::CudaStopwatch(cuda::Stream stream) : stream_(stream) {
  const cuda::Driver& driver = cuda::Driver::Get();
  driver.Check(driver.CreateEvent(&start_, kPlainEvent), "cuEventCreate");
  cuda::Result result = driver.CreateEvent(&end_, kPlainEvent);
  if (result == 0) result = driver.RecordEvent(start_, stream_);
  if (result == 0) return;
  if (end_ != nullptr) driver.DestroyEvent(end_);
  driver.DestroyEvent(start_);
  driver.Check(result, "starting a stopwatch");
}

CudaStopwatch::~CudaStopwatch() {
  try {
    const cuda::CurrentContext current(stream_);
    cuda::Driver::Get().DestroyEvent(start_);
    cuda::Driver::Get().DestroyEvent(end_);
  } catch (const Error& error) {
    Log(LogLevel::kError, error.what());
  }
}

void CudaStopwatch::Stop() {
  const cuda::Driver& driver = cuda::Driver::Get();
  driver.Check(driver.RecordEvent(end_, stream_), "cuEventRecord");
}

bool CudaStopwatch::Ready() const {
  const cuda::CurrentContext current(stream_);
  return cuda::Driver::Get().QueryEvent(end_) == 0;
}

double CudaStopwatch::Seconds() const {
  const cuda::CurrentContext current(stream_);
  const cuda::Driver& driver = cuda::Driver::Get();
  driver.Check(driver.SynchronizeEvent(end_), "cuEventSynchronize");
  float milliseconds = 0;
  driver.Check(driver.ElapsedTime(&milliseconds, start_, end_), "cuEventElapsedTime");
  return 1e-3 * static_cast<double>(milliseconds);
}

}  // namespace jax_aat
