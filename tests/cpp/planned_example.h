// A forward call that makes its plan, and a large device with cooperative matrices, for tests that
// look at one plan.
#pragma once

#include <string_view>

#include "attention/example_plan.h"

namespace jax_aat {

inline ExampleCall PlannedCall(std::string_view dtype) {
  return {.pass = "forward",
          .dtype = dtype,
          .query_heads = 8,
          .kv_heads = 2,
          .causal = true,
          .query_tile = 128,
          .super_tile = 1024,
          .level_count = 3,
          .judged_key_tiles = 8,
          .corrects = true};
}

inline DeviceTraits LargeDevice() {
  DeviceTraits traits;
  traits.storage_16bit = traits.coopmat_bfloat16 = traits.coopmat_float16 = true;
  traits.coopmat_layout_known = true;
  traits.min_subgroup_size = traits.max_subgroup_size = traits.subgroup_size = 32;
  traits.max_workgroup_invocations = 1024;
  traits.max_shared_memory = 49152;
  return traits;
}

}  // namespace jax_aat
