// Asks the device how it spreads a 16x16 cooperative matrix over the lanes of a subgroup, which
// Vulkan leaves open and the *_coopmat kernels rely on.
#pragma once

#include <string>

#include "vulkan/commands.h"
#include "vulkan/memory.h"
#include "vulkan/pipelines.h"

namespace jax_aat {

// Whether the layout is the one of shaders/common/coopmat_types.glsl or, with `relays`, becomes it
// on the way through shared memory (common/coopmat_layout.glsl). `shader` is a coopmat_layout_probe
// module. Waits for the device.
bool CoopmatLayoutMatches(const Device& device, MemoryManager& memory, Pipelines& pipelines,
                          Queue& queue, const std::string& shader, bool relays);

}  // namespace jax_aat
