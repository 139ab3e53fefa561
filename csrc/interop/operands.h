// The buffers of an attention call as XLA hands them over.
#pragma once

#include <array>
#include <cstdint>

#include "common/params.h"

namespace jax_aat {

struct OperandBuffer {
  void* data = nullptr;  // absent operands have none
  std::uint64_t bytes = 0;
  bool result = false;
};

using OperandBuffers = std::array<OperandBuffer, OPERAND_COUNT>;

}  // namespace jax_aat
