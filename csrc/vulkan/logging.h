// Messages to stderr; JAX_AAT_LOG names the least severe level that is written (default: warning).
#pragma once

#include <string_view>

namespace jax_aat {

enum class LogLevel { kError, kWarning, kInfo, kDebug };

bool LogEnabled(LogLevel level);
void Log(LogLevel level, std::string_view message);

}  // namespace jax_aat
