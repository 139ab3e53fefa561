#include "vulkan/memory.h"

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <string>

#include "vulkan/local_heap.h"
#include "vulkan/status.h"
#include "vulkan/text.h"

namespace jax_aat {
namespace {

constexpr VkMemoryPropertyFlags kDeviceLocal = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
constexpr VkMemoryPropertyFlags kMapped =
    VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
constexpr VkMemoryPropertyFlags kCached = VK_MEMORY_PROPERTY_HOST_CACHED_BIT;

// A chunk that serves many blocks takes no more than this part of the bound, so that every pool
// finds room.
constexpr std::uint64_t kSharesOfLimit = 16;

// The least that the pools may hold: their smallest chunks.
constexpr std::uint64_t kMinBound = kPurposeCount * MemoryPool::kMinChunk;

// The memory type for the first choice of flags that any type has.
std::uint32_t MemoryType(const Device& device,
                         std::initializer_list<VkMemoryPropertyFlags> choices) {
  const std::uint32_t allowed = DeviceMemory::BufferMemoryTypes(device);
  for (const VkMemoryPropertyFlags choice : choices) {
    if (const auto type = device.physical().MemoryType(choice, allowed)) return *type;
  }
  throw Error(ErrorKind::kUnavailable,
              Concat("The Vulkan device ", device.physical().name,
                     " has no memory type that its compute shaders can use."));
}

// JAX_AAT_MEMORY_LIMIT, else four fifths of what the largest device-local heap has free: the rest
// is left to others.
std::uint64_t MemoryLimit(const Device& device) {
  const std::string wanted = Environment("JAX_AAT_MEMORY_LIMIT");
  if (!wanted.empty()) {
    std::uint64_t limit = 0;
    const char* end = wanted.data() + wanted.size();
    if (std::from_chars(wanted.data(), end, limit).ptr != end || limit == 0) {
      throw Error(ErrorKind::kInvalidArgument,
                  Concat("JAX_AAT_MEMORY_LIMIT=", wanted, " is not a positive number of bytes."));
    }
    return limit;
  }
  const LocalHeap heap = LargestLocalHeap(device);
  const std::uint64_t available =
      heap.budget ? heap.budget->bytes - std::min(heap.budget->usage, heap.budget->bytes)
                  : heap.bytes;
  return available / 5 * 4;
}

MemoryPool MakePool(const Device& device, Purpose purpose) {
  switch (purpose) {
    case Purpose::kState:
    case Purpose::kTransfer:
      return {device, MemoryType(device, {kDeviceLocal, 0})};
    case Purpose::kParameters:
      return {device, MemoryType(device, {kMapped | kDeviceLocal, kMapped})};
    case Purpose::kStaging:
    case Purpose::kMetrics:
      break;
  }
  return {device, MemoryType(device, {kMapped | kCached, kMapped})};
}

}  // namespace

const char* PurposeName(Purpose purpose) {
  switch (purpose) {
    case Purpose::kState:
      return "state";
    case Purpose::kTransfer:
      return "transfer";
    case Purpose::kParameters:
      return "parameters";
    case Purpose::kStaging:
      return "staging";
    case Purpose::kMetrics:
      break;
  }
  return "metrics";
}

Block::~Block() {
  if (manager_ != nullptr) manager_->Free(purpose_, range_);
}

void Block::ReleaseAt(const TimelinePoint& point) && {
  std::exchange(manager_, nullptr)->FreeAt(purpose_, range_, point);
}

MemoryManager::MemoryManager(const Device& device)
    : device_(device),
      limit_(MemoryLimit(device)),
      max_allocations_(device.physical().limits.maxMemoryAllocationCount),
      pools_{MakePool(device, Purpose::kState), MakePool(device, Purpose::kTransfer),
             MakePool(device, Purpose::kParameters), MakePool(device, Purpose::kStaging),
             MakePool(device, Purpose::kMetrics)} {}

Block MemoryManager::Allocate(Purpose purpose, std::uint64_t bytes) {
  const std::uint64_t size = MemoryPool::SizeClass(bytes);
  const std::lock_guard lock(mutex_);
  MemoryPool& pool = pools_[static_cast<std::size_t>(purpose)];
  CollectLocked(false);
  std::optional<MemoryPool::Range> range = TryAllocate(pool, size);
  if (!range) {
    ReturnIdle(0);
    range = TryAllocate(pool, size);
  }
  if (!range) {
    // Blocks that only the device still uses come back without anybody's help.
    CollectLocked(true);
    ReturnIdle(0);
    range = TryAllocate(pool, size);
  }
  if (!range) {
    throw Error(ErrorKind::kOutOfMemory,
                Concat("Out of ", PurposeName(purpose), " memory: ", size, " bytes wanted, ",
                       Reserved(), " of at most ", limit_,
                       " bytes are in use (JAX_AAT_MEMORY_LIMIT sets the bound; one allocation "
                       "may have ",
                       device_.physical().max_allocation_bytes, " bytes on this device)."));
  }
  peak_in_use_ = std::max(peak_in_use_, InUse());
  peak_reserved_ = std::max(peak_reserved_, Reserved());
  return Block(*this, purpose, *range);
}

std::optional<MemoryPool::Range> MemoryManager::TryAllocate(MemoryPool& pool, std::uint64_t bytes) {
  ++allocations_;
  if (auto range = pool.Allocate(bytes, allocations_)) return range;
  const std::uint64_t max_bytes = device_.physical().max_allocation_bytes;
  if (bytes > std::min(limit_, max_bytes)) return std::nullopt;
  const std::uint64_t bound = std::min(Bound(InUse() + bytes), limit_);
  const std::uint64_t least = std::min(std::max(bytes, MemoryPool::kMinChunk), bound);
  ReturnIdle(bound - least);
  const std::uint64_t reserved = Reserved();
  std::uint64_t allocations = 0;
  for (const MemoryPool& each : pools_) allocations += each.chunks();
  for (const MemoryStatistics::Shared& each : shared_) allocations += each.live;
  if (reserved + bytes > limit_ || allocations >= max_allocations_) return std::nullopt;
  const std::uint64_t room = std::max(bound - std::min(bound, reserved), MemoryPool::kMinChunk);
  const std::uint64_t generous = std::min(
      {pool.NextChunkBytes(), room, limit_ - reserved, limit_ / kSharesOfLimit, max_bytes});
  // Where the driver has no room for a generous chunk, it may have some for this block alone.
  for (const std::uint64_t size : {std::max(bytes, generous), bytes}) {
    try {
      pool.Grow(size);
      return pool.Allocate(bytes, allocations_);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kOutOfMemory) throw;
    }
  }
  return std::nullopt;
}

