#include "attention/tuning.h"

#include <algorithm>
#include <iterator>

#include "attention/example_plan.h"

namespace jax_aat {
namespace {

struct NamedKernel {
  Kernel kernel;
  std::string_view name;
  std::string_view pass;
};

constexpr NamedKernel kTunable[] = {
    {Kernel::kForward, "forward", "forward"},
    {Kernel::kTangent, "tangent", "tangent"},
    {Kernel::kBackwardDq, "backward_dq", "backward"},
    {Kernel::kBackwardDkv, "backward_dkv", "backward"},
};

constexpr std::uint32_t kExampleQueryTile = 128;  // as many rows as any kernel's tile
constexpr std::uint32_t kExampleSuperTile = 256;

const NamedKernel& Named(Kernel kernel) {
  return *std::ranges::find(kTunable, kernel, &NamedKernel::kernel);
}

}  // namespace

std::string_view KernelName(Kernel kernel) { return Named(kernel).name; }

std::optional<TunedKernel> FindTunedKernel(std::string_view kernel, std::string_view dtype,
                                           std::uint32_t head_dim, bool planned) {
  const auto* named = std::ranges::find(kTunable, kernel, &NamedKernel::name);
  const auto* found = std::ranges::find(kDtypeNames, dtype);
  if (named == std::end(kTunable) || found == std::end(kDtypeNames)) return std::nullopt;
  const auto number = static_cast<std::uint32_t>(found - std::begin(kDtypeNames));
  return TunedKernel{named->kernel, number, head_dim, planned};
}

KernelShapes TunableShapes(const TunedKernel& tuned, const DeviceTraits& traits) {
  ExampleCall call = {.pass = Named(tuned.kernel).pass, .dtype = kDtypeNames[tuned.dtype]};
  call.head_dim = tuned.head_dim;
  if (tuned.planned) {
    call.query_tile = kExampleQueryTile;
    call.super_tile = kExampleSuperTile;
  }
  return ShapesOf(tuned.kernel, ExampleProblem(call), traits).shapes;
}

bool CanRun(const TunedKernel& tuned, const ShapeNumbers& numbers, const DeviceTraits& traits) {
  const KernelShapes shapes = TunableShapes(tuned, traits);
  return std::ranges::find(shapes, numbers, NumbersOf) != shapes.end();
}

const KernelShape& TunedShape(Kernel kernel, const AttentionProblem& problem,
                              const DeviceTraits& traits, const KernelShapes& shapes) {
  if (traits.tuning == nullptr) return shapes.front();
  const bool planned = (problem.features & FEATURE_PLAN) != 0;
  const auto tuned =
      traits.tuning->shapes.find({kernel, problem.dtype, problem.params.head_dim, planned});
  if (tuned == traits.tuning->shapes.end()) return shapes.front();
  const auto found = std::ranges::find(shapes, tuned->second, NumbersOf);
  return found == shapes.end() ? shapes.front() : *found;
}

}  // namespace jax_aat
