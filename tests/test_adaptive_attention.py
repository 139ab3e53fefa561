"""Adaptive attention in jax.numpy: random levels against the dense oracle, transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import TOLERANCE, as_users_compile, assert_close, in_float64, normal
from jax.test_util import check_grads

from jax_aat import arguments, primitives
from jax_aat.boundary import boundary
from jax_aat.levels import Grid, pack_levels
from jax_aat.lists import Capacity, pack
from jax_aat.problem import Slot
from jax_aat.reference import dense_adaptive_attention

FLOATS = (Slot.Q, Slot.K, Slot.V, Slot.COARSE_K, Slot.COARSE_V, Slot.LEVEL_BIAS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, options, shapes of bias and mask, which other operands there are."""

    queries: int = 50
    keys: int = 90
    heads: int = 4
    kv_heads: int = 2
    query_tile: int = 16
    super_tile: int = 256
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    lengths: bool = False
    segments: bool = False
    options: tuple = ()


CAUSAL = ("is_causal", True)
CASES = {
    "lengths": Case(keys=1100, heads=2, query_tile=32, super_tile=1024, lengths=True),
    "causal": Case(queries=150, keys=150, heads=8, kv_heads=1, query_tile=32, options=(CAUSAL,)),
    "bias of queries": Case(
        queries=40, keys=1300, bias=(1, 4, 40, 1), options=(CAUSAL, ("logits_soft_cap", 1.5))
    ),
    "window": Case(queries=120, keys=130, heads=6, options=(("local_window_size", (60, 9)),)),
    "mask": Case(mask=(1, 4, 50, 90), segments=True),
    "bias": Case(bias=(2, 1, 50, 90)),
    "one query, one key": Case(queries=1, keys=1),
    "everything": Case(
        queries=90,
        mask=(2, 1, 90, 90),
        bias=(1, 4, 90, 1),
        lengths=True,
        segments=True,
        options=(CAUSAL, ("logits_soft_cap", 2.0)),
    ),
}


@functools.partial(jax.jit, static_argnames=("options", "grid"))
def planned(level, operands, options, grid):
    """Levels that keep to the boundary, packed, and the lists of these."""
    bounds = boundary(operands, options, grid)
    level = bounds.applied(level, drops=True)
    words = pack_levels(level)
    capacity = Capacity.of(grid, options.causal, options.window)
    return level, words, pack(words, bounds.full, grid, capacity)


