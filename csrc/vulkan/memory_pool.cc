#include "vulkan/memory_pool.h"

#include <algorithm>
#include <bit>
#include <map>

namespace jax_aat {
namespace {

constexpr std::uint64_t kMinBlock = 256;
constexpr std::uint64_t kMinChunk = std::uint64_t{1} << 20;
constexpr std::uint64_t kMaxChunk = std::uint64_t{256} << 20;

}  // namespace

std::uint64_t MemoryPool::SizeClass(std::uint64_t bytes) {
  const std::uint64_t step = std::max(kMinBlock, std::bit_floor(bytes) / 8);
  return std::max((bytes + step - 1) / step * step, kMinBlock);
}

std::optional<MemoryPool::Range> MemoryPool::Allocate(std::uint64_t bytes) {
  for (const auto& chunk : chunks_) {
    if (const auto offset = chunk->ranges.Allocate(bytes)) {
      in_use_bytes_ += bytes;
      ++blocks_;
      return Range{chunk.get(), *offset, bytes};
    }
  }
  return std::nullopt;
}

void MemoryPool::Grow(std::uint64_t bytes, std::uint64_t most) {
  // Doubling keeps the number of allocations logarithmic in the memory that is used.
  const std::uint64_t wanted = std::clamp(std::bit_ceil(reserved_bytes_), kMinChunk, kMaxChunk);
  const std::uint64_t size = std::max(bytes, std::min(wanted, most));
  chunks_.push_back(
      std::make_unique<Chunk>(DeviceMemory(device_, memory_type_, size), RangeAllocator(size)));
  reserved_bytes_ += size;
}

void MemoryPool::Free(const Range& range) {
  range.chunk->ranges.Free(range.offset, range.bytes);
  in_use_bytes_ -= range.bytes;
  --blocks_;
}

void MemoryPool::FreeAt(const Range& range, const TimelinePoint& point) {
  pending_.push_back({range, point});
}

void MemoryPool::Collect(bool wait) {
  std::map<VkSemaphore, std::uint64_t> counters;
  for (const Pending& pending : pending_) {
    if (wait) device_.Wait(pending.point);
    counters.emplace(pending.point.semaphore, 0);
  }
  for (auto& [semaphore, value] : counters) value = device_.CounterValue(semaphore);
  std::erase_if(pending_, [&](const Pending& pending) {
    if (counters.at(pending.point.semaphore) < pending.point.value) return false;
    Free(pending.range);
    return true;
  });
}

std::uint64_t MemoryPool::Trim() {
  const std::uint64_t before = reserved_bytes_;
  std::erase_if(chunks_, [this](const std::unique_ptr<Chunk>& chunk) {
    if (!chunk->ranges.empty()) return false;
    reserved_bytes_ -= chunk->memory.bytes();
    return true;
  });
  return before - reserved_bytes_;
}

}  // namespace jax_aat
