// Chunks of one memory type, cut into ranges. Not synchronised: MemoryManager holds the lock.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "vulkan/device_memory.h"
#include "vulkan/range_allocator.h"

namespace jax_aat {

class MemoryPool {
 public:
  struct Chunk {
    DeviceMemory memory;
    RangeAllocator ranges;
  };
  struct Range {
    Chunk* chunk = nullptr;
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
  };

  MemoryPool(const Device& device, std::uint32_t memory_type)
      : device_(device), memory_type_(memory_type) {}

  // The size that a block of so many bytes takes: 256 bytes or more, eight classes an octave.
  static std::uint64_t SizeClass(std::uint64_t bytes);

  // A range of a chunk that is here already. `bytes` is a size class.
  std::optional<Range> Allocate(std::uint64_t bytes);
  // Adds a chunk for a block of `bytes`, larger than that up to `most` in expectation of others.
  void Grow(std::uint64_t bytes, std::uint64_t most);

  void Free(const Range& range);
  void FreeAt(const Range& range, const TimelinePoint& point);
  // Frees the ranges whose points are reached; with `wait`, waits for all of them.
  void Collect(bool wait);

  // Gives chunks without a range in use back to the driver; returns their bytes.
  std::uint64_t Trim();

  std::uint64_t reserved_bytes() const { return reserved_bytes_; }
  std::uint64_t in_use_bytes() const { return in_use_bytes_; }
  std::uint64_t blocks() const { return blocks_; }
  std::uint64_t chunks() const { return chunks_.size(); }

 private:
  struct Pending {
    Range range;
    TimelinePoint point;
  };

  const Device& device_;
  std::uint32_t memory_type_;
  std::vector<std::unique_ptr<Chunk>> chunks_;
  std::vector<Pending> pending_;
  std::uint64_t reserved_bytes_ = 0;
  std::uint64_t in_use_bytes_ = 0;
  std::uint64_t blocks_ = 0;
};

}  // namespace jax_aat
