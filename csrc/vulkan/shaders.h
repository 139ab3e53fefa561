// The SPIR-V modules that the build embeds.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace jax_aat {

struct ShaderModule {
  std::string_view name;  // source and dtype, for example "attend_forward.f16"
  std::span<const std::uint32_t> words;
};

std::span<const ShaderModule> EmbeddedShaders();

}  // namespace jax_aat
