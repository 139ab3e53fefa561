"""Values, tangents and gradients of `tiled_attention` against the dense float64 oracle."""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import (
    TOLERANCE,
    Ran,
    assert_close,
    assert_same_bits,
    in_float64,
    normal,
    oracle,
    relative_error,
)
from conftest import SEED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_aat import tiled_attention, tiled_xla
from jax_aat.problem import EMPTY_LOGSUMEXP, Options, Slot
from jax_aat.reference import dense_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, options, shapes of bias and mask, which other operands there are."""

    batch: int = 2
    queries: int = 37
    keys: int = 53
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    lengths: bool = False
    segments: bool = False
    options: tuple[tuple[str, Any], ...] = ()


CAUSAL = ("is_causal", True)
CASES = {
    "plain": Case(),
    "one key/value head": Case(kv_heads=1, head_dim=7),
    "one query": Case(queries=1, head_dim=32, heads=2),
    "one key": Case(keys=1, heads=2),
    "causal": Case(queries=70, keys=70, heads=3, kv_heads=3, options=(CAUSAL,)),
    "causal, more queries than keys": Case(queries=65, keys=17, options=(CAUSAL,)),
    "window": Case(queries=50, keys=60, options=(("local_window_size", (9, 4)),)),
    "causal window": Case(queries=90, keys=90, options=(CAUSAL, ("local_window_size", 5))),
    "bias": Case(bias=(2, 4, 37, 53)),
    "bias of keys": Case(bias=(1, 4, 1, 53), heads=4, kv_heads=4, head_dim=1),
    "bias of queries": Case(bias=(2, 1, 37, 1), options=(("scale", -0.3),)),
    "mask": Case(mask=(2, 1, 37, 53)),
    "mask of heads": Case(mask=(1, 4, 1, 53), options=(("scale", 0.7),)),
    "lengths": Case(lengths=True),
    "segments": Case(segments=True, options=(CAUSAL,), queries=53),
    "soft cap": Case(options=(("logits_soft_cap", 1.5), ("scale", 1.0))),
    "everything": Case(
        queries=53,
        heads=6,
        bias=(1, 6, 53, 53),
        mask=(2, 6, 53, 53),
        lengths=True,
        segments=True,
        options=(CAUSAL, ("local_window_size", (30, 3)), ("logits_soft_cap", 3.0)),
    ),
}
HALF_PRECISION = ("plain", "causal", "everything")


@functools.cache
def arrays_and_options(case: Case, dtype: str) -> tuple[tuple, dict]:
    """Fresh operands (q, k, v, then bias if there is one) and the keyword arguments of a case."""
    rng = np.random.default_rng([SEED, zlib.crc32(repr(case).encode())])
    kv_shape = (case.batch, case.keys, case.kv_heads, case.head_dim)
    arrays = [
        normal(rng, case.batch, case.queries, case.heads, case.head_dim, dtype=dtype),
        normal(rng, *kv_shape, dtype=dtype),
        normal(rng, *kv_shape, dtype=dtype),
    ]
    options = dict(case.options)
    if case.bias:
        arrays.append(normal(rng, *case.bias, dtype=dtype))
    if case.mask:
        options["mask"] = rng.random(case.mask) < 0.6
    if case.lengths:
        options["query_seq_lengths"] = rng.integers(0, case.queries + 1, case.batch)
        options["key_value_seq_lengths"] = rng.integers(0, case.keys + 1, case.batch)
    if case.segments:
        sizes = {"query": case.queries, "key_value": case.keys}
        for name, size in sizes.items():
            ids = np.sort(rng.integers(0, 3, (case.batch, size)))
            options[f"{name}_segment_ids"] = ids.astype(np.int32)
    return tuple(arrays), options


def derivatives(attention):
    """(results, tangents, gradients) of attention(*arrays) -> (out, logsumexp)."""

    def everything(arrays, tangents, cotangents):
        results, moved = jax.jvp(attention, arrays, tangents)
        gradients = jax.vjp(attention, *arrays)[1](cotangents)
        return results, moved, gradients

    return everything


def directions(case: Case, dtype: str) -> tuple[tuple, tuple]:
    """Tangents of the operands and cotangents of the results; none where no key is seen."""
    arrays, _ = arrays_and_options(case, dtype)
    rng = np.random.default_rng([SEED, 1, zlib.crc32(repr(case).encode())])
    tangents = tuple(normal(rng, *x.shape, dtype=dtype) for x in arrays)
    out, lse = reference(case, dtype)[0]
    seen = lse > EMPTY_LOGSUMEXP / 2
    dout = normal(rng, *out.shape, dtype=dtype)
    return tangents, (dout, jnp.where(seen, normal(rng, *lse.shape), 0).astype(dtype))


def attention_of(case: Case, dtype: str, function):
    """`function` of a case's arrays alone."""
    _, options = arrays_and_options(case, dtype)

    def attention(q, k, v, *bias):
        return function(q, k, v, *bias, **options)

    return attention


