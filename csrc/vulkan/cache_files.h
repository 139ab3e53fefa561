// Files that outlive the process and belong to one device, driver version and set of shaders.
#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "vulkan/physical_device.h"

namespace jax_aat {

// FNV-1a over 64 bits.
std::uint64_t Checksum(std::span<const char> data);

// What tells the files of a device, a driver version and a set of shaders from those of others.
std::string CacheKey(const PhysicalDevice& device);

// The file of that key in JAX_AAT_CACHE_DIR, else $XDG_CACHE_HOME/jax_aat, else ~/.cache/jax_aat.
// Empty, and nothing is kept, where none of the three is set.
std::filesystem::path CacheFile(const PhysicalDevice& device, std::string_view extension);

// Replaces a file in one step by these parts, one after the other; whether it could be written.
bool ReplaceFile(const std::filesystem::path& path,
                 std::initializer_list<std::span<const char>> parts);

}  // namespace jax_aat
