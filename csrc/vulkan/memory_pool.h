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
    std::uint64_t last_use = 0;
  };
  struct Range {
    Chunk* chunk = nullptr;
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
  };

  MemoryPool(const Device& device, std::uint32_t memory_type)
      : device_(device), memory_type_(memory_type) {}

  static constexpr std::uint64_t kMinChunk = std::uint64_t{64} << 10;

  // The size that a block of so many bytes takes: 256 bytes or more, eight classes an octave.
  static std::uint64_t SizeClass(std::uint64_t bytes);

  // A range of the chunks that are here already. `bytes` is a size class, `use` counts the
  // allocations of all pools.
  std::optional<Range> Allocate(std::uint64_t bytes, std::uint64_t use);
  // What the next chunk should have beside the need of the moment: doubling keeps the number of
  // chunks logarithmic in the memory that is used.
  std::uint64_t NextChunkBytes() const;
  void Grow(std::uint64_t bytes);

  void Free(const Range& range);
  void FreeAt(const Range& range, const TimelinePoint& point);
  // Frees the ranges whose points are reached; with `wait`, waits for all of them.
  void Collect(bool wait);

  // When the least recently used of the idle chunks, those without a range in use, was used last.
  std::optional<std::uint64_t> OldestIdle() const;
  // Gives this chunk back to the driver.
  void ReturnOldestIdle();

  std::uint64_t reserved_bytes() const { return reserved_bytes_; }
  std::uint64_t in_use_bytes() const { return in_use_bytes_; }
  std::uint64_t peak_reserved_bytes() const { return peak_reserved_bytes_; }
  std::uint64_t peak_in_use_bytes() const { return peak_in_use_bytes_; }
  std::uint64_t blocks() const { return blocks_; }
  std::uint64_t chunks() const { return chunks_.size(); }
  // Chunks that the driver was asked for so far.
  std::uint64_t total_chunks() const { return total_chunks_; }
  std::uint64_t LargestFree() const;

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
  std::uint64_t peak_reserved_bytes_ = 0;
  std::uint64_t peak_in_use_bytes_ = 0;
  std::uint64_t blocks_ = 0;
  std::uint64_t total_chunks_ = 0;
};

}  // namespace jax_aat
