// A plain call and its plan, so that people can see which kernels a device would be given and how
// much memory these would take, and a tuning what it may choose from.
#pragma once

#include <cstdint>
#include <string_view>

#include "attention/dispatch_plan.h"

namespace jax_aat {

// A call of q, k and v that are dense in memory, with no bias and no mask; every gradient wanted.
struct ExampleCall {
  std::string_view pass;   // "forward", "tangent", "backward" or, of a call with one, "plan"
  std::string_view dtype;  // "float32", "float16" or "bfloat16"
  std::uint32_t batch = 1;
  std::uint32_t queries = 1024;
  std::uint32_t keys = 1024;
  std::uint32_t query_heads = 8;
  std::uint32_t kv_heads = 8;
  std::uint32_t head_dim = 64;
  bool causal = false;
  // Of a call with a plan; 0: there is none.
  std::uint32_t query_tile = 0;
  std::uint32_t super_tile = 0;
  std::uint32_t level_count = 0;  // a forward pass makes its plan, by a budget; 0: it is given one
  float candidate_share = 0;
  std::uint32_t judged_key_tiles = 0;
  std::uint32_t list_capacity = 0;  // entries of a work list; 0: the plan is kept
  bool corrects = false;
};

// Throws std::invalid_argument for a name of a pass or dtype that is none.
AttentionProblem ExampleProblem(const ExampleCall& call);

// Throws likewise, or as PlanAttention.
DispatchPlan ExamplePlan(const ExampleCall& call, const DeviceTraits& traits);

}  // namespace jax_aat
