// The compiled pipelines of earlier runs: a VkPipelineCache that is loaded from and saved to disk.
#pragma once

#include <cstddef>
#include <filesystem>
#include <mutex>

#include "vulkan/device_handle.h"

namespace jax_aat {

// Where the cache of a device lies, as CacheFile has it.
std::filesystem::path PipelineCachePath(const PhysicalDevice& device);

class PipelineCache {
 public:
  // Starts empty where there is no file or a damaged one.
  explicit PipelineCache(const Device& device);

  VkPipelineCache handle() const { return handle_.get(); }

  // Replaces the file in one step if the cache grew. A failure is logged: the cache saves time,
  // nothing depends on it.
  void Save();

 private:
  const Device& device_;
  const std::filesystem::path path_;
  PipelineCacheHandle handle_;
  std::mutex mutex_;
  std::size_t saved_bytes_ = 0;
};

}  // namespace jax_aat
