#include "ffi/tuning_module.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "vulkan/runtime.h"
#include "vulkan/text.h"
#include "vulkan/tuning_file.h"

namespace nb = nanobind;

namespace jax_aat {
namespace {

using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

// Name of the kernel, dtype, head_dim, whether calls have a plan; the shape.
using TuningEntry = std::tuple<std::string, std::string, std::uint32_t, bool, ShapeNumbers>;

TunedKernel RequireTunedKernel(const std::string& kernel, const std::string& dtype,
                               std::uint32_t head_dim, bool planned) {
  if (const auto tuned = FindTunedKernel(kernel, dtype, head_dim, planned)) return *tuned;
  throw std::invalid_argument(
      Concat("there is no kernel '", kernel, "' or no dtype '", dtype, "' that can be tuned"));
}

std::vector<ShapeNumbers> KernelShapeNumbers(std::uint32_t device, const std::string& kernel,
                                             const std::string& dtype, std::uint32_t head_dim,
                                             bool planned) {
  std::vector<ShapeNumbers> numbers;
  const TunedKernel tuned = RequireTunedKernel(kernel, dtype, head_dim, planned);
  for (const KernelShape& shape : TunableShapes(tuned, Runtime::Get().Acquire(device)->traits())) {
    numbers.push_back(NumbersOf(shape));
  }
  return numbers;
}

std::vector<TuningEntry> TuningEntries(std::uint32_t device) {
  std::vector<TuningEntry> entries;
  const DeviceTraits traits = Runtime::Get().Acquire(device)->traits();
  for (const auto& [tuned, numbers] : traits.tuning->shapes) {
    entries.emplace_back(KernelName(tuned.kernel), kDtypeNames[tuned.dtype], tuned.head_dim,
                         tuned.planned, numbers);
  }
  return entries;
}

void SetTuning(std::uint32_t device, const std::vector<TuningEntry>& entries) {
  const auto context = Runtime::Get().Acquire(device);
  const DeviceTraits traits = context->traits();
  Tuning tuning;
  for (const auto& [kernel, dtype, head_dim, planned, numbers] : entries) {
    const TunedKernel tuned = RequireTunedKernel(kernel, dtype, head_dim, planned);
    if (!CanRun(tuned, numbers, traits)) {
      throw std::invalid_argument(
          Concat("the kernel '", kernel, "' of ", dtype, " and head_dim ", head_dim,
                 " has no such shape on this device: take one of kernel_shapes()"));
    }
    tuning.shapes[tuned] = numbers;
  }
  context->SetTuning(std::move(tuning));
}

std::string TuningFile(std::uint32_t device) {
  const auto context = Runtime::Get().Acquire(device);
  return TuningPath(context->device().physical()).string();
}

}  // namespace

void AddTuning(nb::module_& m) {
  m.def("kernel_shapes", KernelShapeNumbers, nb::arg("device"), nb::arg("kernel"), nb::arg("dtype"),
        nb::arg("head_dim"), nb::arg("planned"), ReleaseGil());
  m.def("tuning", TuningEntries, nb::arg("device"), ReleaseGil());
  m.def("set_tuning", SetTuning, nb::arg("device"), nb::arg("entries"), ReleaseGil());
  m.def(
      "save_tuning", [](std::uint32_t device) { Runtime::Get().Acquire(device)->SaveTuning(); },
      nb::arg("device"), ReleaseGil());
  m.def("tuning_path", TuningFile, nb::arg("device"), ReleaseGil());
}

}  // namespace jax_aat
