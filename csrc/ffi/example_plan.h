// The plan of a plain call, so that people can see which kernels a device would be given.
#pragma once

#include <cstdint>
#include <string_view>

#include "attention/dispatch_plan.h"

namespace jax_aat {

// For q, k, v [1024, 8, head_dim], dense in memory, no bias and no mask; every gradient wanted.
// Throws std::invalid_argument for a name of a pass or dtype that is none, or as PlanAttention.
DispatchPlan ExamplePlan(std::string_view pass, std::string_view dtype, std::uint32_t head_dim,
                         const DeviceTraits& traits);

}  // namespace jax_aat
