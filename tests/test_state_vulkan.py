"""Coarse rows, state and correction by shaders, against the same in jax.numpy for the same plan."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import TOLERANCE, Ran, assert_close, assert_same_bits, normal, relative_error

from jax_aat import Adaptation, TilePlan, adaptive, last_dispatch, primitives, tiled_attention
from jax_aat.problem import Operands, Options, Slot

STATE = ("coarse_rows", "state_covariance", "state_prefix", "state_level_bias")


planned = jax.jit(TilePlan.choose, static_argnames=("options", "adaptation"))


@dataclasses.dataclass
class Case:
    """A call with a plan, whose keys and values vary together inside granules and super-tiles."""

    operands: Operands
    options: Options
    dtype: str

    @classmethod
    def random(
        cls,
        rng,
        queries=1100,
        keys=1100,
        heads=4,
        kv_heads=2,
        head_dim=16,
        batch=1,
        dtype="float32",
        causal=True,
        corrects=True,
        query_tile=64,
        super_tile=1024,
        threshold=None,
        q_lengths=None,
        kv_lengths=None,
    ) -> Case:
        k = normal(rng, batch, keys, kv_heads, head_dim) + 0.5
        v = 0.5 * normal(rng, batch, keys, kv_heads, head_dim) + k - 1
        q = normal(rng, batch, queries, heads, head_dim)
        operands = {
            slot: x.astype(dtype)
            for slot, x in zip((Slot.Q, Slot.K, Slot.V), (q, k, v), strict=True)
        }
        for slot, lengths in ((Slot.Q_LENGTHS, q_lengths), (Slot.KV_LENGTHS, kv_lengths)):
            if lengths is not None:
                operands[slot] = jnp.asarray(lengths, jnp.int32)
        if threshold is None:
            # So that all levels occur; predicted errors are squares of probabilities.
            threshold = 1e-4 if causal else 3e-5 * (1100 / keys) ** 2
        adaptation = Adaptation(threshold=threshold, query_tile=query_tile, super_tile=super_tile)
        options = Options(head_dim**-0.5, causal)
        operands |= planned(operands, options, adaptation).operands()
        grid = adaptation.grid(queries, keys, heads, kv_heads)
        options = dataclasses.replace(options.planned(grid), corrects=corrects)
        return cls(operands, options, dtype)

    @property
    def floats(self) -> Operands:
        return {slot: self.operands[slot] for slot in (Slot.Q, Slot.K, Slot.V)}

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def _attend(options, operands, implementation):
        return primitives.forward(operands, options, implementation)

    def attend(self, implementation: str, floats: Operands | None = None):
        """(out, logsumexp, shares)."""
        return Case._attend(self.options, self.operands | (floats or {}), implementation)


CASES = {
    "causal": dict(queries=2060, keys=2060, heads=2, kv_heads=1),
    "all": dict(causal=False),
    "short": dict(queries=300, keys=300, causal=False, threshold=2.5e-4),
    "fewer_queries": dict(keys=2300),
    "fewer_keys": dict(queries=2200, keys=1040, heads=2, kv_heads=1),
    "lengths": dict(batch=3, causal=False, q_lengths=[1100, 900, 5], kv_lengths=[1080, 600, 3]),
    "lengths_causal": dict(batch=2, q_lengths=[1100, 1050], kv_lengths=[1024, 0]),
    "super_tiles": dict(queries=700, keys=700, super_tile=256),
    "six_heads": dict(heads=6, kv_heads=1, query_tile=16),
    # Lists of tiles of coarse rows are shared, those with means of super-tiles by more workgroups.
    "shared_lists": dict(
        queries=560, keys=2300, heads=31, kv_heads=1, head_dim=8, query_tile=16, causal=False
    ),
    "single_heads": dict(heads=3, kv_heads=3),
    "odd_head": dict(heads=2, kv_heads=1, head_dim=35),
    "wide_head": dict(heads=1, kv_heads=1, head_dim=136),
    "float16": dict(dtype="float16"),
    "bfloat16": dict(dtype="bfloat16", causal=False),
    "odd_float16": dict(dtype="float16", head_dim=20, heads=2, kv_heads=1),
    "means_only": dict(corrects=False, causal=False),
}


@pytest.fixture(params=CASES)
def case(request, rng) -> Case:
    return Case.random(rng, **CASES[request.param])


def assert_all_levels_matter(shares: jax.Array) -> None:
    mean = np.asarray(shares, np.float64).mean((0, 1, 2))
    assert (mean > 0.01).all()
    assert mean.sum() < 0.99


def test_forward(case):
    expected = case.attend("xla")
    assert_all_levels_matter(expected[2])
    with Ran("vulkan", "forward"):
        actual = jax.block_until_ready(case.attend("vulkan"))
    assert_close(actual, expected, TOLERANCE[case.dtype][0])
    # Deterministic.
    assert_same_bits(case.attend("vulkan"), actual)


def test_gradients(case, rng):
    floats = case.floats
    out, lse, _ = case.attend("xla")
    cotangents = (normal(rng, *out.shape, dtype=out.dtype), normal(rng, *lse.shape))

    def gradients(implementation):
        pull = jax.vjp(lambda some: case.attend(implementation, some)[:2], floats)[1]
        return pull(cotangents)[0]

    expected = gradients("xla")
    with Ran("vulkan", "forward", "backward"):
        actual = jax.block_until_ready(gradients("vulkan"))
    assert last_dispatch().kernels[-1].startswith("key_gradients")
    assert_close(actual, expected, TOLERANCE[case.dtype][1])


@pytest.mark.parametrize(
    ("slot", "given"),
    [(Slot.Q, 0), (Slot.Q, 1), (Slot.K, 0), (Slot.K, 1), (Slot.V, 0)],
    ids=str,
)
def test_gradient_of_one_operand(rng, slot, given):
    """From the cotangent of one result, out (0) or logsumexp (1)."""
    case = Case.random(rng, queries=1060, keys=1060, heads=2, kv_heads=1)
    cotangent = normal(rng, 1, 1060, 2, *((16,) if given == 0 else ()))

    def gradient(implementation):
        def loss(x):
            return (case.attend(implementation, {slot: x})[given] * cotangent).sum()

        return jax.grad(loss)(case.operands[slot])

    expected = gradient("xla")
    with Ran("vulkan", "backward"):
        actual = jax.block_until_ready(gradient("vulkan"))
    assert_close(actual, expected, TOLERANCE["float32"][1])


def test_correction_is_not_lost_in_the_tolerance(rng):
    case = Case.random(rng)
    bare = dataclasses.replace(case, options=dataclasses.replace(case.options, corrects=False))
    out, lse, shares = case.attend("vulkan")
    assert all((np.asarray(shares[..., level]) > 0.1).any() for level in range(2))
    for actual, other in zip((out, lse), bare.attend("vulkan"), strict=False):
        assert relative_error(actual, other) > 100 * TOLERANCE["float32"][0]


def test_values_behind_the_length_are_not_read(rng):
    case = Case.random(rng, kv_lengths=[1050], causal=False)
    expected = case.attend("vulkan")
    hidden = {slot: case.operands[slot].at[:, 1050:].set(jnp.nan) for slot in (Slot.K, Slot.V)}
    assert_same_bits(case.attend("vulkan", hidden), expected)


def test_vmap_and_tangents(rng):
    """Along an axis that some operands lack; in forward mode."""
    case = Case.random(rng, **CASES["short"])
    assert_all_levels_matter(case.attend("xla")[2])
    q = jnp.stack([case.operands[Slot.Q]] * 2) * jnp.array([1.0, -1.0])[:, None, None, None, None]

    def passes(implementation):
        def attend(q):
            return case.attend(implementation, {Slot.Q: q})

        return jax.vmap(lambda q: jax.jvp(attend, (q,), (q,)))(q)

    with Ran("vulkan", "forward", "tangent"):
        actual = jax.block_until_ready(passes("vulkan"))
    assert_close(actual, passes("xla"), TOLERANCE["float32"][1])


def test_second_derivatives(rng):
    case = Case.random(rng, queries=200, keys=200, causal=False, threshold=6e-4)
    assert_all_levels_matter(case.attend("xla")[2])

    def curvature(implementation):
        def loss(floats):
            out, lse, shares = case.attend(implementation, floats)
            return jnp.square(out).sum() + jnp.sin(lse).sum() + jnp.square(shares).sum()

        floats = case.floats
        return jax.jvp(jax.grad(loss), (floats,), (floats,))[1], jax.grad(
            lambda x: sum(jnp.square(g).sum() for g in jax.tree.leaves(jax.grad(loss)(x)))
        )(floats)

    with Ran("vulkan", "forward", "tangent", "backward"):
        actual = jax.block_until_ready(curvature("vulkan"))
    assert_close(actual, curvature("xla"), 3 * TOLERANCE["float32"][1])


def test_a_call_is_one_submission(rng, set_traced):
    """Planning, coarse rows, state, attention and correction; XLA multiplies no matrices."""
    set_traced(adaptive, "plans_in_one_submission", lambda *_: True)
    q, k, v = (normal(rng, 1, 2100, heads, 16) for heads in (4, 2, 2))
    options = dict(adaptation=Adaptation(threshold=1e-4), is_causal=True, implementation="vulkan")
    attend = jax.jit(functools.partial(tiled_attention, **options)).lower(q, k, v)
    assert attend.as_text().count("custom_call @jax_aat_") == 1
    assert "dot_general" not in attend.as_text()
    run = attend.compile()
    before = last_dispatch().sequence if last_dispatch() else 0
    jax.block_until_ready(run(q, k, v))
    assert last_dispatch().sequence == before + 1
    names = [name.split(".")[0] for name in last_dispatch().kernels]
    made = tuple(name for name in names if name in STATE)
    # On matrices attention itself makes level biases and corrects.
    on_matrices = "attend_forward_coopmat" in names
    assert made == (STATE[:3] if on_matrices else STATE)
    assert ("state_correction" in names) != on_matrices
    assert {"tile_processor", "cross_tile_router", "plan_lists"} < set(names)
