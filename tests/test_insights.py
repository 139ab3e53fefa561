"""Insights: each rule sees its cause, and is silent without it."""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType

import jax.numpy as jnp
import pytest

import jax_aat
from jax_aat import Adaptation, Ceilings, plan_tiles, profile, tiled_attention
from jax_aat.insights import HAND_OVER, insights
from jax_aat.profiling import Profile

T, N, K, H = 256, 4, 2, 16
HUGE = Ceilings("any", MappingProxyType(dict.fromkeys(jax_aat.vulkan.DTYPES, 1e30)), 1e30)


@pytest.fixture
def qkv(rng):
    q = jnp.asarray(rng.normal(size=(1, T, N, H)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 1, T, K, H)), jnp.float32)
    return q, k, v


@pytest.fixture
def call(qkv):
    """A call of one kernel on the CPU platform, whose host was hardly idle."""
    with profile() as prof:
        tiled_attention(*qkv, implementation="vulkan").block_until_ready()
    (kernel,) = (k for k in prof.calls[0].kernels if k.name == "attend_forward.f32")
    one = dataclasses.replace(prof.calls[0], platform="cpu", kernels=(kernel,))
    return timed(one, 1e-3, 1.1e-3)


def timed(call, seconds, host_seconds, even=False, **changes):
    """The call with kernels that share `seconds` as they did theirs, or evenly."""
    total = len(call.kernels) if even else sum(kernel.seconds for kernel in call.kernels)
    kernels = tuple(
        dataclasses.replace(kernel, seconds=(1 if even else kernel.seconds) * seconds / total)
        for kernel in call.kernels
    )
    return dataclasses.replace(
        call, kernels=kernels, seconds=seconds, host_seconds=host_seconds, **changes
    )


def profile_of(*calls, device=None):
    return Profile(device, calls=calls)


def causes(prof, ceilings=HUGE):
    return {insight.cause for insight in insights(prof, ceilings)}


def insights_of_cause(cause, *calls):
    return [insight for insight in insights(profile_of(*calls), HUGE) if insight.cause == cause]


def ceilings_at(call, flops_share, bandwidth_share):
    """Ceilings of which the call's main kernel reaches such shares."""
    (kernel,) = call.kernels
    flops = kernel.flops / kernel.seconds / flops_share
    return Ceilings(
        "any",
        MappingProxyType({call.dtype: flops}),
        kernel.bytes / kernel.seconds / bandwidth_share,
    )


def test_compute(call):
    (insight,) = insights(profile_of(call), ceilings_at(call, 0.8, 0.3))
    assert (insight.cause, insight.subject) == ("compute", call.kernels[0].name)
    assert insight.seconds == call.seconds
    assert "80%" in str(insight)


def test_memory(call):
    (insight,) = insights(profile_of(call), ceilings_at(call, 0.3, 0.8))
    assert insight.cause == "memory"
    assert "80%" in insight.message


def test_neither(call):
    (insight,) = insights(profile_of(call), ceilings_at(call, 0.3, 0.2))
    assert insight.cause == "latency"
    assert "30%" in insight.message
    assert "20%" in insight.message


def test_a_kernel_of_unknown_bytes(call):
    """Of one that makes lists nobody can say whether memory limits it."""
    (kernel,) = call.kernels
    lists = dataclasses.replace(kernel, name="work_lists.f32", flops=0.0, bytes=math.nan)
    both = dataclasses.replace(call, kernels=(kernel, lists))
    found = insights(profile_of(timed(both, 2e-3, 2.1e-3)), HUGE)
    assert [insight.subject for insight in found] == [kernel.name]


def test_launch_of_kernels(call):
    short = timed(call, 10e-6, 11e-6)
    assert causes(profile_of(short, short), ceilings_at(short, 0.3, 0.2)) == {"launch"}


def test_launch_of_calls(call):
    assert "launch" not in causes(profile_of(call))
    (insight,) = (
        insight
        for insight in insights(profile_of(timed(call, 1e-3, 4e-3, staged_bytes=0)), HUGE)
        if insight.subject == "cpu"
    )
    assert insight.cause == "launch"
    assert insight.seconds == pytest.approx(3e-3)
    assert "25%" in insight.message


def test_copies(call):
    slow = timed(call, 1e-3, 4e-3, staged_bytes=5_000_000)
    assert "copies" in causes(profile_of(slow))
    assert "copies" not in causes(profile_of(timed(call, 1e-3, 1.1e-3, staged_bytes=5_000_000)))
    cuda = dataclasses.replace(slow, platform="cuda")
    (insight,) = (i for i in insights(profile_of(cuda), HUGE) if i.cause == "copies")
    assert "XLA_PYTHON_CLIENT_ALLOCATOR" in insight.message