@functools.cache
def reference(case: Case, dtype: str) -> Any:
    """(results,) in float64."""
    arrays, _ = arrays_and_options(case, dtype)
    return (in_float64(attention_of(case, dtype, dense_attention), *arrays),)


@functools.cache
def reference_derivatives(case: Case, dtype: str) -> Any:
    """(results, tangents, gradients) in float64."""
    arrays, _ = arrays_and_options(case, dtype)
    tangents, cotangents = directions(case, dtype)
    count = len(arrays)

    def flat(*values):
        attention = attention_of(case, dtype, dense_attention)
        groups = values[:count], values[count : 2 * count], values[2 * count :]
        return derivatives(attention)(*groups)

    return in_float64(flat, *arrays, *tangents, *cotangents)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES]
    + [(name, dtype) for dtype in ("float16", "bfloat16") for name in HALF_PRECISION],
)
def test_agrees_with_the_oracle(name, dtype, implementation):
    case = CASES[name]
    arrays, _ = arrays_and_options(case, dtype)
    attention = attention_of(
        case,
        dtype,
        functools.partial(tiled_attention, implementation=implementation, return_residual=True),
    )
    with Ran(implementation, "forward", "tangent", "backward"):
        results, tangents, gradients = jax.block_until_ready(
            jax.jit(derivatives(attention))(arrays, *directions(case, dtype))
        )
    assert results[0].dtype == results[1].dtype == jnp.dtype(dtype)
    expected = reference_derivatives(case, dtype)
    out, lse = results
    # logsumexp is rounded to the dtype, in which that of an empty row may not exist.
    lowest = float(jnp.finfo(dtype).min)
    assert_close(out, expected[0][0], TOLERANCE[dtype][0])
    assert_close(lse, np.maximum(expected[0][1], lowest), TOLERANCE[dtype][0])
    assert_close(tangents, expected[1], TOLERANCE[dtype][1])
    assert_close(gradients, expected[2], TOLERANCE[dtype][1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_is_as_exact_as_naive_attention(dtype, implementation):
    """At most twice the error of attention computed by its definition in the same precision."""
    case = dataclasses.replace(CASES["causal"], bias=(1, 3, 70, 70))
    (q, k, v, bias), _ = arrays_and_options(case, dtype)

    def naive(q, k, v, bias):
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(seen, logits + bias, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    def ours(*arrays):
        return tiled_attention(*arrays, is_causal=True, implementation=implementation)

    def with_gradients(attention):
        def function(*arrays):
            out, pull = jax.vjp(attention, *arrays)
            return out, *pull(jnp.cos(out))

        return function

    def exact(*arrays):
        return with_gradients(lambda *xs: dense_attention(*xs, is_causal=True)[0])(*arrays)

    expected = in_float64(exact, q, k, v, bias)
    reached = [
        [relative_error(x, e) for x, e in zip(values, expected, strict=True)]
        for values in (
            jax.jit(with_gradients(ours))(q, k, v, bias),
            jax.jit(with_gradients(naive))(q, k, v, bias),
        )
    ]
    # In float32 both are at the rounding of the last operation, where chance decides.
    floor = 1e-6 if dtype == "float32" else 0
    assert all(a <= 2 * max(b, floor) for a, b in zip(*reached, strict=True)), reached


@pytest.mark.parametrize("batched", [True, False])
def test_is_a_drop_in_for_jax_nn(batched, implementation, rng):
    q, k, v = normal(rng, 2, 9, 4, 8), normal(rng, 2, 11, 2, 8), normal(rng, 2, 11, 2, 8)
    bias, mask = normal(rng, 4, 9, 11), jnp.asarray(rng.random((9, 11)) < 0.8).at[:, 0].set(True)
    lengths = {
        "query_seq_lengths": jnp.array([9, 4], jnp.int32),
        "key_value_seq_lengths": jnp.array([3, 11], jnp.int32),
    }
    if not batched:
        q, k, v, lengths = q[0], k[0], v[0], jax.tree.map(lambda x: x[:1], lengths)
    common = dict(scale=0.5, is_causal=True, local_window_size=8, return_residual=True, **lengths)
    expected = jax.nn.dot_product_attention(q, k, v, bias, mask, **common)
    result = tiled_attention(q, k, v, bias, mask, implementation=implementation, **common)
    # JAX gives rows after query_seq_lengths a logsumexp as if they saw every key.
    valid = np.arange(9) < np.asarray(lengths["query_seq_lengths"])[:, None]
    valid = valid if batched else valid[0]
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert_close(np.asarray(ours)[valid], np.asarray(theirs)[valid], 1e-6)
    assert_close(result[0], expected[0], 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_that_see_nothing(dtype, implementation, rng):
    q, k, v = (normal(rng, 1, 20, 2, 16, dtype=dtype) for _ in range(3))
    mask = jnp.ones((1, 1, 20, 20), bool).at[:, :, 3].set(False)

    @functools.partial(jax.grad, argnums=(0, 1, 2, 3), has_aux=True)
    def gradients(q, k, v, bias):
        out, lse = tiled_attention(
            q, k, v, bias, mask, implementation=implementation, return_residual=True
        )
        return (out.astype(jnp.float32) ** 2).sum() + lse[:, 3].astype(jnp.float32).sum(), (
            out,
            lse,
        )

    (dq, dk, dv, dbias), (out, lse) = gradients(q, k, v, jnp.zeros((1, 2, 20, 20), dtype))
    assert not any(x.any() for x in (out[:, 3], dq[:, 3], dbias[:, :, 3]))
    lowest = max(EMPTY_LOGSUMEXP, float(jnp.finfo(dtype).min))
    assert_close(lse[:, 3], np.full((1, 2), lowest), TOLERANCE[dtype][0])
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (lse, dq, dk, dv, dbias))
    assert all(x.any() for x in (out[:, 2], dq[:, 2], dbias[:, :, 2]))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "heads"])
def test_axes_of_size_zero(empty, implementation):
    sizes = {"batch": 2, "queries": 3, "keys": 5, "heads": 2} | {empty: 0}
    q = jnp.ones((sizes["batch"], sizes["queries"], sizes["heads"], 4))
    k = jnp.ones((sizes["batch"], sizes["keys"], sizes["heads"], 4))

    def loss(q, k, v):
        out, lse = tiled_attention(q, k, v, implementation=implementation, return_residual=True)
        return out.sum() + lse.sum(), (out, lse)

    gradients, (out, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, k)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]
    assert not any(x.any() for x in (out, *gradients))
    if empty == "keys":
        np.testing.assert_array_equal(lse, np.float32(EMPTY_LOGSUMEXP))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "heads"])
