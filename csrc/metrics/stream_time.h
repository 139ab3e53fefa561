// How long a stream of another runtime, such as CUDA, is held up by a call that Vulkan computes.
#pragma once

namespace jax_aat {

class StreamTime {
 public:
  virtual ~StreamTime() = default;
  // Whether the stream has gone on.
  virtual bool Ready() const = 0;
  // Waits until it has. From where it reached the call to there.
  virtual double Seconds() const = 0;
};

}  // namespace jax_aat
