#include "attention/kernels.h"

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

}  // namespace jax_aat
