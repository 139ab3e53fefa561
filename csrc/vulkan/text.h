// Small helpers for words and settings.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

namespace jax_aat {

template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The value of an environment variable, empty where it is unset.
inline std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace jax_aat
