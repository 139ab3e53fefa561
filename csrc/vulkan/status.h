// Failures inside the runtime: one exception that carries words for the user.
#pragma once

#include <stdexcept>
#include <string>

#include "vulkan/extensions.h"

namespace jax_aat {

enum class ErrorKind {
  kInvalidArgument,  // the call cannot be served as it is
  kOutOfMemory,
  kUnavailable,  // no loader, driver or fitting device, or the device was lost
  kInternal,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& words) : std::runtime_error(words), kind_(kind) {}

  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// Throws an Error of the fitting kind unless the result is a success code.
void Check(VkResult result, const char* operation);

}  // namespace jax_aat