def test_second_derivatives_of_axes_of_size_zero(empty, implementation):
    sizes = {"batch": 2, "queries": 3, "keys": 5, "heads": 2} | {empty: 0}
    q = jnp.ones((sizes["batch"], sizes["queries"], sizes["heads"], 4))
    k = jnp.ones((sizes["batch"], sizes["keys"], sizes["heads"], 4))

    def loss(q, k):
        return jnp.square(tiled_attention(q, k, k, implementation=implementation)).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    forward_over_reverse = jax.jvp(gradients, (q, k), (q, k))[1]
    reverse_over_reverse = jax.vjp(gradients, q, k)[1]((q, k))
    reverse_over_forward = jax.grad(lambda *xs: jax.jvp(loss, xs, (q, k))[1], argnums=(0, 1))(q, k)
    for found in (forward_over_reverse, reverse_over_reverse, reverse_over_forward):
        assert [x.shape for x in found] == [q.shape, k.shape]
        assert not any(x.any() for x in found)


def test_nan_stays_in_its_own_row(implementation, rng):
    q, k, v = (normal(rng, 1, 40, 2, 16) for _ in range(3))
    attention = functools.partial(tiled_attention, is_causal=True, implementation=implementation)
    clean = attention(q, k, v)
    out = attention(q.at[0, 7, 1].set(jnp.nan), k, v)
    assert np.isnan(out[0, 7, 1]).all()
    assert_same_bits(out.at[0, 7, 1].set(clean[0, 7, 1]), clean)


HIDDEN = {
    "causal": {"is_causal": True},
    "lengths": {
        "query_seq_lengths": np.array([31], np.int32),
        "key_value_seq_lengths": np.array([31], np.int32),
    },
    "mask": {"mask": np.outer(np.arange(40) < 31, np.arange(40) < 31)},
}