class Call:
    """A case with a random levels map that keeps to its boundary."""

    def __init__(self, case: Case, rng: np.random.Generator, dtype: str = "float32"):
        q = normal(rng, 2, case.queries, case.heads, 8, dtype=dtype)
        k, v = (normal(rng, 2, case.keys, case.kv_heads, 8, dtype=dtype) for _ in range(2))
        options = dict(case.options)
        if case.bias:
            # Constant over most granules, so that these may be coarse.
            blocks = -(-case.bias[-1] // 16)
            bias = np.repeat(rng.normal(size=(*case.bias[:-1], blocks)), 16, -1)
            options["bias"] = jnp.asarray(bias[..., : case.bias[-1]], dtype)
        if case.mask:
            blocks = -(-case.mask[-1] // 16)
            mask = np.repeat(rng.random((*case.mask[:-1], blocks)) < 0.9, 16, -1)
            mask[..., :8, :] = True
            options["mask"] = jnp.asarray(mask[..., : case.mask[-1]])
        if case.lengths:
            options["query_seq_lengths"] = jnp.array([case.queries, case.queries // 2])
            options["key_value_seq_lengths"] = jnp.array([case.keys // 2, case.keys - 3])
        if case.segments:
            options["query_segment_ids"] = jnp.asarray(
                np.sort(rng.integers(0, 2, (2, case.queries)))
            )
            options["key_value_segment_ids"] = jnp.asarray(
                np.sort(rng.integers(0, 2, (2, case.keys)))
            )
        self.arguments = options
        checked = arguments.check(
            q, k, v, options.get("bias"), options.get("mask"), **self._every_option()
        )
        lengths, heads = (case.queries, case.keys), (case.heads, case.kv_heads)
        self.grid = Grid(*lengths, *heads, case.query_tile, case.super_tile)
        self.options = checked.options.planned(self.grid)
        shape = (2, self.grid.lists, self.grid.tiles, self.grid.granules)
        level = jnp.asarray(rng.integers(0, 4, shape))
        self.level, words, lists = planned(level, checked.operands, self.options, self.grid)
        rows = (2, self.grid.coarse_rows, case.kv_heads, 8)
        self.operands = checked.operands | {
            Slot.COARSE_K: normal(rng, *rows, dtype=dtype),
            Slot.COARSE_V: normal(rng, *rows, dtype=dtype),
            Slot.LEVEL_BIAS: normal(rng, 2, case.queries, case.heads, 2),
            Slot.LEVELS: words,
        }
        slots = (Slot.LIST_HEADERS, Slot.LIST_ENTRIES, Slot.KEY_LIST_HEADERS, Slot.KEY_LIST_ENTRIES)
        self.operands |= dict(zip(slots, lists, strict=True))
        self.slots = (*FLOATS, *((Slot.BIAS,) if case.bias else ()))
        self.arrays = tuple(self.operands[slot] for slot in self.slots)

    def _every_option(self):
        names = (
            *("scale", "is_causal", "query_seq_lengths", "key_value_seq_lengths"),
            *("local_window_size", "query_segment_ids", "key_value_segment_ids"),
            "logits_soft_cap",
        )
        given = {name: self.arguments.get(name) for name in names}
        return given | {"is_causal": bool(given["is_causal"])}

    def ours(self, *arrays):
        operands = self.operands | dict(zip(self.slots, arrays, strict=True))
        return primitives.forward(operands, self.options, "xla")

    def dense(self, q, k, v, coarse_k, coarse_v, level_bias, bias=None):
        return dense_adaptive_attention(
            q,
            k,
            v,
            bias,
            self.arguments.get("mask"),
            coarse_key=coarse_k,
            coarse_value=coarse_v,
            level_bias=level_bias,
            levels=self.operands[Slot.LEVELS],
            query_tile=self.grid.query_tile,
            super_tile=self.grid.super_tile,
            **self._every_option(),
        )


def loss(attention):
    """A scalar that is curved in all results."""

    def function(*arrays):
        out, lse, shares = attention(*arrays)
        lse = jnp.where(lse < -1e30, 0, lse)
        return (jnp.sin(out) * jnp.cos(lse)[..., None]).sum() + jnp.sin(2 * shares).sum()

    return function


def everything(attention, arrays, tangents):
    every = tuple(range(len(arrays)))
    return (
        attention(*arrays),
        jax.jvp(attention, arrays, tangents)[1],
        jax.grad(loss(attention), every)(*arrays),
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES] + [("causal", "float16"), ("everything", "bfloat16")],
)
def test_agrees_with_the_oracle(name, dtype, rng):
    call = Call(CASES[name], rng, dtype)
    tangents = tuple(normal(rng, *x.shape, dtype=x.dtype) for x in call.arrays)
    result = jax.jit(functools.partial(everything, call.ours))(call.arrays, tangents)
    count = len(call.arrays)

    def flat(*values):
        return everything(call.dense, values[:count], values[count:])

    expected = in_float64(flat, *call.arrays, *tangents)
    assert_close(result[0], expected[0], TOLERANCE[dtype][0])
    assert_close(result[1:], expected[1:], TOLERANCE[dtype][1])


def test_nan_beyond_the_lengths_is_not_read(rng):
    """Nor in tangents, by any pass."""
    call = Call(Case(queries=40, keys=70, lengths=True, options=(CAUSAL,)), rng)
    tangents = tuple(normal(rng, *x.shape) for x in call.arrays)
    lengths = {
        Slot.Q: call.operands[Slot.Q_LENGTHS],
        Slot.K: call.operands[Slot.KV_LENGTHS],
        Slot.V: call.operands[Slot.KV_LENGTHS],
    }

    def spoiled(arrays):
        changed = []
        for slot, x in zip(call.slots, arrays, strict=True):
            length = lengths.get(slot, jnp.full(2, x.shape[1]))
            beyond = jnp.arange(x.shape[1]) >= length[:, None]
            changed.append(jnp.where(beyond[..., None, None], jnp.nan, x))
        return tuple(changed)

    both = jax.jit(functools.partial(everything, call.ours))
    assert all(bool(jnp.isnan(x).any()) for x in spoiled(call.arrays)[:3])
    assert_close(both(spoiled(call.arrays), spoiled(tangents)), both(call.arrays, tangents), 1e-6)


def test_every_level_is_exercised(rng):
    found = set()
    for case in CASES.values():
        found |= set(np.unique(Call(case, rng).level).tolist())
    assert found == {0, 1, 2, 3}


def test_check_grads_of_order_two(rng):
    with jax.enable_x64(True):
        call = Call(
            Case(queries=9, keys=35, heads=2, kv_heads=1, options=(("logits_soft_cap", 2.0),)),
            rng,
            "float64",
        )
        arrays = tuple(jnp.asarray(np.asarray(x), jnp.float64) for x in call.arrays)
        check_grads(jax.jit(loss(call.ours)), arrays, order=2, modes=("fwd", "rev"))


def test_second_order(rng):
    call = Call(CASES["bias"], rng)
    tangents = tuple(normal(rng, *x.shape) for x in call.arrays)
    every, count = tuple(range(len(call.arrays))), len(call.arrays)

    def products(attention, *values):
        f, xs, ts = loss(attention), values[:count], values[count:]
        return jax.jvp(jax.grad(f, every), xs, ts)[1], jax.vjp(jax.grad(f, every), *xs)[1](ts)

    expected = in_float64(functools.partial(products, call.dense), *call.arrays, *tangents)
    result = jax.jit(functools.partial(products, call.ours))(*call.arrays, *tangents)
    assert_close(result, expected, 1e-4)


def test_vmap_equals_a_loop(rng):
    """Over operands, over the plan."""
    first, second = Call(CASES["bias"], rng), Call(CASES["bias"], rng)

    def gradients(floats, plan):
        def attention(*arrays):
            operands = first.operands | plan | dict(zip(first.slots, arrays, strict=True))
            return primitives.forward(operands, first.options, "xla")

        every = tuple(range(len(floats)))
        return attention(*floats), jax.grad(loss(attention), every)(*floats)

    plans = [{s: c.operands[s] for s in c.operands if s >= Slot.LEVELS} for c in (first, second)]
    floats = [first.arrays, second.arrays]
    alone = jax.jit(gradients)
    stack = functools.partial(jax.tree.map, lambda *xs: jnp.stack(xs))
    for axes in ((0, None), (None, 0)):
        given = [
            stack(*xs) if axis == 0 else xs[0]
            for xs, axis in zip((floats, plans), axes, strict=True)
        ]
        result = as_users_compile(jax.vmap(gradients, axes))(*given)
        looped = [
            alone(
                *(
                    xs[i] if axis == 0 else xs[0]
                    for xs, axis in zip((floats, plans), axes, strict=True)
                )
            )
            for i in range(2)
        ]
        assert_close(result, stack(*looped), 1e-5)
