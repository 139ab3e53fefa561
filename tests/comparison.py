"""What the tests of attention share: inputs, the float64 oracle, tolerances, what ran."""

import os

import jax
import jax.numpy as jnp
import numpy as np

import jax_aat
from jax_aat import hierarchy
from jax_aat.reference import dense_attention

# Relative error against float64: of results, of derivatives.
TOLERANCE = {
    "float64": (1e-12, 1e-12),
    "float32": (2e-5, 1e-4),
    "float16": (1.5e-3, 5e-3),
    "bfloat16": (1e-2, 2e-2),
}


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of what was expected."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    difference = np.linalg.norm(actual - expected)
    scale = np.linalg.norm(expected)
    return float(difference / scale) if scale else float(difference)


def assert_close(actual, expected, tolerance: float) -> None:
    """Compares tree by tree, tensor by tensor."""
    actual_leaves, structure = jax.tree.flatten(actual)
    for i, (a, e) in enumerate(zip(actual_leaves, structure.flatten_up_to(expected), strict=True)):
        error = relative_error(a, e)
        assert error <= tolerance, f"tensor {i}: relative error {error:.3g} > {tolerance:.3g}"


def assert_same_bits(actual, expected) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e), strict=True)


def normal(rng, *shape, dtype="float32") -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def as_users_compile(function):
    """`function`, jitted by XLA's default generator of code, which scripts/test.sh switches off."""
    switched = "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    return jax.jit(
        function, compiler_options={"xla_cpu_use_fusion_emitters": True} if switched else None
    )


def in_fixed_order(function):
    """`function`, jitted to give the same bits also by XLA on a GPU (docs/numerics.md)."""
    on_gpu = jax.default_backend() == "gpu"
    return jax.jit(
        function, compiler_options={"xla_gpu_deterministic_ops": True} if on_gpu else None
    )


def in_float64(function, *args):
    """Result of `function` where floating-point arguments are float64, as NumPy arrays."""
    with jax.enable_x64(True):
        wide = [
            jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for x in args
        ]
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def oracle(*arrays, **options):
    """(out, logsumexp) in float64."""
    names = [name for name, x in options.items() if isinstance(x, jax.Array | np.ndarray)]
    fixed = {name: x for name, x in options.items() if name not in names}

    def attend(*values):
        named = dict(zip(names, values[len(arrays) :], strict=True))
        return dense_attention(*values[: len(arrays)], **fixed, **named)

    return in_float64(attend, *arrays, *(options[name] for name in names))


def look_into(set_attribute, key_tiles: int) -> None:
    """Lets `monkeypatch.setattr` or `set_traced` route as of a long sequence, whatever its length.

    Its tiles look into so many key tiles.
    """
    set_attribute(hierarchy, "JUDGED", key_tiles)
    set_attribute(hierarchy, "JUDGED_WHOLE", 0)


class Ran:
    """Asserts that Vulkan ran exactly what `implementation` says, as a context."""

    def __init__(self, implementation: str, *directions: str):
        self.implementation = implementation
        self.directions = set(directions)

    def __enter__(self):
        self.before = _sequence()
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        count = _sequence() - self.before
        if self.implementation == "xla":
            assert count == 0, f"Vulkan ran {count} calls"
            return
        assert count >= len(self.directions), f"Vulkan ran {count} calls"
        assert jax_aat.last_dispatch().direction in self.directions
        assert jax_aat.last_dispatch().device == jax_aat.default_device().name


def _sequence() -> int:
    dispatch = jax_aat.last_dispatch()
    return 0 if dispatch is None else dispatch.sequence
