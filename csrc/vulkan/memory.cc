#include "vulkan/memory.h"

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <string>

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
  VkPhysicalDeviceMemoryBudgetPropertiesEXT budget = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
  VkPhysicalDeviceMemoryProperties2 memory = {
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
  const bool budgeted = device.physical().HasExtension(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
  if (budgeted) memory.pNext = &budget;
  device.instance_vk().GetPhysicalDeviceMemoryProperties2(device.physical().handle, &memory);
  std::uint64_t available = 0;
  for (std::uint32_t i = 0; i < memory.memoryProperties.memoryHeapCount; ++i) {
    const VkMemoryHeap& heap = memory.memoryProperties.memoryHeaps[i];
    if (!(heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT)) continue;
    std::uint64_t bytes = heap.size;
    if (budgeted) {
      bytes = budget.heapBudget[i] - std::min(budget.heapUsage[i], budget.heapBudget[i]);
    }
    available = std::max(available, bytes);
  }
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
  pool.Collect(false);
  std::optional<MemoryPool::Range> range = TryAllocate(pool, size);
  if (!range) {
    TrimLocked();
    range = TryAllocate(pool, size);
  }
  if (!range) {
    // Blocks that only the device still uses come back without anybody's help.
    for (MemoryPool& other : pools_) other.Collect(true);
    TrimLocked();
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
  std::uint64_t in_use = 0;
  for (const MemoryPool& each : pools_) in_use += each.in_use_bytes();
  peak_in_use_ = std::max(peak_in_use_, in_use);
  peak_reserved_ = std::max(peak_reserved_, Reserved());
  return Block(*this, purpose, *range);
}

std::optional<MemoryPool::Range> MemoryManager::TryAllocate(MemoryPool& pool, std::uint64_t bytes) {
  if (auto range = pool.Allocate(bytes)) return range;
  const std::uint64_t reserved = Reserved();
  std::uint64_t allocations = live_imports_;
  for (const MemoryPool& each : pools_) allocations += each.chunks();
  if (reserved + bytes > limit_ || bytes > device_.physical().max_allocation_bytes ||
      allocations >= max_allocations_) {
    return std::nullopt;
  }
  const std::uint64_t generous = std::min(
      {limit_ - reserved, limit_ / kSharesOfLimit, device_.physical().max_allocation_bytes});
  // Where the driver has no room for a generous chunk, it may have some for this block alone.
  for (const std::uint64_t most : {generous, bytes}) {
    try {
      pool.Grow(bytes, most);
      return pool.Allocate(bytes);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kOutOfMemory) throw;
    }
  }
  return std::nullopt;
}

void MemoryManager::Free(Purpose purpose, const MemoryPool::Range& range) {
  const std::lock_guard lock(mutex_);
  pools_[static_cast<std::size_t>(purpose)].Free(range);
}

void MemoryManager::FreeAt(Purpose purpose, const MemoryPool::Range& range,
                           const TimelinePoint& point) {
  const std::lock_guard lock(mutex_);
  pools_[static_cast<std::size_t>(purpose)].FreeAt(range, point);
}

std::optional<MemoryManager::Import> MemoryManager::ImportHost(void* pages, std::uint64_t bytes) {
  if (bytes > device_.physical().max_allocation_bytes) return std::nullopt;
  std::optional<DeviceMemory> memory = DeviceMemory::ImportHost(device_, pages, bytes);
  if (!memory) return std::nullopt;
  return Import(*this, std::move(*memory));
}

MemoryManager::Import::Import(MemoryManager& manager, DeviceMemory memory)
    : manager_(&manager), memory_(std::move(memory)) {
  const std::lock_guard lock(manager.mutex_);
  ++manager.imports_;
  ++manager.live_imports_;
}

MemoryManager::Import::~Import() {
  if (manager_ == nullptr) return;
  const std::lock_guard lock(manager_->mutex_);
  --manager_->live_imports_;
}

std::uint64_t MemoryManager::Trim() {
  const std::lock_guard lock(mutex_);
  for (MemoryPool& pool : pools_) pool.Collect(false);
  return TrimLocked();
}

MemoryStatistics MemoryManager::Statistics() {
  const std::lock_guard lock(mutex_);
  MemoryStatistics statistics;
  for (std::size_t i = 0; i < kPurposeCount; ++i) {
    pools_[i].Collect(false);
    MemoryStatistics::Pool& pool = statistics.pools[i];
    pool = {pools_[i].reserved_bytes(), pools_[i].in_use_bytes(), pools_[i].blocks(),
            pools_[i].chunks()};
    statistics.total.reserved_bytes += pool.reserved_bytes;
    statistics.total.in_use_bytes += pool.in_use_bytes;
    statistics.total.blocks += pool.blocks;
    statistics.total.allocations += pool.allocations;
  }
  statistics.peak_reserved_bytes = peak_reserved_;
  statistics.peak_in_use_bytes = peak_in_use_;
  statistics.limit_bytes = limit_;
  statistics.imports = imports_;
  statistics.live_imports = live_imports_;
  return statistics;
}

std::uint64_t MemoryManager::Reserved() const {
  std::uint64_t bytes = 0;
  for (const MemoryPool& pool : pools_) bytes += pool.reserved_bytes();
  return bytes;
}

std::uint64_t MemoryManager::TrimLocked() {
  std::uint64_t bytes = 0;
  for (MemoryPool& pool : pools_) bytes += pool.Trim();
  return bytes;
}

}  // namespace jax_aat
