// Small helpers for words and settings.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <span>
#include <sstream>
#include <string>

namespace jax_aat {

template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Two lower-case digits a byte.
inline std::string Hexadecimal(std::span<const std::uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

// The value of an environment variable, empty where it is unset.
inline std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace jax_aat
