#include "vulkan/pipeline_cache.h"

#include <cstdint>
#include <fstream>
#include <vector>

#include "vulkan/cache_files.h"
#include "vulkan/logging.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

// Drivers check little of what they are given, so a file carries its own size and checksum.
struct FileHeader {
  std::uint64_t magic = 0x31656361635f6161;
  std::uint64_t bytes = 0;
  std::uint64_t checksum = 0;
};

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
  return CacheFile(device, ".pipelines");
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

  if (!ReplaceFile(path_, {{reinterpret_cast<const char*>(&header), sizeof(header)}, data})) {
    Log(LogLevel::kWarning, Concat("the pipeline cache ", path_.string(), " could not be written"));
    return;
  }
  saved_bytes_ = bytes;
}

}  // namespace jax_aat
