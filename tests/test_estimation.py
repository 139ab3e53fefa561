"""Estimates: counted against calls that run, and the law of each kernel against made-up times."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_aat
from jax_aat import Adaptation, adaptive, estimate, estimation, profile, tiled_attention
from jax_aat.profiling import KernelTime

N, K, H = 4, 2, 16


def run(queries, keys, *, gradients=False, **options):
    """The profile of a call of these sizes."""
    q = jax.random.normal(jax.random.key(0), (1, queries, N, H))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, keys, K, H))

    def attend(q, k, v):
        return tiled_attention(q, k, v, implementation="vulkan", **options)

    with profile() as prof:
        if gradients:
            jax.block_until_ready(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))(q, k, v))
        else:
            jax.jit(attend)(q, k, v).block_until_ready()
    return prof


def start_with(monkeypatch, shortest):
    """Whatever the device is."""
    lengths = estimation.Lengths(shortest, 512, 8192, 2)
    for name in ("ON_PROCESSORS", "ON_GPUS"):
        monkeypatch.setattr(estimation, name, lengths)


@pytest.fixture(autouse=True)
def short_calls(monkeypatch):
    start_with(monkeypatch, 64)
    monkeypatch.setattr(estimation, "ENOUGH", 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(400, 400), (300, 150)])
def test_flops_of_dense_calls_are_those_that_run(queries, keys, causal):
    found = estimate((1, queries, N, H), (1, keys, K, H), jnp.float32, is_causal=causal)
    (call,) = run(queries, keys, is_causal=causal).calls
    assert found.flops == pytest.approx(sum(kernel.flops for kernel in call.kernels), 1e-3)
    assert found.relative_flops == pytest.approx(1, 1e-3)
    assert found.problem == call.problem
    assert found.device == call.device
    assert found.measured_lengths == (32, 64)
    assert found.kernels.keys() == {kernel.name for kernel in call.kernels}


def test_memory_and_flops_with_gradients(monkeypatch):
    start_with(monkeypatch, 256)
    found = estimate((1, 500, N, H), (1, 500, K, H), "float32", gradients=True)
    forward, backward = run(500, 500, gradients=True).calls
    assert found.flops == pytest.approx(
        sum(kernel.flops for call in (forward, backward) for kernel in call.kernels), 1e-3
    )
    assert found.relative_flops == pytest.approx(1, 1e-3)
    most = max(forward.scratch_bytes, backward.scratch_bytes)
    assert found.scratch_bytes == most
    operands = 500 * (2 * N + 2 * K) * H * 4
    assert found.operand_bytes == 2 * operands + 500 * N * 4


def test_a_budget():
    adaptation = Adaptation(budget=0.25)
    shapes = (1, 3072, N, H), (1, 3072, K, H)
    found = estimate(*shapes, "float32", is_causal=True, adaptation=adaptation)
    calls = run(3072, 3072, is_causal=True, adaptation=adaptation).calls
    assert found.relative_flops == pytest.approx(0.25, 0.15)
    rows = 4 * H * (calls[-1].exact_pairs + calls[-1].coarse_pairs)
    (made,) = (n for n in found.kernels if n.startswith("attend_forward"))
    assert made == "attend_forward.f32"
    planning = estimation.Sizes(1, 3072, 3072, N, K, H, "float32", True, adaptation)
    assert found.flops - planning.planning_flops() == pytest.approx(rows, 0.1)
    assert tuple(call.direction for call in calls) == planning.directions(gradients=False)
    assert found.scratch_bytes == max(call.scratch_bytes for call in calls)
    assert "count_work.f32" not in found.kernels


def test_memory_of_a_plan_that_nobody_keeps(set_traced):
    """Its lists are scratch of the one call that makes it."""
    for module in (adaptive, estimation):
        set_traced(module, "plans_in_one_submission", lambda *_: True)
    adaptation = Adaptation(budget=0.25)
    shapes = (1, 700, N, H), (1, 700, K, H)
    found = estimate(*shapes, "float32", adaptation=adaptation, is_causal=True)
    (call,) = run(700, 700, is_causal=True, adaptation=adaptation).calls
    assert found.scratch_bytes == call.scratch_bytes


def test_lists_that_shaders_cannot_count_are_refused(monkeypatch):
    monkeypatch.setattr(estimation, "plans_in_one_submission", lambda *_: True)
    sizes = estimation.Sizes(
        1, 2**20, 2**20, 16, 1, 64, "float32", True, Adaptation(threshold=1e-3)
    )
    with pytest.raises(ValueError, match=r"split the sequence|walk"):
        sizes.scratch_bytes("forward", gradients=False)


LAWS = {
    # Seconds at a length of n, for n queries and keys.
    "attend_forward.f32": lambda n: 1e-3 + 2e-9 * n * (n + 1) / 2,
    "work_lists.f32": lambda n: 1e-4 + 1e-8 * (n / 32) * (n / 16),
    "attend_backward_delta.f32": lambda n: 5e-4 + 3e-8 * n,
}


def test_times_follow_the_law_of_each_kernel(monkeypatch):
    (template,) = run(64, 64, is_causal=True).calls

    def profiled(sizes, gradients):
        kernels = tuple(
            KernelTime(name, 0.0, law(sizes.queries), sizes.dense_flops() * (i == 0), 0.0)
            for i, (name, law) in enumerate(LAWS.items())
        )
        return sizes, (dataclasses.replace(template, kernels=kernels),)

    monkeypatch.setattr(estimation, "_profiled", profiled)
    start_with(monkeypatch, 1024)
    found = estimate((1, 8192, N, H), (1, 8192, K, H), "float32", is_causal=True)
    for name, law in LAWS.items():
        assert found.kernels[name] == pytest.approx(law(8192), 1e-3), name
    assert found.seconds == pytest.approx(sum(law(8192) for law in LAWS.values()), 1e-3)
    assert found.measured_lengths == (512, 1024)


def test_longer_calls_are_measured_until_one_takes_long(monkeypatch):
    (template,) = run(64, 64).calls
    monkeypatch.setattr(estimation, "ENOUGH", 1.0)

    def profiled(sizes, gradients):
        kernel = KernelTime("attend_forward.f32", 0.0, sizes.queries / 1000, 1.0, 0.0)
        return sizes, (dataclasses.replace(template, kernels=(kernel,)),)

    monkeypatch.setattr(estimation, "_profiled", profiled)
    assert estimate((1, 5000, N, H), dtype="float32").measured_lengths == (512, 1024)
    assert estimate((1, 700, N, H), dtype="float32").measured_lengths == (512, 700)
    monkeypatch.setattr(estimation, "ENOUGH", 1e9)
    assert estimate((1, 9000, N, H), dtype="float32").measured_lengths == (4096, 8192)


@pytest.mark.parametrize(
    ("length", "causal", "goal", "stages"),
    [
        (2**15 - 1, True, {"budget": 0.1}, 2),
        (2**15, True, {"budget": 0.25}, 1),
        (2**15, True, {"budget": 0.26}, 2),
        (2**15, True, {"threshold": 1e-3}, 1),
        (2**15, False, {"budget": 0.1}, 2),
    ],
)
def test_stages_go_by_the_length(length, causal, goal, stages):
    def sizes(**fields):
        adaptation = Adaptation(**goal, **fields)
        return estimation.Sizes(1, length, length, N, K, H, "float32", causal, adaptation)

    assert sizes().planning_flops() == sizes(stages=stages).planning_flops()
    assert sizes().planning_flops() != sizes(stages=3 - stages).planning_flops()
    assert sizes().of_length(4096).adaptation == sizes(stages=stages).of_length(4096).adaptation


def test_the_router_judges_a_share_of_the_keys():
    sizes = estimation.Sizes(1, 2**17, 2**17, N, K, H, "float32", True, Adaptation(budget=0.03))
    half = sizes.of_length(2**16)
    router = [x.work("cross_tile_router.f32", 0.0) for x in (half, sizes)]
    # Tiles of both judge up to 8,192 keys, and all key tiles, of 8 granules each, that they see.
    judged = [2**13 * (1 - 2**13 / 2 / n) + n / 2 / 8 for n in (2**16, 2**17)]
    assert router[1] / router[0] == pytest.approx(2 * judged[1] / judged[0], rel=1e-4)
    # Twice the tiles look into as much.
    assert sizes.work("plan_price.f32", 0.0) == 2 * half.work("plan_price.f32", 0.0)
    lists = [x.work("plan_lists.f32", 0.0) for x in (half, sizes)]
    assert lists[1] == 4 * lists[0]
    assert half.work("tile_processor.bf16", 0.0) * 2 == sizes.work("tile_processor.bf16", 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 8, 16), None), r"query_shape: got \(4, 8, 16\)"),
        (((1, 8, 4, 16), (1, 8, 3, 16)), r"key_shape: got \(1, 8, 3, 16\)"),
        (((1, 8, 4, 16), (1, 8, 4, 0)), r"key_shape: got \(1, 8, 4, 0\)"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(*arguments, "float32")


def test_arrays_are_no_shapes():
    for given in (jnp.zeros((1, 64, 2, 8)), jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)):
        with pytest.raises(TypeError, match=r"query_shape: got .*expected a tuple of integers"):
            estimate(given)


def test_a_tolerance_cannot_be_estimated():
    with pytest.raises(ValueError, match="adaptation: got a tolerance"):
        estimate((1, 64, N, H), dtype="float32", adaptation=Adaptation(tolerance=0.1))


def test_what_vulkan_does_not_serve():
    with pytest.raises(TypeError, match="query: got float64"):
        estimate((1, 64, N, H), dtype="float64")


def test_what_the_device_cannot_compute():
    """Mesa's lavapipe ends loops after 65,535 iterations."""
    if not jax_aat.default_device().name.startswith("llvmpipe"):
        pytest.skip("this device has no such limit")
    with pytest.raises(ValueError, match="ends the loops"):
        estimate((1, 10**6, N, H), dtype="float32")


def test_words():
    found = estimate((1, 64, N, H), dtype="float32")
    assert str(found).startswith(f"B1 T64 S64 N{N} K{N} H{H} float32 on ")
    assert "100.0% of exact attention" in str(found)
    assert np.isfinite(found.seconds)