def test_hand_over(call):
    short, long = (
        timed(call, seconds, seconds, platform="cuda", staged_bytes=0, stream_seconds=math.nan)
        for seconds in (HAND_OVER / 2, 2 * HAND_OVER)
    )
    assert "hand-over" in causes(profile_of(short, short, long))
    assert "hand-over" not in causes(profile_of(short, long, long))
    (told,) = insights_of_cause("hand-over", dataclasses.replace(long, stream_seconds=9e-3))
    assert told.seconds == pytest.approx(9e-3 - long.seconds)
    assert f"{1e3 * told.seconds:.2f} ms" in told.message
    quick = dataclasses.replace(short, stream_seconds=1.5 * short.seconds)
    assert not insights_of_cause("hand-over", quick)


def planned(qkv, adaptation):
    """What a call that plans runs, a millisecond a kernel whatever else the device does."""
    with profile() as prof:
        tiled_attention(
            *qkv, is_causal=True, adaptation=adaptation, implementation="vulkan"
        ).block_until_ready()
    prof.calls = tuple(timed(call, 1e-3 * len(call.kernels), 1.0, even=True) for call in prof.calls)
    return prof


def test_planning(qkv):
    """A plan for so few keys costs more than attention to them."""
    prof = planned(qkv, Adaptation(budget=0.5))
    (insight,) = (i for i in insights(prof, HUGE) if i.cause == "planning")
    assert "replan_every=" in insight.message
    q, k, v = qkv
    plan = plan_tiles(q, k, v, Adaptation(budget=0.5), is_causal=True, implementation="xla")
    with profile() as given:
        tiled_attention(
            q, k, v, is_causal=True, plan=plan, implementation="vulkan"
        ).block_until_ready()
    assert "planning" not in causes(given)


def test_planning_advice_is_enough(qkv):
    """With a plan for as many calls as advised its share is what the message calls little."""
    prof = planned(qkv, Adaptation(budget=0.5))
    (insight,) = (i for i in insights(prof, HUGE) if i.cause == "planning")
    calls = int(insight.message.split("replan_every=")[1].split()[0])
    total = sum(kernel.seconds for call in prof.calls for kernel in call.kernels)
    rest = total - insight.seconds
    share = insight.seconds / calls / (insight.seconds / calls + rest)
    assert share <= 0.05 or calls == 64
    if calls > 1:
        assert insight.seconds / (calls - 1) / (insight.seconds / (calls - 1) + rest) > 0.05


def test_nothing_saved(qkv):
    everything = planned(qkv, Adaptation(threshold=0.0))
    (insight,) = (
        i
        for i in insights(everything, HUGE)
        if i.cause == "nothing saved" and i.subject == "forward"
    )
    assert "adaptation=None" in insight.message
    made = dataclasses.replace(everything.calls[-1], direction="plan")
    assert "nothing saved" not in causes(profile_of(made))
    little = planned(qkv, Adaptation(threshold=1e9))
    left = little.calls[-1]
    assert left.exact_pairs + left.coarse_pairs < 0.8 * left.dense_pairs
    assert "nothing saved" not in causes(little)


def test_imbalance(qkv):
    prof = planned(qkv, Adaptation(threshold=1e9))
    call = prof.calls[-1]
    mean = (call.exact_pairs + call.coarse_pairs) / call.query_rows
    even, uneven = (dataclasses.replace(call, most_rows=int(x * mean)) for x in (2, 6))
    even, uneven = (timed(x, 1e-3, 1.1e-3) for x in (even, uneven))
    assert "imbalance" not in causes(profile_of(even))
    (insight,) = (i for i in insights(profile_of(uneven), HUGE) if i.cause == "imbalance")
    assert insight.subject == "attend_forward.f32"
    assert "query_tile" in insight.message


@pytest.fixture
def with_matrices(call):
    device = jax_aat.default_device()
    traits = {**device.traits, "coopmat_layout_known": True, "coopmat_bfloat16": True}
    return dataclasses.replace(device, traits=MappingProxyType(traits))


def test_dtype(call, with_matrices):
    (insight,) = (
        i for i in insights(profile_of(call, device=with_matrices), HUGE) if i.cause == "dtype"
    )
    assert "bfloat16" in insight.message
    no_matrices = {"coopmat_float16": False, "coopmat_bfloat16": False}
    traits = MappingProxyType({**with_matrices.traits, **no_matrices})
    without = dataclasses.replace(with_matrices, traits=traits)
    assert "dtype" not in causes(profile_of(call, device=without))


def test_portable_kernels_for_a_matrix_dtype(call, with_matrices):
    half = dataclasses.replace(call, dtype="bfloat16")
    (insight,) = (
        i for i in insights(profile_of(half, device=with_matrices), HUGE) if i.cause == "kernels"
    )
    assert call.problem in insight.message
    matrices = dataclasses.replace(half, path="coopmat")
    assert "kernels" not in causes(profile_of(matrices, device=with_matrices))


