"""Profiles: what they tell of calls, kernels and work, and the files made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_aat
from jax_aat import Adaptation, _native, plan_tiles, profile, tiled_attention

B, T, N, K, H = 1, 192, 4, 2, 16


@pytest.fixture
def qkv(rng):
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, B, T, K, H)), jnp.float32)
    return q, k, v


def attend(q, k, v, **options):
    return tiled_attention(q, k, v, implementation="vulkan", **options)


def test_a_dense_call(qkv):
    with profile() as prof:
        attend(*qkv, is_causal=True).block_until_ready()
    (call,) = prof.calls
    platform = "cuda" if jax.default_backend() == "gpu" else "cpu"
    assert (call.direction, call.platform, call.path) == ("forward", platform, "portable")
    assert call.problem == f"B{B} T{T} S{T} N{N} K{K} H{H} float32 causal"
    assert call.sequence == jax_aat.last_dispatch().sequence
    assert [kernel.name for kernel in call.kernels] == ["work_lists.f32", "attend_forward.f32"]
    lists, forward = call.kernels
    assert lists.flops == 0
    assert math.isnan(lists.bytes)
    assert forward.flops == 4 * H * B * N * T * (T + 1) / 2
    assert forward.bytes == 4 * (2 * B * T * N * H + 2 * B * T * K * H + B * T * N)
    assert call.exact_pairs is None
    assert call.most_rows is None


def test_flops_of_tangents(qkv):
    """Where values alone move there is no product of the change of the scores."""
    q, k, v = qkv
    for moved, tangents, products in (
        (lambda v: attend(q, k, v), (v,), 2 + 2),
        (lambda q, v: attend(q, k, v), (q, v), 2 + 2 + 2 + 2),
    ):
        with profile() as prof:
            jax.block_until_ready(jax.jvp(moved, tangents, tangents))
        kernel = prof.calls[-1].kernels[-1]
        assert kernel.name == "attend_tangent.f32"
        assert kernel.flops == products * H * B * N * T * T


def test_times_lie_in_each_other(qkv):
    with profile() as prof:
        for _ in range(3):
            attend(*qkv).block_until_ready()
    assert len(prof.calls) == 3
    # The clocks of host and device are told apart by a submission at worst.
    slack = 5e-3
    for call in prof.calls:
        assert call.host_start >= 0
        assert call.host_start <= call.submitted <= call.host_start + call.host_seconds
        assert call.host_start + call.host_seconds <= prof.seconds
        assert call.submitted - slack <= call.start
        assert call.start + call.seconds <= call.host_start + call.host_seconds + slack
        assert call.start == call.kernels[0].start
        last = call.kernels[-1]
        assert call.start + call.seconds == pytest.approx(last.start + last.seconds, abs=1e-9)
        for before, after in zip(call.kernels, call.kernels[1:], strict=False):
            assert before.start + before.seconds <= after.start + 1e-9
    starts = [call.start for call in prof.calls]
    assert starts == sorted(starts)


def test_work_of_a_plan_is_counted(qkv):
    q, k, v = qkv
    plan = plan_tiles(q, k, v, Adaptation(budget=0.5), is_causal=True, implementation="xla")

    def loss(q, k, v):
        return attend(q, k, v, plan=plan, is_causal=True).sum()

    with profile() as prof:
        jax.block_until_ready(jax.grad(loss, (0, 1, 2))(q, k, v))
    forward, backward = prof.calls
    assert (forward.direction, backward.direction) == ("forward", "backward")
    # The same from the plan's own lists.
    headers = np.asarray(plan.list_headers, np.int64).reshape(-1, plan.grid.tiles, 4)
    positions = np.minimum(
        plan.grid.positions, T - np.arange(plan.grid.tiles) * plan.grid.positions
    )
    rows = positions * plan.grid.tile_heads
    exact = float((rows * 16 * headers[..., 2]).sum())
    coarse = float((rows * headers[..., 3]).sum())
    most = int((16 * headers[..., 2] + headers[..., 3]).max())
    assert coarse > 0
    for call in prof.calls:
        assert (call.exact_pairs, call.coarse_pairs, call.most_rows) == (exact, coarse, most)
        assert call.kernels[-1].name == "count_work.f32"
    flops = {kernel.name: kernel.flops for kernel in forward.kernels}
    assert flops["attend_forward.f32"] == 4 * H * (exact + coarse)
    flops = [k.flops for k in backward.kernels if k.name == "attend_backward_dkv.f32"]
    assert flops == [8 * H * exact, 8 * H * coarse]


def test_bytes_of_a_kernel_of_the_state(rng):
    length = 256  # fewer keys have no state
    q = jnp.asarray(rng.normal(size=(B, length, N, H)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, B, length, K, H)), jnp.float32)
    plan = plan_tiles(q, k, v, Adaptation(budget=0.5), is_causal=True, implementation="xla")

    def loss(k):
        return attend(q, k, v, plan=plan, is_causal=True).sum()

    with profile() as prof:
        jax.block_until_ready(jax.grad(loss)(k))
    (kernel,) = (
        kernel
        for call in prof.calls
        for kernel in call.kernels
        if kernel.name == "state_variance_gradient.f32"
    )
    level_pairs = 2 * 4 * B * length * N
    state = 4 * K * ((H + 2) * H + 2 * H)
    # The query, the level biases and the shares with their cotangents, the gradient of the state.
    assert kernel.bytes == 4 * B * length * N * H + 4 * level_pairs + state


def test_a_call_that_plans_counts_its_own_lists(qkv):
    q, k, v = qkv
    adaptation = Adaptation(budget=0.5)
    with profile() as prof:
        attend(q, k, v, adaptation=adaptation, is_causal=True).block_until_ready()
    plan = plan_tiles(q, k, v, adaptation, is_causal=True, implementation="vulkan")
    with profile() as given:
        attend(q, k, v, plan=plan, is_causal=True).block_until_ready()
    assert prof.calls[-1].exact_pairs == given.calls[-1].exact_pairs > 0
    assert prof.calls[-1].coarse_pairs == given.calls[-1].coarse_pairs
    kernels = {kernel.name: kernel for call in prof.calls for kernel in call.kernels}
    assert {"tile_processor.f32", "cross_tile_router.f32", "count_work.f32"} <= kernels.keys()
    router = kernels["cross_tile_router.f32"]
    assert math.isnan(router.flops)
    assert router.bytes > 4 * B * T * N * H


def test_results_are_those_without_a_profile(qkv):
    q, k, v = qkv
    options = {"adaptation": Adaptation(budget=0.5), "is_causal": True}
    without = attend(q, k, v, **options)
    with profile():
        within = attend(q, k, v, **options)
    np.testing.assert_array_equal(within, without)


def test_calls_as_a_whole(qkv):
    with profile(by_kernel=False) as prof:
        attend(*qkv).block_until_ready()
    (call,) = prof.calls
    assert call.kernels == ()
    assert call.seconds > 0
    assert prof.kernels() == ()


def test_one_profile_at_a_time(qkv):
    with profile() as outer:
        with pytest.raises(RuntimeError, match="already"), profile():
            pass
        attend(*qkv).block_until_ready()
    assert len(outer.calls) == 1
    with profile() as after:
        pass
    assert after.calls == ()


def test_an_error_ends_the_profile(qkv):
    def fail():
        attend(*qkv).block_until_ready()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), profile():
        fail()
    assert jax_aat.last_dispatch().kernel_milliseconds is not None
    attend(*qkv).block_until_ready()
    assert jax_aat.last_dispatch().kernel_milliseconds is None


def test_calls_before_and_after_a_lost_device(qkv):
    attend(*qkv).block_until_ready()
    with profile() as prof:
        attend(*qkv).block_until_ready()
        _native.mark_device_lost()
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="was lost"):
            attend(*qkv).block_until_ready()
        attend(*qkv).block_until_ready()
    before, after = prof.calls
    assert after.seconds > 0
    # Under CUDA no caller waits for the device, so that the times may be lost with it.
    unread = jax.default_backend() == "gpu" and math.isnan(before.seconds)
    assert before.seconds > 0 or unread


def test_the_device_is_told_as_its_calls_found_it(qkv, monkeypatch):
    """What was probed by the first call is no part of the device before."""
    device = jax_aat.default_device()
    unprobed = dataclasses.replace(device, traits=MappingProxyType({}))
    monkeypatch.setattr(jax_aat.vulkan, "default_device", lambda: unprobed)
    with profile() as prof:
        attend(*qkv).block_until_ready()
    assert prof.device == device


def test_timing_is_left_as_it_was(qkv):
    jax_aat.set_timing(True, by_kernel=False)
    try:
        with profile():
            pass
        attend(*qkv).block_until_ready()
        assert jax_aat.last_dispatch().kernel_milliseconds is None
        assert jax_aat.last_dispatch().elapsed_milliseconds > 0
    finally:
        jax_aat.set_timing(False)


def test_timing_is_the_profiles_own_meanwhile(qkv):
    with profile() as prof:
        with pytest.raises(RuntimeError, match="a profile is being taken"):
            jax_aat.set_timing(False)
        attend(*qkv).block_until_ready()
    assert len(prof.calls[0].kernels) == 2


def test_unfinished_work_is_waited_for(qkv):
    with profile() as prof:
        results = [jax.jit(attend)(*qkv) for _ in range(8)]
    assert len(prof.calls) == 8
    assert len({call.sequence for call in prof.calls}) == 8
    del results


def test_threads(qkv):
    with profile() as prof:
        threads = [
            threading.Thread(target=lambda: attend(*qkv).block_until_ready()) for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(prof.calls) == 16
    assert sorted(call.sequence for call in prof.calls) == [
        prof.calls[0].sequence + i for i in range(16)
    ]


def test_summary_adds_up(qkv):
    with profile() as prof:
        for _ in range(3):
            attend(*qkv).block_until_ready()
    summaries = prof.kernels()
    assert [summary.calls for summary in summaries] == [3, 3]
    total = sum(kernel.seconds for call in prof.calls for kernel in call.kernels)
    assert sum(summary.seconds for summary in summaries) == pytest.approx(total)
    forward = next(summary for summary in summaries if summary.name == "attend_forward.f32")
    assert forward.flops == pytest.approx(3 * 4 * H * N * T * T / forward.seconds)
    assert "attend_forward.f32" in str(prof)
    assert "3 calls on " in str(prof)
    table = prof.table()
    assert table.row_count == 2
    assert [str(cell) for cell in table.columns[0].cells] == [s.name for s in summaries]


def test_statistics_of_kernels(qkv):
    """One for each kernel that ran where the driver tells any."""
    attend(*qkv).block_until_ready()
    with pytest.raises(ValueError, match="device must be one of"):
        jax_aat.kernel_statistics(99)
    found = jax_aat.kernel_statistics()
    features = jax_aat.default_device().features
    if not features["VK_KHR_pipeline_executable_properties"]:
        assert found == ()
        return
    kernels = {each.kernel: each for each in found}
    assert {"work_lists.f32", "attend_forward.f32"} <= kernels.keys()
    assert kernels["attend_forward.f32"].values


def test_json_has_everything(qkv, tmp_path):
    with profile() as prof:
        attend(*qkv).block_until_ready()
    text = prof.to_json(tmp_path / "profile.json")
    assert (tmp_path / "profile.json").read_text() == text
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["device"] == prof.device.name
    (call,) = content["calls"]
    assert call["problem"] == prof.calls[0].problem
    assert call["kernels"][0]["bytes"] is None
    assert call["kernels"][1]["flops"] == prof.calls[0].kernels[1].flops


def test_trace_follows_the_format(qkv, tmp_path):
    """What the Trace Event Format asks of each kind of event, and that slices nest."""
    with profile() as prof, prof.annotate("both"):
        attend(*qkv).block_until_ready()
        attend(*qkv, is_causal=True).block_until_ready()
    file = tmp_path / "trace.json"
    prof.to_trace(file)
    content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
    events = content["traceEvents"]
    required = {"X": {"ts", "dur", "name", "args"}, "M": {"name", "args"}, "s": {"ts", "id"}}
    required["f"] = required["s"] | {"bp"}
    for event in events:
        assert required[event["ph"]] | {"pid", "tid"} <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event.get("dur", 0) >= 0
    slices = [event for event in events if event["ph"] == "X"]
    kernels = [kernel for call in prof.calls for kernel in call.kernels]
    assert len(slices) == 1 + 2 * len(prof.calls) + len(kernels)
    by_row: dict[tuple[int, int], list[dict]] = {}
    for event in slices:
        by_row.setdefault((event["pid"], event["tid"]), []).append(event)
    for row in by_row.values():
        open_until: list[float] = []
        for event in sorted(row, key=lambda event: (event["ts"], -event["dur"])):
            end = event["ts"] + event["dur"]
            while open_until and open_until[-1] <= event["ts"] + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6
            open_until.append(end)
    (annotation,) = (event for event in slices if event["name"] == "both")
    handlers = [e for e in slices if e["pid"] == annotation["pid"] and e["name"] == "forward"]
    assert len(handlers) == 2
    for handler in handlers:
        assert annotation["ts"] <= handler["ts"]
        assert handler["ts"] + handler["dur"] <= annotation["ts"] + annotation["dur"]
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys() == {call.sequence for call in prof.calls}
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert by_row.keys() <= named