def nan_rows(x) -> list[int]:
    """Which rows [1, rows, heads, ...] of head 1 are NaN; none of head 0 is."""
    spoiled = np.isnan(np.asarray(x)).reshape(*x.shape[:3], -1)
    assert not spoiled[:, :, 0].any()
    assert (spoiled.any(-1) == spoiled.all(-1)).all()
    return np.flatnonzero(spoiled[0, :, 1].all(-1)).tolist()


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_is_not_finite_reaches_what_sees_it(hidden, implementation, rng):
    """Of a query row, key, value, tangent or cotangent, in all results; the rest is as without."""
    names = ("q", "k", "v", "dq", "dk", "dv", "dout")
    results = ("out", "lse", "moved", "dlse", *"QKV")
    arrays = {name: normal(rng, 1, 40, 2, 16) for name in names}
    attention = functools.partial(
        tiled_attention, implementation=implementation, return_residual=True, **HIDDEN[hidden]
    )

    @jax.jit
    def everything(q, k, v, dq, dk, dv, dout):
        (out, lse), (moved, dlse) = jax.jvp(attention, (q, k, v), (dq, dk, dv))
        _, pull = jax.vjp(lambda *xs: attention(*xs)[0], q, k, v)
        gradients = pull(dout)
        return dict(zip(results, (out, lse, moved, dlse, *gradients), strict=True))

    clean = everything(**arrays)
    rows, none = list(range(40)), []
    if hidden == "causal":
        # Row 35 sees keys up to 35; key 20 is seen by row 20 and later ones, which see all keys.
        query, seen, key, others = [35], rows[:36], rows[20:], rows
    else:
        query = seen = key = others = none
    expected = {
        "q": dict.fromkeys(results, query) | dict.fromkeys("KV", seen),
        "k": dict.fromkeys(results, key) | dict.fromkeys("KV", others),
        "v": dict.fromkeys(("out", "moved", "Q"), key) | {"K": others},
        "dq": dict.fromkeys(("moved", "dlse"), query),
        "dk": dict.fromkeys(("moved", "dlse"), key),
        "dv": {"moved": key},
        "dout": {"Q": query} | dict.fromkeys("KV", seen),
    }
    for value in (np.nan, np.inf):
        for name, reached in expected.items():
            row = 35 if hidden != "causal" or name in ("q", "dq", "dout") else 20
            changed = arrays | {name: arrays[name].at[0, row, 1].set(value)}
            for result, x in everything(**changed).items():
                if np.isnan(value):
                    assert nan_rows(x) == reached.get(result, none), (name, result)
                kept = np.ones(40, bool)
                kept[reached.get(result, none)] = False
                assert_close(x[:, kept], clean[result][:, kept], 1e-6)


def assert_sharp(attention, arrays, scale: float) -> None:
    """Holds results and gradients of large logits to those of float64.

    A logit near 1e5 is known to 1e5 * 2**-24, and so is the logarithm of a weight. The gradients of
    rows that one key has alone are 0: what is left of them is the rounding of a difference.
    """
    cotangent = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)

    def with_gradients(function):
        def everything(cotangent, *arrays):
            (out, lse), pull = jax.vjp(function, *arrays)
            return out, lse, *pull((cotangent, jnp.zeros_like(lse)))

        return everything

    out, lse, *gradients = jax.jit(with_gradients(attention))(cotangent, *arrays)
    dense = functools.partial(dense_attention, scale=scale)
    expected = in_float64(with_gradients(dense), cotangent, *arrays)
    tolerance = 2e-5 if abs(scale) < 1e-3 else 2e-2
    assert_close(out, expected[0], tolerance)
    assert_close(lse, expected[1], 2e-5)
    sizes = [float(np.linalg.norm(x)) for x in (cotangent, *arrays[:3])]
    rounding = [abs(scale) * sizes[0] * size for size in (sizes[2], sizes[1])]
    for found, exact, size in zip(gradients, expected[2:], (*rounding, 0, sizes[0]), strict=False):
        error = np.linalg.norm(np.asarray(found, np.float64) - exact)
        assert error <= tolerance * np.linalg.norm(exact) + 1e-6 * size


def test_extreme_logits(implementation, rng):
    q, k, v = (normal(rng, 1, 33, 2, 16) for _ in range(3))
    bias = jnp.where(jnp.asarray(rng.random((1, 2, 33, 33)) < 0.3), -jnp.inf, 0.0)
    bias = bias.at[..., 0].set(0)
    for scale in (1e4, -1e4, 1e-6, 1e9, -1e9):
        attention = functools.partial(
            tiled_attention, scale=scale, implementation=implementation, return_residual=True
        )
        assert_sharp(attention, (q, k, v, bias) if abs(scale) < 1e9 else (q, k, v), scale)