def test_largest_first(call):
    short = timed(call, 1e-3, 9e-3, staged_bytes=0)
    found = insights(profile_of(short), ceilings_at(short, 0.8, 0.3))
    assert [i.seconds for i in found] == sorted((i.seconds for i in found), reverse=True)
    assert len(found) == 2


def test_nothing_without_calls():
    assert insights(profile_of(), HUGE) == ()


def test_dense_pairs(rng):
    for queries, keys in ((5, 9), (9, 5), (7, 7)):
        q = jnp.asarray(rng.normal(size=(1, queries, N, H)), jnp.float32)
        k = v = jnp.asarray(rng.normal(size=(1, keys, K, H)), jnp.float32)
        for causal in (False, True):
            with profile() as prof:
                tiled_attention(
                    q, k, v, is_causal=causal, implementation="vulkan"
                ).block_until_ready()
            pairs = sum(min(t + 1, keys) if causal else keys for t in range(queries))
            assert prof.calls[0].dense_pairs == N * pairs


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    from jax_aat import _native

    monkeypatch.setattr(_native, "cache_path", lambda: str(tmp_path / "cache" / "x.pipelines"))
    first = jax_aat.ceilings()
    assert first.device == jax_aat.default_device().name
    assert 0 < first.bandwidth < 1e14
    assert set(first.matrix_flops) == set(jax_aat.vulkan.DTYPES)
    assert all(0 < flops < 1e17 for flops in first.matrix_flops.values())
    with monkeypatch.context() as patch:
        patch.setattr(_native, "measure_ceilings", lambda device: pytest.fail("measured again"))
        assert jax_aat.ceilings() == first
        assert jax_aat.ceilings(0) == first
    monkeypatch.setattr(
        _native,
        "measure_ceilings",
        lambda device: {
            **dict.fromkeys(("float16_matrices", "bfloat16_matrices"), 0.0),
            "products": 2.0,
            "bandwidth": 3.0,
        },
    )
    again = jax_aat.ceilings(measure_again=True)
    assert (again.bandwidth, again.matrix_flops["float32"]) == (3, 2)
    assert jax_aat.ceilings() == again


def test_kept_ceilings_need_no_probe(tmp_path, monkeypatch):
    """Whether a device's matrices serve is known to a process that has used it only."""
    from jax_aat import _native

    device = jax_aat.default_device()
    found = {"coopmat_float16": True, "coopmat_bfloat16": True, "coopmat_layout_known": True}
    probed = dataclasses.replace(device, traits=MappingProxyType({**device.traits, **found}))
    rates = {"products": 2.0, "float16_matrices": 8.0, "bfloat16_matrices": 9.0, "bandwidth": 3.0}
    monkeypatch.setattr(_native, "cache_path", lambda: str(tmp_path / "x.pipelines"))
    with monkeypatch.context() as patch:
        patch.setattr(_native, "measure_ceilings", lambda device: rates)
        patch.setattr(jax_aat.vulkan, "devices", lambda: (probed,))
        first = jax_aat.ceilings()
    assert first.matrix_flops["bfloat16"] == 9
    unprobed = dataclasses.replace(device, traits=MappingProxyType({}))
    monkeypatch.setattr(jax_aat.vulkan, "devices", lambda: (unprobed,))
    assert jax_aat.ceilings() == first


def test_ceilings_that_cannot_be_kept(tmp_path, monkeypatch):
    from jax_aat import _native

    (tmp_path / "file").touch()
    monkeypatch.setattr(_native, "cache_path", lambda: str(tmp_path / "file" / "x.pipelines"))
    with pytest.warns(UserWarning, match=r"not kept on disk: .*file"):
        assert jax_aat.ceilings().bandwidth > 0


def test_a_damaged_file_of_ceilings_is_written_anew(tmp_path, monkeypatch):
    from jax_aat import _native

    monkeypatch.setattr(_native, "cache_path", lambda: str(tmp_path / "x.pipelines"))
    first = jax_aat.ceilings()
    (file,) = tmp_path.glob("*.ceilings.json")
    file.write_text(file.read_text()[:10])
    assert jax_aat.ceilings().matrix_flops.keys() == first.matrix_flops.keys()
    assert jax_aat.ceilings() == jax_aat.ceilings()


def test_ceilings_of_no_device():
    with pytest.raises(ValueError, match="not 99"):
        jax_aat.ceilings(99)


def test_insights_of_a_profile_measure_ceilings(call, monkeypatch):
    asked = []
    monkeypatch.setattr(jax_aat.roofline, "ceilings", lambda device: asked.append(device) or HUGE)
    prof = profile_of(call)
    assert prof.insights(HUGE) == insights(prof, HUGE)
    assert not asked
    assert prof.insights() == insights(prof, HUGE)
    assert asked[0].name == call.device
    assert not math.isnan(call.seconds)
