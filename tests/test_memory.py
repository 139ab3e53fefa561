"""`jax_aat.memory_stats` and `trim_memory`, and how much memory the runtime keeps."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jax_aat
from jax_aat import _native, memory

# Where the pools are small: the chunks of the smallest size, one a pool.
LEAST_BOUND = 5 * 64 * 1024
# What the pools hold at most at once in these tests is to be more than that, or nothing would have
# been shown. On the CUDA platform scratch is XLA's and the pools stay small.
MOST_IN_USE = 0 if jax.default_backend() == "gpu" else 4 * LEAST_BOUND


def make_call(batch, length, heads, head_dim, dtype, *, adaptation=None, backward=False):
    """A call that waits for its result, on operands of its own."""
    shape = (batch, length, heads, head_dim)
    operands = [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0))]

    def forward(query, key):
        return jax_aat.tiled_attention(
            query, key, key, is_causal=True, adaptation=adaptation, implementation="vulkan"
        )

    def loss(query, key):
        return jnp.sum(forward(query, key).astype(jnp.float32) ** 2)

    function = jax.jit(jax.grad(loss, argnums=(0, 1)) if backward else forward)
    return lambda: jax.block_until_ready(function(*operands))


@pytest.fixture(scope="module")
def calls():
    """Calls whose scratch takes from nothing to some MiB, and a context that has run none yet."""
    budget = jax_aat.Adaptation(budget=0.25, super_tile=1024)
    threshold = jax_aat.Adaptation(threshold=0.01, super_tile=1024)
    made = [
        make_call(1, 40, 2, 16, jnp.float32),
        make_call(2, 100, 2, 16, jnp.float32),
        make_call(1, 64, 2, 16, jnp.bfloat16, backward=True),
        make_call(1, 16, 1, 64, jnp.float32, adaptation=budget),
        make_call(1, 16, 2, 64, jnp.float32, adaptation=threshold),
        make_call(3, 16, 1, 64, jnp.float32, adaptation=threshold),
        make_call(2, 16, 2, 64, jnp.bfloat16, adaptation=threshold, backward=True),
        make_call(1, 16, 5, 64, jnp.float32, adaptation=budget),
        make_call(2, 16, 3, 64, jnp.float32, adaptation=threshold),
        make_call(4, 16, 2, 64, jnp.float32, adaptation=budget),
        make_call(3, 16, 3, 64, jnp.bfloat16, adaptation=threshold, backward=True),
    ]
    # Peaks and counts begin with these tests.
    made[0]()
    _native.mark_device_lost()
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="was lost"):
        made[0]()
    return made


def assert_bounded(total):
    assert total.reserved_bytes <= max(1.5 * total.peak_in_use_bytes, LEAST_BOUND)


def test_calls_that_grow_keep_the_bound(calls):
    for call in (calls[3], calls[5], calls[8], calls[9], calls[10]):
        call()
        total = jax_aat.memory_stats().total
        assert_bounded(total)
        # While a call runs, what one pool cannot give back another may lack: a smallest chunk each.
        assert total.peak_reserved_bytes <= 1.5 * total.peak_in_use_bytes + LEAST_BOUND


def test_random_calls_keep_the_bound(calls, rng):
    for index in rng.integers(len(calls), size=200):
        calls[index]()
        total = jax_aat.memory_stats().total
        assert total.in_use_bytes == total.blocks == 0
        assert_bounded(total)
    assert total.peak_in_use_bytes > MOST_IN_USE


def test_concurrent_calls_keep_the_bound(calls, rng):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda index: calls[index](), rng.integers(len(calls), size=200)))
    total = jax_aat.memory_stats().total
    assert total.in_use_bytes == total.blocks == 0
    assert total.peak_in_use_bytes > MOST_IN_USE
    assert_bounded(total)


def test_a_steady_loop_asks_the_driver_for_nothing(calls):
    for call in calls * 2:
        call()
    before = jax_aat.memory_stats()
    for call in calls * 2:
        call()
    after = jax_aat.memory_stats()
    assert before.total.total_allocations > 0
    assert after.total == before.total
    assert after.pools == before.pools


def test_trimming_returns_all_that_is_idle(calls):
    for call in calls:
        call()
    held = jax_aat.memory_stats().total.reserved_bytes
    assert held > 0
    assert jax_aat.trim_memory() == held
    total = jax_aat.memory_stats().total
    assert total.reserved_bytes == total.in_use_bytes == total.allocations == 0
    assert total.fragmentation == 0
    assert total.peak_reserved_bytes >= held
    assert jax_aat.trim_memory() == 0


def test_what_is_in_use_is_told_by_purpose_and_stays(calls):
    jax_aat.set_timing(True)
    try:
        calls[0]()
    finally:
        jax_aat.set_timing(False)
    # The timestamps of the last call are kept until another one ran.
    jax_aat.trim_memory()
    statistics = jax_aat.memory_stats()
    metrics = statistics.pools["metrics"]
    assert metrics.blocks == metrics.allocations == 1
    assert 0 < metrics.in_use_bytes < metrics.reserved_bytes
    assert metrics.largest_free_bytes == metrics.reserved_bytes - metrics.in_use_bytes
    assert metrics.fragmentation == 0
    assert replace(statistics.total, peak_reserved_bytes=0, peak_in_use_bytes=0) == replace(
        metrics,
        peak_reserved_bytes=0,
        peak_in_use_bytes=0,
        total_allocations=statistics.total.total_allocations,
    )
    calls[0]()
    assert jax_aat.memory_stats().pools["metrics"].blocks == 0


def test_totals_are_those_of_all_pools(calls):
    calls[-1]()
    statistics = jax_aat.memory_stats()
    pools, total = statistics.pools.values(), statistics.total
    assert set(statistics.pools) == {"state", "transfer", "parameters", "staging", "metrics"}
    for name in ("reserved_bytes", "in_use_bytes", "blocks", "allocations", "total_allocations"):
        assert getattr(total, name) == sum(getattr(pool, name) for pool in pools)
    for name in ("peak_reserved_bytes", "peak_in_use_bytes"):
        peaks = [getattr(pool, name) for pool in pools]
        assert max(peaks) <= getattr(total, name) <= sum(peaks)
    assert (statistics.pools["state"].reserved_bytes > 0) == (MOST_IN_USE > 0)
    assert statistics.pools["parameters"].reserved_bytes > 0


def test_host_memory_that_is_used_in_place_is_counted(calls):
    device = jax_aat.default_device()
    before = jax_aat.memory_stats().host_imports
    calls[0]()
    after = jax_aat.memory_stats().host_imports
    imports = device.kind == "cpu" and device.features["VK_EXT_external_memory_host"]
    assert (after.total > before.total) == imports
    assert after.live == after.live_bytes == 0


def test_fragmentation_is_the_share_of_free_bytes_outside_the_largest_range():
    pool = jax_aat.PoolStatistics(reserved_bytes=100, in_use_bytes=20, largest_free_bytes=60)
    assert pool.fragmentation == 0.25


def test_devices_are_chosen(calls):
    calls[0]()
    default = jax_aat.default_device()
    everything = jax_aat.memory_stats()
    assert default.name in everything.devices
    if len(everything.devices) == 1:
        for device in (default, default.index):
            stats = jax_aat.memory_stats(device)
            # What the driver leaves to this process changes with what other processes take.
            assert stats == replace(
                everything,
                heap_budget_bytes=stats.heap_budget_bytes,
                heap_usage_bytes=stats.heap_usage_bytes,
            )
    held = jax_aat.memory_stats(default).total.reserved_bytes
    assert jax_aat.trim_memory(default) == held > 0
    with_budget = default.features["VK_EXT_memory_budget"]
    assert (everything.heap_budget_bytes is not None) == with_budget
    assert (everything.heap_usage_bytes is not None) == with_budget
    assert everything.limit_bytes > 0
    assert everything.heap_bytes > 0


@pytest.mark.parametrize("function", [jax_aat.memory_stats, jax_aat.trim_memory])
def test_wrong_devices_are_named(function):
    count = len(jax_aat.devices())
    for index in (-1, count):
        with pytest.raises(ValueError, match=rf"^device .* {count} devices .* not {index}$"):
            function(index)
    for wrong in ("llvmpipe", 0.0):
        with pytest.raises(TypeError, match=f"^device must be .*, not {wrong!r}$"):
            function(wrong)


def native_statistics(scale, budget):
    pool = {
        name: scale * (position + 1)
        for position, name in enumerate(jax_aat.PoolStatistics.__dataclass_fields__)
    }
    shared = {"live": scale, "live_bytes": 2 * scale, "total": 3 * scale}
    return {
        "total": pool,
        "pools": dict.fromkeys(memory.PURPOSES, pool),
        "host_imports": shared,
        "cuda_imports": shared,
        "cuda_exports": shared,
        "limit_bytes": scale,
        "heap_bytes": 2**30 * scale,
        "heap_budget_bytes": budget,
        "heap_usage_bytes": budget,
    }


def pretend(monkeypatch, statistics):
    """Makes memory_stats see other devices; None: one that was not used."""
    native = SimpleNamespace(memory_stats=statistics.__getitem__)
    device = jax_aat.default_device()
    known = [replace(device, index=i, name=f"device {i}") for i in range(len(statistics))]
    monkeypatch.setattr(memory, "_native", native)
    monkeypatch.setattr(memory.vulkan, "devices", lambda: tuple(known))


def test_several_devices_are_summed(monkeypatch):
    pretend(monkeypatch, [native_statistics(1, 2048), None, native_statistics(10, 4096)])
    statistics = jax_aat.memory_stats()
    assert statistics.devices == ("device 0", "device 2")
    assert statistics.total == jax_aat.PoolStatistics(11, 22, 33, 44, 55, 66, 77, 88)
    assert statistics.pools["staging"] == statistics.total
    assert statistics.cuda_imports == jax_aat.SharedStatistics(11, 22, 33)
    assert statistics.heap_budget_bytes == 6144
    text = str(statistics)
    assert "memory on device 0, device 2" in text
    assert "11 GiB, 6 KiB used by this process of a budget of 6 KiB" in text
    assert jax_aat.memory_stats(2).total.in_use_bytes == 20
    unused = jax_aat.memory_stats(1)
    assert unused.devices == ()
    assert unused.total == jax_aat.PoolStatistics()
    assert unused.heap_budget_bytes is None
    assert "none was used yet" in str(unused)


def test_a_budget_that_one_device_does_not_tell_is_unknown(monkeypatch):
    pretend(monkeypatch, [native_statistics(1, 2048), native_statistics(1, None)])
    statistics = jax_aat.memory_stats()
    assert statistics.heap_budget_bytes is None
    assert "budget unknown" in str(statistics)