void MemoryManager::Free(Purpose purpose, const MemoryPool::Range& range) {
  const std::lock_guard lock(mutex_);
  pools_[static_cast<std::size_t>(purpose)].Free(range);
  ReturnIdle(Bound(0));
}

void MemoryManager::FreeAt(Purpose purpose, const MemoryPool::Range& range,
                           const TimelinePoint& point) {
  const std::lock_guard lock(mutex_);
  pools_[static_cast<std::size_t>(purpose)].FreeAt(range, point);
}

std::optional<MemoryManager::SharedMemory> MemoryManager::ImportHost(void* pages,
                                                                     std::uint64_t bytes) {
  if (bytes > device_.physical().max_allocation_bytes) return std::nullopt;
  std::optional<DeviceMemory> memory = DeviceMemory::ImportHost(device_, pages, bytes);
  if (!memory) return std::nullopt;
  return SharedMemory(*this, Sharing::kHostImport, std::move(*memory));
}

std::optional<MemoryManager::SharedMemory> MemoryManager::ImportCuda(FileDescriptor fd,
                                                                     std::uint64_t bytes) {
  std::optional<DeviceMemory> memory = DeviceMemory::ImportFd(device_, std::move(fd), bytes);
  if (!memory) return std::nullopt;
  return SharedMemory(*this, Sharing::kCudaImport, std::move(*memory));
}

