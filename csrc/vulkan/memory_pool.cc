#include "vulkan/memory_pool.h"

#include <algorithm>
#include <bit>
#include <map>

namespace jax_aat {
namespace {

constexpr std::uint64_t kMinBlock = 256;
constexpr std::uint64_t kMaxChunk = std::uint64_t{256} << 20;

}  // namespace

std::uint64_t MemoryPool::SizeClass(std::uint64_t bytes) {
  const std::uint64_t step = std::max(kMinBlock, std::bit_floor(bytes) / 8);
  return std::max((bytes + step - 1) / step * step, kMinBlock);
}

std::optional<MemoryPool::Range> MemoryPool::Allocate(std::uint64_t bytes, std::uint64_t use) {
  Chunk* best = nullptr;
  std::uint64_t least = UINT64_MAX;
  for (const auto& chunk : chunks_) {
    const std::uint64_t free = chunk->ranges.BestFit(bytes).value_or(UINT64_MAX);
    if (free >= least) continue;
    best = chunk.get();
    least = free;
  }
  if (best == nullptr) return std::nullopt;
  best->last_use = use;
  in_use_bytes_ += bytes;
  peak_in_use_bytes_ = std::max(peak_in_use_bytes_, in_use_bytes_);
  ++blocks_;
  return Range{best, *best->ranges.Allocate(bytes), bytes};
}

std::uint64_t MemoryPool::NextChunkBytes() const {
  return std::clamp(std::bit_ceil(reserved_bytes_), kMinChunk, kMaxChunk);
}

void MemoryPool::Grow(std::uint64_t bytes) {
  chunks_.push_back(
      std::make_unique<Chunk>(DeviceMemory(device_, memory_type_, bytes), RangeAllocator(bytes)));
  reserved_bytes_ += bytes;
  peak_reserved_bytes_ = std::max(peak_reserved_bytes_, reserved_bytes_);
  ++total_chunks_;
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

std::optional<std::uint64_t> MemoryPool::OldestIdle() const {
  std::optional<std::uint64_t> oldest;
  for (const auto& chunk : chunks_) {
    if (chunk->ranges.empty()) oldest = std::min(chunk->last_use, oldest.value_or(UINT64_MAX));
  }
  return oldest;
}

void MemoryPool::ReturnOldestIdle() {
  const std::uint64_t oldest = OldestIdle().value();
  const auto found = std::ranges::find_if(chunks_, [&](const auto& chunk) {
    return chunk->ranges.empty() && chunk->last_use == oldest;
  });
  reserved_bytes_ -= (*found)->memory.bytes();
  chunks_.erase(found);
}

std::uint64_t MemoryPool::LargestFree() const {
  std::uint64_t bytes = 0;
  for (const auto& chunk : chunks_) bytes = std::max(bytes, chunk->ranges.largest_free());
  return bytes;
}

}  // namespace jax_aat
