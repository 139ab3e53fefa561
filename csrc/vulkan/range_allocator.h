// Best-fit allocation of ranges out of [0, size), neighbours merged when they are given back.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace jax_aat {

class RangeAllocator {
 public:
  explicit RangeAllocator(std::uint64_t size) : size_(size) { Insert(0, size); }

  // The bytes of the smallest free range that holds so many, if there is one.
  std::optional<std::uint64_t> BestFit(std::uint64_t bytes) const;
  // The offset of a range of the given size, if a free range holds it.
  std::optional<std::uint64_t> Allocate(std::uint64_t bytes);
  void Free(std::uint64_t offset, std::uint64_t bytes);
  bool empty() const { return largest_free() == size_; }
  // The bytes of the largest free range.
  std::uint64_t largest_free() const { return by_size_.empty() ? 0 : by_size_.rbegin()->first; }

 private:
  void Insert(std::uint64_t offset, std::uint64_t bytes);
  void Erase(std::map<std::uint64_t, std::uint64_t>::iterator range);

  std::uint64_t size_;
  std::map<std::uint64_t, std::uint64_t> by_offset_;           // offset -> bytes
  std::set<std::pair<std::uint64_t, std::uint64_t>> by_size_;  // (bytes, offset)
};

}  // namespace jax_aat