MemoryManager::SharedMemory MemoryManager::ExportToCuda(std::uint64_t bytes) {
  return SharedMemory(*this, Sharing::kCudaExport, DeviceMemory::Exportable(device_, bytes));
}

MemoryManager::SharedMemory::SharedMemory(MemoryManager& manager, Sharing sharing,
                                          DeviceMemory memory)
    : manager_(&manager), sharing_(sharing), memory_(std::move(memory)) {
  const std::lock_guard lock(manager.mutex_);
  MemoryStatistics::Shared& shared = manager.shared_[static_cast<std::size_t>(sharing)];
  ++shared.live;
  shared.live_bytes += memory_.bytes();
  ++shared.total;
}

MemoryManager::SharedMemory::~SharedMemory() {
  if (manager_ == nullptr) return;
  const std::lock_guard lock(manager_->mutex_);
  MemoryStatistics::Shared& shared = manager_->shared_[static_cast<std::size_t>(sharing_)];
  --shared.live;
  shared.live_bytes -= memory_.bytes();
}

std::uint64_t MemoryManager::Trim() {
  const std::lock_guard lock(mutex_);
  const std::uint64_t before = Reserved();
  CollectLocked(false);
  ReturnIdle(0);
  return before - Reserved();
}

MemoryStatistics MemoryManager::Statistics() {
  const std::lock_guard lock(mutex_);
  CollectLocked(false);
  MemoryStatistics statistics = {.shared = shared_, .limit_bytes = limit_};
  MemoryStatistics::Pool& total = statistics.total;
  total = {.reserved_bytes = Reserved(),
           .in_use_bytes = InUse(),
           .peak_reserved_bytes = peak_reserved_,
           .peak_in_use_bytes = peak_in_use_};
  for (std::size_t i = 0; i < kPurposeCount; ++i) {
    const MemoryPool& pool = pools_[i];
    statistics.pools[i] = {.reserved_bytes = pool.reserved_bytes(),
                           .in_use_bytes = pool.in_use_bytes(),
                           .peak_reserved_bytes = pool.peak_reserved_bytes(),
                           .peak_in_use_bytes = pool.peak_in_use_bytes(),
                           .largest_free_bytes = pool.LargestFree(),
                           .blocks = pool.blocks(),
                           .allocations = pool.chunks(),
                           .total_allocations = pool.total_chunks()};
    total.largest_free_bytes += pool.LargestFree();
    total.blocks += pool.blocks();
    total.allocations += pool.chunks();
    total.total_allocations += pool.total_chunks();
  }
  return statistics;
}

std::uint64_t MemoryManager::Reserved() const {
  std::uint64_t bytes = 0;
  for (const MemoryPool& pool : pools_) bytes += pool.reserved_bytes();
  return bytes;
}

std::uint64_t MemoryManager::InUse() const {
  std::uint64_t bytes = 0;
  for (const MemoryPool& pool : pools_) bytes += pool.in_use_bytes();
  return bytes;
}

std::uint64_t MemoryManager::Bound(std::uint64_t in_use) const {
  const std::uint64_t peak = std::max(peak_in_use_, in_use);
  return std::max(peak + peak / 2, kMinBound);
}

void MemoryManager::CollectLocked(bool wait) {
  for (MemoryPool& pool : pools_) pool.Collect(wait);
  ReturnIdle(Bound(0));
}

void MemoryManager::ReturnIdle(std::uint64_t bytes) {
  while (Reserved() > bytes) {
    MemoryPool* pool = nullptr;
    std::uint64_t oldest = UINT64_MAX;
    for (MemoryPool& each : pools_) {
      const std::uint64_t last_use = each.OldestIdle().value_or(UINT64_MAX);
      if (last_use >= oldest) continue;
      pool = &each;
      oldest = last_use;
    }
    if (pool == nullptr) return;
    pool->ReturnOldestIdle();
  }
}

}  // namespace jax_aat
