"""The three passes on a Vulkan device, through the bare custom calls, against a float64 oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import EMPTY_LOGSUMEXP, Attention, Problem, relative_error, sum_to

from jax_aat import vulkan
from jax_aat.problem import Slot

# Of the forward pass and of derivatives, relative to the float64 oracle.
TOLERANCE = {"float32": (2e-5, 1e-4), "float16": (1.5e-3, 5e-3), "bfloat16": (1e-2, 2e-2)}

FIELDS = {
    Slot.Q: "q",
    Slot.K: "k",
    Slot.V: "v",
    Slot.BIAS: "bias",
    Slot.MASK: "mask",
    Slot.Q_LENGTHS: "q_lengths",
    Slot.KV_LENGTHS: "kv_lengths",
    Slot.Q_SEGMENTS: "q_segments",
    Slot.KV_SEGMENTS: "kv_segments",
}


def call(direction, problem, operands=None, results=None):
    """Runs one custom call and returns its results by slot, as numpy arrays."""
    given = {slot: getattr(problem, field) for slot, field in FIELDS.items()}
    given = {slot: x for slot, x in given.items() if x is not None} | (operands or {})
    slots, wanted = sorted(given), sorted(results)
    compute = jax.ffi.ffi_call(
        f"jax_aat_{direction}",
        [jax.ShapeDtypeStruct(*results[slot]) for slot in wanted],
    )
    outs = compute(
        *(jnp.asarray(given[slot]) for slot in slots),
        operands=np.uint64(sum(1 << slot for slot in slots)),
        results=np.uint64(sum(1 << slot for slot in wanted)),
        scale=np.float32(problem.scale),
        soft_cap=np.float32(problem.soft_cap),
        causal=np.int32(problem.causal),
        window_left=np.int32(problem.window[0]),
        window_right=np.int32(problem.window[1]),
        query_tile=np.uint32(0),
        super_tile=np.uint32(0),
        level_count=np.uint32(0),
        candidate_share=np.float32(0),
        floor_share=np.float32(0),
        judged_key_tiles=np.uint32(0),
        list_capacity=np.uint32(0),
        corrects=np.uint32(0),
    )
    outs = dict(zip(wanted, (np.asarray(x) for x in outs), strict=True))
    ran = vulkan.last_dispatch()
    assert ran.direction == direction
    assert any(kernel.startswith(f"attend_{direction}") for kernel in ran.kernels)
    return outs


def forward(problem):
    queries, heads, head_dim = problem.q.shape[-3:]
    rows = (*problem.batch, queries, heads)
    results = {Slot.OUT: ((*rows, head_dim), problem.q.dtype), Slot.LSE: (rows, np.float32)}
    outs = call("forward", problem, results=results)
    return outs[Slot.OUT], outs[Slot.LSE]


def tangent(problem, out, logsumexp, along):
    results = {Slot.DOUT: (out.shape, out.dtype), Slot.DLSE: (logsumexp.shape, np.float32)}
    outs = call("tangent", problem, {Slot.OUT: out, Slot.LSE: logsumexp} | along, results)
    return outs[Slot.DOUT], outs[Slot.DLSE]


def backward(problem, out, logsumexp, cotangents, wanted):
    axes = len(problem.batch)
    shapes = {
        Slot.DQ: (problem.batch + problem.q.shape[axes:], problem.q.dtype),
        Slot.DK: (problem.batch + problem.k.shape[axes:], problem.q.dtype),
        Slot.DV: (problem.batch + problem.v.shape[axes:], problem.q.dtype),
    }
    if problem.bias is not None:
        shapes[Slot.DBIAS] = (problem.bias.shape, problem.bias.dtype)
    results = {slot: shapes[slot] for slot in wanted}
    operands = {Slot.OUT: out, Slot.LSE: logsumexp} | cotangents
    return call("backward", problem, operands, results)


def make(queries=40, keys=56, heads=2, kv_heads=None, head_dim=32, batch=(2,), **options):
    """A problem with normal operands. Shapes of bias and mask are given in place of arrays."""
    rng = np.random.default_rng(options.pop("seed", 0))
    dtype = jnp.dtype(options.pop("dtype", "float32"))
    kv_heads = kv_heads or heads
    kv_batch = options.pop("kv_batch", batch)
    arrays = [
        rng.normal(size=(*batch, queries, heads, head_dim)),
        rng.normal(size=(*kv_batch, keys, kv_heads, head_dim)),
        rng.normal(size=(*kv_batch, keys, kv_heads, head_dim)),
    ]
    if "mask" in options:
        options["mask"] = rng.random(options["mask"]) < 0.7
    if "bias" in options:
        bias_dtype = jnp.dtype(options.pop("bias_dtype", "float32"))
        options["bias"] = rng.normal(size=options["bias"]).astype(bias_dtype)
    if options.pop("segments", False):
        options["q_segments"] = np.sort(rng.integers(0, 3, (*batch, queries)).astype(np.int32))
        options["kv_segments"] = np.sort(rng.integers(0, 3, (*batch, keys)).astype(np.int32))
    for name in ("q_lengths", "kv_lengths"):
        if name in options:
            options[name] = np.asarray(options[name], np.int32)
    scale = options.pop("scale", head_dim**-0.5)
    return Problem(*(x.astype(dtype) for x in arrays), scale=np.float32(scale), **options)


CASES = {
    "plain": {},
    "causal": dict(queries=130, keys=130, causal=True),
    "head_dim_1": dict(head_dim=1),
    "head_dim_5": dict(head_dim=5, causal=True),
    "head_dim_16": dict(head_dim=16),
    "head_dim_64": dict(head_dim=64, queries=100, keys=77),
    "head_dim_80": dict(head_dim=80, batch=(1,)),
    "head_dim_128": dict(head_dim=128, batch=(1,)),
    "head_dim_250": dict(head_dim=250, batch=(1,), heads=1),
    "head_dim_256": dict(head_dim=256, batch=(1,), heads=1),
    "one_query": dict(queries=1, keys=77),
    "one_key": dict(queries=33, keys=1, causal=True),
    "one_of_all": dict(queries=1, keys=1, heads=1, head_dim=1, batch=(1,)),
    "groups_of_2": dict(heads=4, kv_heads=2, causal=True),
    "groups_of_3": dict(heads=6, kv_heads=2, window=(9, 4)),
    "groups_of_8": dict(heads=8, kv_heads=1, causal=True),
    "groups_of_12": dict(heads=12, kv_heads=1, mask=(2, 12, 40, 56)),
    "groups_of_32": dict(heads=32, kv_heads=1, batch=(1,), q_lengths=[31]),
    "window": dict(queries=150, keys=150, window=(20, 3), batch=(1,)),
    "window_left": dict(queries=100, keys=150, window=(5, -1), batch=(1,)),
    "window_off_the_keys": dict(queries=150, keys=20, window=(4, 4), batch=(1,)),
    "causal_window": dict(queries=150, keys=150, window=(40, -1), causal=True, batch=(1,)),
    "lengths": dict(q_lengths=[17, 40], kv_lengths=[56, 9]),
    "lengths_of_0": dict(q_lengths=[0, 40], kv_lengths=[56, 0]),
    "segments": dict(queries=100, keys=100, segments=True),
    "segments_causal": dict(queries=70, keys=70, segments=True, causal=True),
    "mask": dict(mask=(2, 2, 40, 56)),
    "mask_of_keys": dict(mask=(2, 1, 1, 56)),
    "mask_of_queries": dict(mask=(1, 2, 40, 1)),
    "bias": dict(bias=(2, 2, 40, 56)),
    "bias_of_heads": dict(bias=(1, 2, 1, 1), queries=70, keys=90),
    "bias_of_queries": dict(bias=(1, 1, 40, 1)),
    "bias_of_keys": dict(bias=(2, 1, 1, 56), causal=True),
    "bias_float16": dict(
        heads=4, kv_heads=2, bias=(1, 4, 40, 56), bias_dtype="float16", mask=(2, 4, 40, 56)
    ),
    "bias_bfloat16": dict(bias=(1, 2, 40, 55), keys=55, bias_dtype="bfloat16"),
    "soft_cap": dict(soft_cap=1.5, scale=1.0),
    "soft_cap_bias_causal": dict(soft_cap=5.0, bias=(1, 2, 40, 56), causal=True),
    "batch_axes": dict(batch=(2, 1, 3), kv_batch=(1, 2, 3), queries=20, keys=20, heads=1),
    "batch_of_mask": dict(batch=(1, 3), kv_batch=(1, 1), mask=(2, 1, 1, 40, 56)),
    "no_batch": dict(batch=()),
    "float16": dict(dtype="float16", causal=True),
    "float16_head_dim_5": dict(dtype="float16", head_dim=5, heads=3),
    "float16_head_dim_64": dict(dtype="float16", head_dim=64, heads=4, kv_heads=2, queries=100),
    "float16_bias": dict(dtype="float16", bias=(1, 2, 40, 56), bias_dtype="float16", soft_cap=3.0),
    "bfloat16": dict(dtype="bfloat16", causal=True, queries=70, keys=70),
    "bfloat16_head_dim_64": dict(dtype="bfloat16", head_dim=64, causal=True, queries=64, keys=64),
    "bfloat16_head_dim_80": dict(dtype="bfloat16", head_dim=80, window=(10, 10)),
    "bfloat16_head_dim_128": dict(dtype="bfloat16", head_dim=128, mask=(2, 1, 40, 56)),
}


def normal(seed, like):
    return np.random.default_rng(seed).normal(size=like.shape).astype(like.dtype)


@pytest.mark.parametrize("name", CASES)
def test_passes(name):
    problem = make(**CASES[name])
    expected = Attention(problem)
    tolerance, derivative_tolerance = TOLERANCE[problem.q.dtype.name]
    out, logsumexp = forward(problem)
    assert relative_error(out, expected.out) <= tolerance
    assert relative_error(logsumexp, expected.logsumexp) <= 2e-5

    moving = {Slot.DQ: problem.q, Slot.DK: problem.k, Slot.DV: problem.v}
    if problem.bias is not None:
        moving[Slot.DBIAS] = problem.bias
    along = {slot: normal(slot, x) for slot, x in moving.items()}
    names = {Slot.DQ: "dq", Slot.DK: "dk", Slot.DV: "dv", Slot.DBIAS: "dbias"}
    dout, dlogsumexp = tangent(problem, out, logsumexp, along)
    expected_tangents = expected.tangent(**{names[slot]: x for slot, x in along.items()})
    assert relative_error(dout, expected_tangents[0]) <= derivative_tolerance
    assert relative_error(dlogsumexp, expected_tangents[1]) <= derivative_tolerance

    cotangents = {Slot.DOUT: normal(7, out), Slot.DLSE: normal(8, logsumexp)}
    gradients = backward(problem, out, logsumexp, cotangents, moving)
    *expected_qkv, expected_dbias = expected.backward(*cotangents.values())
    for slot, gradient in zip((Slot.DQ, Slot.DK, Slot.DV), expected_qkv, strict=True):
        assert relative_error(gradients[slot], gradient) <= derivative_tolerance, slot
    if problem.bias is not None:
        summed = sum_to(
            expected_dbias, (1,) * (expected_dbias.ndim - problem.bias.ndim) + problem.bias.shape
        )
        bias_tolerance = max(derivative_tolerance, TOLERANCE[problem.bias.dtype.name][1])
        assert relative_error(gradients[Slot.DBIAS], summed) <= bias_tolerance


@pytest.mark.parametrize("given", [Slot.DQ, Slot.DK, Slot.DV, Slot.DBIAS])
def test_one_tangent_alone(given):
    problem = make(bias=(1, 2, 40, 56))
    expected = Attention(problem)
    out, logsumexp = forward(problem)
    like = {Slot.DQ: problem.q, Slot.DK: problem.k, Slot.DV: problem.v, Slot.DBIAS: problem.bias}
    direction = normal(3, like[given])
    dout, dlogsumexp = tangent(problem, out, logsumexp, {given: direction})
    expected_tangents = expected.tangent(**{given.name.lower(): direction})
    assert relative_error(dout, expected_tangents[0]) <= 1e-4
    assert relative_error(dlogsumexp, expected_tangents[1]) <= 1e-4


@pytest.mark.parametrize("wanted", [Slot.DQ, Slot.DK, Slot.DV, Slot.DBIAS])
@pytest.mark.parametrize("given", [Slot.DOUT, Slot.DLSE])
def test_one_gradient_of_one_cotangent(given, wanted):
    problem = make(bias=(1, 2, 40, 56), heads=2, kv_heads=1)
    expected = Attention(problem)
    out, logsumexp = forward(problem)
    cotangent = normal(4, out if given == Slot.DOUT else logsumexp)
    gradient = backward(problem, out, logsumexp, {given: cotangent}, [wanted])[wanted]
    names = {Slot.DOUT: "dout", Slot.DLSE: "dlogsumexp"}
    gradients = expected.backward(**{names[given]: cotangent})
    reference = dict(zip((Slot.DQ, Slot.DK, Slot.DV, Slot.DBIAS), gradients, strict=True))[wanted]
    if wanted == Slot.DBIAS:
        reference = sum_to(reference, problem.bias.shape)
    assert relative_error(gradient, reference) <= 1e-4


def naive(problem):
    """Attention in the dtype of the operands, rounded to it after every step."""
    dtype = problem.q.dtype
    k, v = (np.repeat(x, problem.q.shape[-2] // x.shape[-2], -2) for x in (problem.k, problem.v))
    wide = [x.astype(np.float32) for x in (problem.q, k, v)]
    logits = np.einsum("...tnh,...snh->...nts", *wide[:2]).astype(dtype)
    logits = (logits * dtype.type(problem.scale)).astype(np.float32)
    weights = np.exp(logits - logits.max(-1, keepdims=True)).astype(dtype).astype(np.float32)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(dtype).astype(np.float32)
    return np.einsum("...nts,...snh->...tnh", weights, wide[2]).astype(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("amplitude", [1.0, 4.0, 100.0])
def test_error_is_at_most_twice_the_naive_one(dtype, amplitude):
    problem = make(dtype=dtype, queries=200, keys=200, head_dim=64)
    problem = replace(problem, scale=np.float32(problem.scale * amplitude))
    expected = Attention(problem).out
    out, _ = forward(problem)
    assert relative_error(out, expected) <= 2 * relative_error(naive(problem), expected)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores(size):
    problem = make(bias=(1, 1, 40, 56), causal=True)
    problem = replace(problem, bias=np.float32(size) + problem.bias)
    out, logsumexp = forward(problem)
    # The bias is rounded to float32 near 1e4, in steps of 1e-3, before the oracle sees it.
    assert relative_error(out, Attention(problem).out) <= 2e-3
    assert relative_error(logsumexp, Attention(problem).logsumexp) <= 2e-5


def test_empty_rows():
    mask = np.ones((2, 1, 40, 56), bool)
    mask[:, :, 3:9] = False
    problem = replace(make(bias=(1, 1, 40, 56)), mask=mask)
    out, logsumexp = forward(problem)
    assert not out[:, 3:9].any()
    assert np.all(logsumexp[:, 3:9] == np.float32(EMPTY_LOGSUMEXP))
    cotangents = {Slot.DOUT: normal(1, out), Slot.DLSE: normal(2, logsumexp)}
    gradients = backward(problem, out, logsumexp, cotangents, [Slot.DQ, Slot.DBIAS])
    assert not gradients[Slot.DQ][:, 3:9].any()
    assert not gradients[Slot.DBIAS][:, :, 3:9].any()
    dout, dlogsumexp = tangent(problem, out, logsumexp, {Slot.DV: problem.v, Slot.DQ: problem.q})
    assert not dout[:, 3:9].any()
    assert not dlogsumexp[:, 3:9].any()


def test_bias_of_minus_infinity_hides():
    problem = make(bias=(1, 2, 40, 56))
    hidden = np.random.default_rng(1).random(problem.bias.shape) < 0.3
    hidden[:, :, 5] = True
    masked = replace(problem, mask=~hidden)
    biased = replace(problem, bias=np.where(hidden, np.float32(-np.inf), problem.bias))
    for x, expected in zip(forward(biased), forward(masked), strict=True):
        np.testing.assert_array_equal(x, expected)
    out, logsumexp = forward(masked)
    cotangents = {Slot.DOUT: normal(1, out)}
    wanted = [Slot.DQ, Slot.DK, Slot.DV, Slot.DBIAS]
    of_masked = backward(masked, out, logsumexp, cotangents, wanted)
    of_biased = backward(biased, out, logsumexp, cotangents, wanted)
    for slot in wanted:
        np.testing.assert_array_equal(of_biased[slot], of_masked[slot])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_hidden_keys_and_values_do_not_leak(poison, dtype):
    problem = make(kv_lengths=[50, 11], causal=True, dtype=dtype, head_dim=64)
    k, v = problem.k.copy(), problem.v.copy()
    for entry, length in enumerate(problem.kv_lengths):
        k[entry, length:] = poison
        v[entry, length:] = poison
    assert_same = np.testing.assert_array_equal
    poisoned = replace(problem, k=k, v=v)
    out, logsumexp = forward(problem)
    for x, expected in zip(forward(poisoned), (out, logsumexp), strict=True):
        assert_same(x, expected)
    cotangents = {Slot.DOUT: normal(1, out), Slot.DLSE: normal(2, logsumexp)}
    wanted = [Slot.DQ, Slot.DK, Slot.DV]
    gradients = backward(poisoned, out, logsumexp, cotangents, wanted)
    for slot, expected in backward(problem, out, logsumexp, cotangents, wanted).items():
        assert_same(gradients[slot], expected)
    along = {Slot.DQ: normal(3, problem.q), Slot.DV: normal(4, problem.v)}
    expected_tangents = tangent(problem, out, logsumexp, along)
    for x, expected in zip(
        tangent(poisoned, out, logsumexp, along), expected_tangents, strict=True
    ):
        assert_same(x, expected)


def test_causally_hidden_values_do_not_leak():
    problem = make(causal=True)
    v = problem.v.copy()
    v[:, 20] = np.inf
    out, _ = forward(problem)
    poisoned, _ = forward(replace(problem, v=v))
    np.testing.assert_array_equal(poisoned[:, :20], out[:, :20])
    assert not np.isfinite(poisoned[:, 20:]).any()


def test_nan_stays_in_its_row():
    problem = make()
    q = problem.q.copy()
    q[1, 7, 1] = np.nan
    clean = [x.copy() for x in forward(problem)]
    poisoned = forward(replace(problem, q=q))
    for x, expected in zip(poisoned, clean, strict=True):
        assert np.isnan(x[1, 7, 1]).all()
        x, expected = x.copy(), expected.copy()
        x[1, 7, 1] = expected[1, 7, 1] = 0
        np.testing.assert_array_equal(x, expected)


def test_the_same_bits_every_time():
    problem = make(queries=150, keys=150, heads=4, kv_heads=2, bias=(1, 1, 150, 1), causal=True)
    runs = []
    for _ in range(5):
        out, logsumexp = forward(problem)
        cotangents = {Slot.DOUT: normal(1, out), Slot.DLSE: normal(2, logsumexp)}
        wanted = [Slot.DQ, Slot.DK, Slot.DV, Slot.DBIAS]
        gradients = backward(problem, out, logsumexp, cotangents, wanted)
        runs.append(b"".join(x.tobytes() for x in (out, logsumexp, *gradients.values())))
    assert len(set(runs)) == 1
