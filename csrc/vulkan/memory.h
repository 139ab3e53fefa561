// The memory manager: pools by purpose, blocks that are reused as soon as the device is done with
// them, one upper bound over all pools, statistics.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>

#include "vulkan/device_memory.h"
#include "vulkan/memory_pool.h"

namespace jax_aat {

enum class Purpose {
  kState,       // scratch of a call: device-local
  kTransfer,    // operands brought to the device: device-local
  kParameters,  // parameter blocks: written by the host, read by the device, device-local if
                // possible
  kStaging,     // host side of a transfer: mapped, cached by the host if possible
  kMetrics,     // results of queries: mapped, cached by the host if possible
};
inline constexpr std::size_t kPurposeCount = 5;
const char* PurposeName(Purpose purpose);

class MemoryManager;

// A range of a pool's memory. Given back when destroyed, so destroy it only once the device is done
// with it, or hand it over with ReleaseAt.
class Block {
 public:
  Block() = default;
  ~Block();
  Block(Block&& other) noexcept
      : manager_(std::exchange(other.manager_, nullptr)),
        range_(other.range_),
        purpose_(other.purpose_) {}
  Block& operator=(Block&& other) noexcept {
    std::swap(manager_, other.manager_);
    std::swap(range_, other.range_);
    std::swap(purpose_, other.purpose_);
    return *this;
  }

  VkBuffer buffer() const { return range_.chunk->memory.buffer(); }
  std::uint64_t offset() const { return range_.offset; }
  VkDeviceAddress address() const { return range_.chunk->memory.address() + range_.offset; }
  std::byte* mapped() const { return range_.chunk->memory.mapped() + range_.offset; }

  // Gives the block back now, for reuse once the point is reached.
  void ReleaseAt(const TimelinePoint& point) &&;

 private:
  friend class MemoryManager;
  Block(MemoryManager& manager, Purpose purpose, MemoryPool::Range range)
      : manager_(&manager), range_(range), purpose_(purpose) {}

  MemoryManager* manager_ = nullptr;
  MemoryPool::Range range_;
  Purpose purpose_ = Purpose::kState;
};

struct MemoryStatistics {
  struct Pool {
    std::uint64_t reserved_bytes = 0;  // held from the driver
    std::uint64_t in_use_bytes = 0;    // in blocks that are held or that the device still uses
    std::uint64_t blocks = 0;          // the number of these blocks
    std::uint64_t allocations = 0;     // VkDeviceMemory objects
  };
  std::array<Pool, kPurposeCount> pools;
  Pool total;
  std::uint64_t peak_reserved_bytes = 0;
  std::uint64_t peak_in_use_bytes = 0;
  std::uint64_t limit_bytes = 0;
  std::uint64_t imports = 0;  // host memory imports since the start
  std::uint64_t live_imports = 0;
};

class MemoryManager {
 public:
  explicit MemoryManager(const Device& device);
  MemoryManager(const MemoryManager&) = delete;
  MemoryManager& operator=(const MemoryManager&) = delete;

  // Throws Error (kOutOfMemory) where neither idle memory nor a wait for the device helps.
  Block Allocate(Purpose purpose, std::uint64_t bytes);

  // Host pages as device memory, until destroyed; empty where that is not possible.
  class Import {
   public:
    Import(MemoryManager& manager, DeviceMemory memory);
    ~Import();
    Import(Import&& other) noexcept
        : manager_(std::exchange(other.manager_, nullptr)), memory_(std::move(other.memory_)) {}
    const DeviceMemory& memory() const { return memory_; }

   private:
    MemoryManager* manager_;
    DeviceMemory memory_;
  };
  std::optional<Import> ImportHost(void* pages, std::uint64_t bytes);

  // Bytes that all pools together may hold.
  std::uint64_t limit() const { return limit_; }

  // Gives memory that holds no block back to the driver; returns the number of bytes.
  std::uint64_t Trim();

  MemoryStatistics Statistics();

 private:
  friend class Block;
  void Free(Purpose purpose, const MemoryPool::Range& range);
  void FreeAt(Purpose purpose, const MemoryPool::Range& range, const TimelinePoint& point);

  std::uint64_t Reserved() const;
  std::uint64_t TrimLocked();
  std::optional<MemoryPool::Range> TryAllocate(MemoryPool& pool, std::uint64_t bytes);

  const Device& device_;
  const std::uint64_t limit_;
  const std::uint32_t max_allocations_;
  std::mutex mutex_;
  std::array<MemoryPool, kPurposeCount> pools_;
  std::uint64_t peak_reserved_ = 0;
  std::uint64_t peak_in_use_ = 0;
  std::uint64_t imports_ = 0;
  std::uint64_t live_imports_ = 0;
};

}  // namespace jax_aat
