#include "attention/pairs.h"

#include <algorithm>

namespace jax_aat {
namespace {

// Number of pairs (t, s) with s <= t + offset.
double PairsUpTo(double offset, double queries, double keys) {
  // Row t has clamp(t + offset + 1, 0, keys) of them: none, then growing by one, then all.
  const double none = std::clamp(-offset - 1, 0.0, queries);
  const double growing = std::clamp(keys - offset - 1, none, queries) - none;
  const double first = none + offset + 1;
  return growing * first + growing * (growing - 1) / 2 + (queries - none - growing) * keys;
}

}  // namespace

double CountPairs(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  const double queries = params.queries, keys = params.keys;
  double right = keys, left = queries;  // unbounded
  if (problem.features & FEATURE_WINDOW) {
    if (params.window_right >= 0) right = params.window_right;
    if (params.window_left >= 0) left = params.window_left;
  }
  if (problem.features & FEATURE_CAUSAL) right = std::min(right, 0.0);
  const double pairs = PairsUpTo(right, queries, keys) - PairsUpTo(-left - 1, queries, keys);
  return pairs * params.batch_count * params.query_heads;
}

}  // namespace jax_aat
