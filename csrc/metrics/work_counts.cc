#include "metrics/work_counts.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace jax_aat {

WorkCounts::WorkCounts(std::shared_ptr<Context> context, std::uint64_t lists)
    : context_(std::move(context)),
      lists_(lists),
      block_(context_->memory().Allocate(Purpose::kMetrics,
                                         lists * kWorkCountWords * sizeof(std::uint32_t))) {}

Work WorkCounts::Sum() const {
  context_->device().Wait(done_);
  std::vector<std::uint32_t> words(lists_ * kWorkCountWords);
  std::memcpy(words.data(), block_.mapped(), words.size() * sizeof(std::uint32_t));
  const auto wide = [](const std::uint32_t* word) { return word[0] + 0x1p32 * word[1]; };
  Work work;
  for (std::uint64_t list = 0; list < lists_; ++list) {
    const std::uint32_t* counts = &words[list * kWorkCountWords];
    work.exact_pairs += wide(counts);
    work.coarse_pairs += wide(counts + 2);
    work.most_rows = std::max(work.most_rows, counts[4]);
  }
  return work;
}

}  // namespace jax_aat
