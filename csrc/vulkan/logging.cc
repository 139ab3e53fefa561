#include "vulkan/logging.h"

#include <array>
#include <cstdio>
#include <string>

#include "vulkan/text.h"

namespace jax_aat {
namespace {

constexpr std::array<const char*, 4> kNames = {"error", "warning", "info", "debug"};

LogLevel Threshold() {
  static const LogLevel threshold = [] {
    const std::string wanted = Environment("JAX_AAT_LOG");
    for (std::size_t i = 0; i < kNames.size(); ++i) {
      if (wanted == kNames[i]) return static_cast<LogLevel>(i);
    }
    if (!wanted.empty()) {
      std::fprintf(stderr,
                   "jax_aat warning: JAX_AAT_LOG=%s is none of error, warning, info, debug\n",
                   wanted.c_str());
    }
    return LogLevel::kWarning;
  }();
  return threshold;
}

}  // namespace

bool LogEnabled(LogLevel level) { return level <= Threshold(); }

void Log(LogLevel level, std::string_view message) {
  if (!LogEnabled(level)) return;
  std::fprintf(stderr, "jax_aat %s: %.*s\n", kNames[static_cast<std::size_t>(level)],
               static_cast<int>(message.size()), message.data());
}

}  // namespace jax_aat
