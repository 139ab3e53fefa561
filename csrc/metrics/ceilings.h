// What a device can do at most, measured.
#pragma once

#include "vulkan/context.h"

namespace jax_aat {

// Highest of several short runs; 0 where the device has no such units.
struct Ceilings {
  double bandwidth = 0;         // bytes a second, read and written by a copy
  double products = 0;          // FLOP/s of float32 multiplications and additions
  double float16_matrices = 0;  // FLOP/s of cooperative matrices
  double bfloat16_matrices = 0;
};

// Takes less than a second. Throws Error where the device has no timestamps.
Ceilings MeasureCeilings(Context& context);

}  // namespace jax_aat
