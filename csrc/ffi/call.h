// Turns the arguments, results and attributes of a custom call into an attention problem.
#pragma once

#include <cstdint>

#include "attention/problem.h"
#include "interop/operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_aat {

struct CallAttributes {
  std::uint64_t operands = 0;  // bit i: slot i is among the arguments
  std::uint64_t results = 0;   // bit i: slot i is among the results
  float scale = 1;
  float soft_cap = 0;
  std::int32_t causal = 0;
  std::int32_t window_left = -1;
  std::int32_t window_right = -1;
  std::uint32_t query_tile = 0;  // rows of a query tile of the plan; 0 without one
  std::uint32_t super_tile = 0;  // keys of a super-tile of it
  // Of the pass that makes a plan:
  std::uint32_t level_count = 0;
  float candidate_share = 0;
  float floor_share = 0;
  std::uint32_t judged_key_tiles = 0;
  std::uint32_t list_capacity = 0;  // entries of a work list, where no result has them
  std::uint32_t corrects = 0;       // whether the state corrects coarse rows that the call makes
};

struct AttentionCall {
  AttentionProblem problem;
  OperandBuffers buffers;
};

// Throws std::invalid_argument, in words, where counts, ranks, shapes or dtypes do not fit.
AttentionCall MakeCall(Pass pass, const CallAttributes& attributes, xla::ffi::RemainingArgs args,
                       xla::ffi::RemainingRets rets);

}  // namespace jax_aat