@pytest.mark.parametrize("head_dim", [24, 80])
def test_extreme_operands(head_dim, implementation, rng):
    q, k, v = (normal(rng, 1, 33, 2, head_dim) for _ in range(3))
    attention = functools.partial(
        tiled_attention, implementation=implementation, return_residual=True
    )
    assert_sharp(attention, (q * 3e4, k * 3e4, v), head_dim**-0.5)


def test_extreme_soft_cap(implementation, rng):
    """A cap so large that a logit near it is known to many units only."""
    q, k, v = (normal(rng, 1, 33, 2, 24) for _ in range(3))
    options = {"scale": 1e12, "logits_soft_cap": 3e13}
    out = tiled_attention(q, k, v, implementation=implementation, **options)
    assert_close(out, oracle(q, k, v, **options)[0], 2e-2)


def test_same_bits_every_time(implementation, rng):
    q, k, v = normal(rng, 2, 70, 4, 16), normal(rng, 2, 90, 2, 16), normal(rng, 2, 90, 2, 16)
    bias = normal(rng, 1, 4, 1, 90)

    def gradients(*arrays):
        loss = lambda *xs: jnp.square(  # noqa: E731
            tiled_attention(*xs, is_causal=True, implementation=implementation)
        ).sum()
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    compiled = jax.jit(gradients)
    first = compiled(q, k, v, bias)
    for _ in range(5):
        assert_same_bits(compiled(q, k, v, bias), first)
    assert_close(gradients(q, k, v, bias), first, 1e-5)  # without jit


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shapes(implementation, data):
    draw = data.draw
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    case = Case(
        batch=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 90)),
        keys=draw(st.integers(1, 90)),
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 33])),
        lengths=draw(st.booleans()),
        segments=draw(st.booleans()),
        options=(("is_causal", draw(st.booleans())),),
    )
    (q, k, v), options = arrays_and_options(case, "float32")
    out = tiled_attention(q, k, v, implementation=implementation, **options)
    assert_close(out, oracle(q, k, v, **options)[0], TOLERANCE["float32"][0])


def test_float64_by_xla(rng):
    with jax.enable_x64(True):
        q, k, v = (normal(rng, 1, 30, 2, 8, dtype="float64") for _ in range(3))
        out, lse = tiled_attention(q, k, v, is_causal=True, return_residual=True)
        assert out.dtype == lse.dtype == jnp.float64
        assert_close((out, lse), oracle(q, k, v, is_causal=True), TOLERANCE["float64"][0])


@pytest.mark.parametrize("tile", [(16, 16), (7, 64), (64, 5)])
def test_tiles_of_any_size(tile, rng):
    """The passes in jax.numpy over many tiles equal those over one."""
    q, k, v = normal(rng, 2, 40, 4, 8), normal(rng, 2, 48, 2, 8), normal(rng, 2, 48, 2, 8)
    operands = {Slot.Q: q, Slot.K: k, Slot.V: v, Slot.BIAS: normal(rng, 1, 4, 40, 1)}
    options = Options(scale=0.4, causal=True, window=(20, 3), soft_cap=2.0)
    out, lse = tiled_xla.forward(operands, options)
    assert_close(tiled_xla.forward(operands, options, tile), (out, lse), 1e-6)
    known = operands | {Slot.OUT: out, Slot.LSE: lse}
    along = {Slot.DQ: q, Slot.DK: k, Slot.DV: v, Slot.DBIAS: operands[Slot.BIAS]}
    moved = tiled_xla.tangent(known | along, options)
    assert_close(tiled_xla.tangent(known | along, options, tile), moved, 1e-5)
    wanted, against = tuple(along), {Slot.DOUT: q, Slot.DLSE: lse}
    pulled = tiled_xla.backward(known | against, options, wanted, (1, 4, 40, 1))
    some = tiled_xla.backward(known | against, options, wanted, (1, 4, 40, 1), tile)
    assert_close(some, pulled, 1e-5)


def test_many_tiles_by_xla(rng):
    q, k, v = normal(rng, 1, 600, 2, 4), normal(rng, 1, 1100, 1, 4), normal(rng, 1, 1100, 1, 4)
    options = {"local_window_size": (100, 300)}
    out = tiled_attention(q, k, v, implementation="xla", **options)
    assert_close(out, oracle(q, k, v, **options)[0], TOLERANCE["float32"][0])


def test_memory_is_linear_by_xla():
    """Neither pass holds the matrix of logits."""
    shape = jax.ShapeDtypeStruct((1, 8192, 1, 16), jnp.float32)

    def loss(q, k, v):
        return tiled_attention(q, k, v, is_causal=True, implementation="xla").sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape)
    used = compiled.compile().memory_analysis().temp_size_in_bytes
    assert used < 0.2 * 4 * math.prod((8192, 8192))
