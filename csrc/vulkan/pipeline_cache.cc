#include "vulkan/pipeline_cache.h"

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "vulkan/logging.h"
#include "vulkan/shaders.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

// FNV-1a over 64 bits.
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

// Drivers check little of what they are given, so a file carries its own size and checksum.
struct FileHeader {
  std::uint64_t magic = 0x31656361635f6161;
  std::uint64_t bytes = 0;
  std::uint64_t checksum = 0;
};

std::uint64_t Checksum(std::span<const char> data) {
  Hash hash;
  hash.Add(std::as_bytes(data));
  return hash.value();
}

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

std::vector<char> ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  FileHeader header;
  std::error_code failure;
  const std::uint64_t size = std::filesystem::file_size(path, failure);
  if (failure || !file.read(reinterpret_cast<char*>(&header), sizeof(header))) return {};
  if (header.magic == FileHeader().magic && header.bytes == size - sizeof(header)) {
    std::vector<char> data(header.bytes);
    if (file.read(data.data(), static_cast<std::streamsize>(data.size())) &&
        Checksum(data) == header.checksum) {
      return data;
    }
  }
  Log(LogLevel::kWarning, Concat("the pipeline cache ", path.string(), " is damaged, ignored"));
  return {};
}

}  // namespace

std::filesystem::path PipelineCachePath(const PhysicalDevice& device) {
  const std::filesystem::path directory = CacheDirectory();
  if (directory.empty()) return {};
  std::ostringstream name;
  name << device.uuid << '-' << std::hex << device.driver_version << '-' << ShadersHash()
       << ".pipelines";
  return directory / name.str();
}

PipelineCache::PipelineCache(const Device& device)
    : device_(device), path_(PipelineCachePath(device.physical())), handle_(device) {
  const std::vector<char> data = ReadFile(path_);
  saved_bytes_ = data.size();
  const VkPipelineCacheCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO,
      .initialDataSize = data.size(),
      .pInitialData = data.data(),
  };
  device.Check(device.vk().CreatePipelineCache(device.handle(), &info, nullptr, handle_.out()),
               "vkCreatePipelineCache");
}

void PipelineCache::Save() {
  if (path_.empty()) return;
  const std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  const auto get = [&](void* data) {
    return device_.vk().GetPipelineCacheData(device_.handle(), handle_.get(), &bytes, data);
  };
  if (get(nullptr) != VK_SUCCESS || bytes == saved_bytes_) return;
  std::vector<char> data(bytes);
  // A pipeline made meanwhile by another thread can make the data longer: that thread saves it.
  if (get(data.data()) != VK_SUCCESS) return;
  data.resize(bytes);
  const FileHeader header = {.bytes = bytes, .checksum = Checksum(data)};

  std::error_code failure;
  std::filesystem::create_directories(path_.parent_path(), failure);
  const std::filesystem::path fresh = Concat(path_.string(), ".", getpid());
  std::ofstream file(fresh, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&header), sizeof(header));
  file.write(data.data(), static_cast<std::streamsize>(data.size()));
  file.close();
  if (file) std::filesystem::rename(fresh, path_, failure);
  if (!file || failure) {
    Log(LogLevel::kWarning, Concat("the pipeline cache ", path_.string(), " could not be written"));
    std::filesystem::remove(fresh, failure);
    return;
  }
  saved_bytes_ = bytes;
}

}  // namespace jax_aat
