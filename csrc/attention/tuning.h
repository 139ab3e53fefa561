// Shapes of kernels that a measured run found best on a device, in place of those that rules
// choose.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <string_view>

#include "attention/kernels.h"

namespace jax_aat {

// What a shape was measured for: lengths and conditions of a call are not told apart.
struct TunedKernel {
  Kernel kernel = Kernel::kForward;
  std::uint32_t dtype = 0;
  std::uint32_t head_dim = 0;
  bool planned = false;  // of adaptive calls

  auto operator<=>(const TunedKernel&) const = default;
};

struct Tuning {
  std::map<TunedKernel, ShapeNumbers> shapes;
};

// Of kernels that are tuned: "forward", "tangent", "backward_dq" or "backward_dkv".
std::string_view KernelName(Kernel kernel);

// Nothing where there is no such kernel that is tuned, or no such dtype.
std::optional<TunedKernel> FindTunedKernel(std::string_view kernel, std::string_view dtype,
                                           std::uint32_t head_dim, bool planned);

// Shapes that a tuning can name: those of a plain call of moderate length. None where the device
// has no kernel for it.
KernelShapes TunableShapes(const TunedKernel& tuned, const DeviceTraits& traits);

bool CanRun(const TunedKernel& tuned, const ShapeNumbers& numbers, const DeviceTraits& traits);

// Of the shapes that fit a problem the one that the device's tuning names; the first where it names
// none of them.
const KernelShape& TunedShape(Kernel kernel, const AttentionProblem& problem,
                              const DeviceTraits& traits, const KernelShapes& shapes);

}  // namespace jax_aat
