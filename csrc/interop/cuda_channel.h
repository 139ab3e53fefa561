// Orders Vulkan work against one CUDA stream, without a wait on the host.
//
// One timeline semaphore a stream, made by Vulkan and imported by CUDA. A turn is:
//   stream: signal v + 1 -> queue: wait v + 1, run, signal v + 2 -> stream: wait v + 2.
// A timeline is never shared between streams: their signals could then arrive out of order.
#pragma once

#include <cstdint>
#include <functional>

#include "interop/cuda_driver.h"
#include "vulkan/device_handle.h"

namespace jax_aat {

class CudaChannel {
 public:
  CudaChannel(const Device& device, cuda::Stream stream);
  ~CudaChannel();
  CudaChannel(const CudaChannel&) = delete;
  CudaChannel& operator=(const CudaChannel&) = delete;

  // `submit` submits work that waits for `ready` and signals `done`. When it throws, the stream
  // goes on as if the turn had not been. One turn at a time: the caller holds the stream's lock.
  void Turn(
      const std::function<void(const TimelinePoint& ready, const TimelinePoint& done)>& submit);

  // Until the work of all turns is done, and what the stream was given after them.
  void WaitOnHost() const;

 private:
  const Device& device_;
  const cuda::Stream stream_;
  SemaphoreHandle timeline_;
  cuda::ExternalSemaphore imported_ = nullptr;
  std::uint64_t value_ = 0;
};

}  // namespace jax_aat
