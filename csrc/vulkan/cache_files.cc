#include "vulkan/cache_files.h"

#include <unistd.h>

#include <cstddef>
#include <fstream>
#include <sstream>

#include "vulkan/shaders.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

class Hash {
 public:
  void Add(std::span<const std::byte> bytes) {
    for (const std::byte byte : bytes) {
      value_ = (value_ ^ std::to_integer<std::uint64_t>(byte)) * 0x100000001b3;
    }
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325;
};

std::uint64_t ShadersHash() {
  static const std::uint64_t value = [] {
    Hash hash;
    for (const ShaderModule& module : EmbeddedShaders()) {
      hash.Add(std::as_bytes(std::span(module.name)));
      hash.Add(std::as_bytes(module.words));
    }
    return hash.value();
  }();
  return value;
}

std::filesystem::path CacheDirectory() {
  if (const std::string own = Environment("JAX_AAT_CACHE_DIR"); !own.empty()) return own;
  if (const std::string base = Environment("XDG_CACHE_HOME"); !base.empty()) {
    return std::filesystem::path(base) / "jax_aat";
  }
  const std::string home = Environment("HOME");
  return home.empty() ? std::filesystem::path() : std::filesystem::path(home) / ".cache/jax_aat";
}

}  // namespace

std::uint64_t Checksum(std::span<const char> data) {
  Hash hash;
  hash.Add(std::as_bytes(data));
  return hash.value();
}

std::string CacheKey(const PhysicalDevice& device) {
  std::ostringstream key;
  key << device.uuid << '-' << std::hex << device.driver_version << '-' << ShadersHash();
  return key.str();
}

std::filesystem::path CacheFile(const PhysicalDevice& device, std::string_view extension) {
  const std::filesystem::path directory = CacheDirectory();
  if (directory.empty()) return {};
  return directory / Concat(CacheKey(device), extension);
}

bool ReplaceFile(const std::filesystem::path& path,
                 std::initializer_list<std::span<const char>> parts) {
  std::error_code failure;
  std::filesystem::create_directories(path.parent_path(), failure);
  const std::filesystem::path fresh = Concat(path.string(), ".", getpid());
  std::ofstream file(fresh, std::ios::binary);
  for (const std::span<const char> part : parts) {
    file.write(part.data(), static_cast<std::streamsize>(part.size()));
  }
  file.close();
  if (file) std::filesystem::rename(fresh, path, failure);
  if (file && !failure) return true;
  std::filesystem::remove(fresh, failure);
  return false;
}

}  // namespace jax_aat
