#include "attention/kernels.h"

#include <algorithm>
#include <utility>

namespace jax_aat {
namespace {

// In order of preference.
constexpr KernelFamily kFamilies[] = {
    {"coopmat", CoopmatShapes},
    {"portable", PortableShapes},
};

}  // namespace

KernelChoice ShapesOf(Kernel kernel, const AttentionProblem& problem, const DeviceTraits& traits) {
  for (const KernelFamily& family : kFamilies) {
    KernelShapes shapes = family.shapes(kernel, problem, traits);
    if (!shapes.empty()) return {&family, std::move(shapes)};
  }
  return {};
}

std::vector<KeyPass> KeyPasses(const KernelShape& shape, bool wants_dk, bool wants_dv,
                               bool has_dout) {
  const double value_products = has_dout ? 2 : 0;
  const KeyPass of_keys = {FEATURE_DK, 4 + value_products};
  const KeyPass of_values = {FEATURE_DV, 2 + value_products};
  if (wants_dk && wants_dv) {
    if (shape.makes_one_gradient) return {of_keys, of_values};
    return {{FEATURE_DK | FEATURE_DV, 4 + 2 * value_products}};
  }
  if (wants_dk) return {of_keys};
  if (wants_dv) return {of_values};
  return {};
}

std::uint64_t WindowSpan(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  const bool has_window = problem.features & FEATURE_WINDOW;
  const std::uint64_t left = has_window && params.window_left >= 0
                                 ? static_cast<std::uint64_t>(params.window_left)
                                 : params.queries;
  const std::uint64_t right = problem.features & FEATURE_CAUSAL ? 0
                              : has_window && params.window_right >= 0
                                  ? static_cast<std::uint64_t>(params.window_right)
                                  : params.keys;
  return left + right;
}

std::uint64_t KeysOfTile(const AttentionProblem& problem, std::uint32_t tile_rows) {
  return std::min<std::uint64_t>(problem.params.keys, tile_rows + WindowSpan(problem));
}

}  // namespace jax_aat
