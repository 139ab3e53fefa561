// Measures a stretch of a CUDA stream by two events.
#pragma once

#include "interop/cuda_driver.h"
#include "metrics/stream_time.h"

namespace jax_aat {

class CudaStopwatch final : public StreamTime {
 public:
  // Starts at what the stream is given next. The stream's context is current.
  explicit CudaStopwatch(cuda::Stream stream);
  ~CudaStopwatch() override;
  CudaStopwatch(const CudaStopwatch&) = delete;
  CudaStopwatch& operator=(const CudaStopwatch&) = delete;

  // Ends behind what the stream was given last.
  void Stop();

  bool Ready() const override;
  double Seconds() const override;

 private:
  const cuda::Stream stream_;
  cuda::Event start_ = nullptr, end_ = nullptr;
};

}  // namespace jax_aat
