"""What `implementation=None` takes."""

import jax
import jax.numpy as jnp
import pytest
from comparison import Ran, assert_close, normal
from jax import export
from test_transformations import CHECKS

from jax_aat import Adaptation, tiled_attention, vulkan
from jax_aat.primitives import rules

LENGTH, HEADS = 48, 2
PAIRS = HEADS * LENGTH**2  # of one batch entry


@pytest.fixture(autouse=True)
def any_device_counts(monkeypatch, set_traced):
    """As if this device were a GPU, and calls of up to two batch entries short on this platform."""
    monkeypatch.setattr(vulkan, "_HARDWARE", (vulkan.default_device().kind,))
    set_traced(rules, "SHORT_CALLS", {rules.lowered_platform(): 2 * PAIRS})


def operands(rng, batch):
    return [normal(rng, batch, LENGTH, HEADS, 16) for _ in range(3)]


def attend(q, k, v):
    return tiled_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(("batch", "chosen"), [(1, "xla"), (2, "xla"), (3, "vulkan")])
def test_short_calls_are_left_to_xla(batch, chosen, rng):
    x = operands(rng, batch)
    with Ran(chosen, "forward"):
        out = jax.block_until_ready(jax.jit(attend)(*x))
    with Ran(chosen, "backward"):
        gradient = jax.block_until_ready(jax.jit(jax.grad(lambda *x: attend(*x).sum()))(*x))
    expected = tiled_attention(*x, is_causal=True, implementation="xla")
    assert_close(out, expected, 2e-5)
    assert gradient.shape == out.shape


def test_many_steps_are_left_to_vulkan(rng):
    """A query of a long cache is few pairs, which XLA walks one block after another."""
    q, k, v = normal(rng, 1, 1, 1, 16), *(normal(rng, 1, 4500, 1, 16) for _ in range(2))
    assert 2 * PAIRS >= 4500
    with Ran("vulkan", "forward"):
        jax.block_until_ready(tiled_attention(q, k, v))
    with Ran("xla"):
        jax.block_until_ready(tiled_attention(q, k[:, :4096], v[:, :4096]))


def test_vmap_counts_all_entries(rng):
    x = [jnp.stack([y] * 3) for y in operands(rng, 1)]
    with Ran("vulkan", "forward"):
        out = jax.block_until_ready(jax.jit(jax.vmap(attend))(*x))
    assert_close(out[1], attend(*(y[1] for y in x)), 2e-5)


def test_what_is_asked_for_runs(rng):
    x = operands(rng, 1)
    with Ran("vulkan", "forward"):
        jax.block_until_ready(tiled_attention(*x, implementation="vulkan"))
    with Ran("vulkan", "forward"):
        adaptation = Adaptation(threshold=1e-3)
        jax.block_until_ready(tiled_attention(*x, adaptation=adaptation))


def test_symbolic_lengths_are_not_short(rng):
    shape = export.symbolic_shape("b, 48, 2, 16")
    types = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    exported = export.export(jax.jit(attend), disabled_checks=CHECKS)(*types)
    with Ran("vulkan", "forward"):
        jax.block_until_ready(exported.call(*operands(rng, 1)))
