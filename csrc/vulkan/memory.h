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

// Memory that is shared with others and lies in no pool.
enum class Sharing {
  kHostImport,  // pages of the host
  kCudaImport,  // allocations of CUDA
  kCudaExport,  // memory of ours that CUDA maps
};
inline constexpr std::size_t kSharingCount = 3;

struct MemoryStatistics {
  struct Pool {
    std::uint64_t reserved_bytes = 0;  // held from the driver
    std::uint64_t in_use_bytes = 0;    // in blocks that are held or that the device still uses
    std::uint64_t peak_reserved_bytes = 0;
    std::uint64_t peak_in_use_bytes = 0;
    std::uint64_t largest_free_bytes = 0;  // of the free ranges; in total: their sum over the pools
    std::uint64_t blocks = 0;              // the number of blocks in use
    std::uint64_t allocations = 0;         // VkDeviceMemory objects
    std::uint64_t total_allocations = 0;   // so far
  };
  struct Shared {
    std::uint64_t live = 0;
    std::uint64_t live_bytes = 0;
    std::uint64_t total = 0;  // so far
  };
  std::array<Pool, kPurposeCount> pools;
  Pool total;
  std::array<Shared, kSharingCount> shared;
  std::uint64_t limit_bytes = 0;
};

class MemoryManager {
 public:
  explicit MemoryManager(const Device& device);
  MemoryManager(const MemoryManager&) = delete;
  MemoryManager& operator=(const MemoryManager&) = delete;

  // Throws Error (kOutOfMemory) where neither idle memory nor a wait for the device helps.
  Block Allocate(Purpose purpose, std::uint64_t bytes);

  // Memory that is shared with others, counted until it is destroyed.
  class SharedMemory {
   public:
    SharedMemory(MemoryManager& manager, Sharing sharing, DeviceMemory memory);
    ~SharedMemory();
    SharedMemory(SharedMemory&& other) noexcept
        : manager_(std::exchange(other.manager_, nullptr)),
          sharing_(other.sharing_),
          memory_(std::move(other.memory_)) {}
    const DeviceMemory& memory() const { return memory_; }

   private:
    MemoryManager* manager_;
    Sharing sharing_;
    DeviceMemory memory_;
  };
  // Host pages as device memory; empty where that is not possible.
  std::optional<SharedMemory> ImportHost(void* pages, std::uint64_t bytes);
  // An allocation of CUDA; empty where the driver refuses it.
  std::optional<SharedMemory> ImportCuda(FileDescriptor fd, std::uint64_t bytes);
  SharedMemory ExportToCuda(std::uint64_t bytes);

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
  std::uint64_t InUse() const;
  // Bytes that the pools may hold once so many are in use.
  std::uint64_t Bound(std::uint64_t in_use) const;
  void CollectLocked(bool wait);
  // Gives idle chunks back, least recently used first, until the pools hold no more than that.
  void ReturnIdle(std::uint64_t bytes);
  std::optional<MemoryPool::Range> TryAllocate(MemoryPool& pool, std::uint64_t bytes);

  const Device& device_;
  const std::uint64_t limit_;
  const std::uint32_t max_allocations_;
  std::mutex mutex_;
  std::array<MemoryPool, kPurposeCount> pools_;
  std::uint64_t peak_reserved_ = 0;
  std::uint64_t peak_in_use_ = 0;
  std::uint64_t allocations_ = 0;  // of blocks so far
  std::array<MemoryStatistics::Shared, kSharingCount> shared_;
};

}  // namespace jax_aat
