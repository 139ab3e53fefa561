// What Python sees of tunings: the shapes of kernels and which of them run.
#pragma once

#include <nanobind/nanobind.h>

namespace jax_aat {

void AddTuning(nanobind::module_& module);

}  // namespace jax_aat
