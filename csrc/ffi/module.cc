// The Python module jax_aat._native.
#include <nanobind/nanobind.h>

NB_MODULE(_native, m) { m.doc() = "Vulkan runtime of jax_aat"; }
