"""JAX's CUDA platform: Vulkan on XLA's own buffers and streams. Needs an NVIDIA GPU."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jax_aat

try:
    CUDA = jax.devices("cuda")
except RuntimeError:
    CUDA = []
pytestmark = pytest.mark.skipif(not CUDA, reason="JAX sees no CUDA device here")

attend = jax.jit(lambda q, k, v: jax_aat.tiled_attention(q, k, v, implementation="vulkan"))


@pytest.fixture(autouse=True)
def on_cuda():
    with jax.default_device(CUDA[0]):
        yield


def random_qkv(shape, dtype=jnp.float32):
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(7), 3)]


def relative_error(x, reference):
    return float(jnp.linalg.norm(x - reference) / jnp.linalg.norm(reference))


def test_buffers_are_used_where_they_lie():
    q, k, v = random_qkv((2, 300, 4, 64))
    out = attend(q, k, v)
    assert relative_error(out, jax.nn.dot_product_attention(q, k, v)) < 2e-5
    dispatch = jax_aat.last_dispatch()
    assert dispatch.platform == "cuda"
    assert dispatch.staged_bytes == 0
    # q, k, v, out and logsumexp.
    assert dispatch.imported_bytes == 4 * q.nbytes + 2 * 300 * 4 * 4
    # The arena.
    assert jax_aat.memory_stats().cuda_imports.live_bytes >= dispatch.imported_bytes


def test_scratch_is_lent_by_xla():
    q, k, v = random_qkv((1, 1024, 4, 64))
    call = jax.jit(
        lambda *x: jax_aat.tiled_attention(
            *x, adaptation=jax_aat.Adaptation(budget=0.5), implementation="vulkan"
        )
    )
    with jax_aat.profile() as prof:
        jax.block_until_ready(call(q, k, v))
    (made,) = prof.calls
    assert made.lent_bytes == made.scratch_bytes > 0


def test_work_is_ordered_on_the_stream():
    """Each step reads what the step before wrote, by CUDA and by Vulkan in turn."""
    q, k, v = random_qkv((1, 512, 4, 64))

    def chain(attention):
        def step(x, _):
            return jnp.tanh(3 * attention(x, k, v) + x), None

        return jax.jit(lambda x: jax.lax.scan(step, x, length=30)[0])

    expected = chain(jax.nn.dot_product_attention)(q)
    first = chain(attend)(q)
    assert relative_error(first, expected) < 1e-4
    for _ in range(5):
        assert bool((chain(attend)(q) == first).all())


def test_calls_without_a_wait_between_them_do_not_grow_memory():
    q, k, v = random_qkv((1, 256, 2, 64))
    for _ in range(200):
        out = attend(q, k, v)
    jax.block_until_ready(out)
    reserved = jax_aat.memory_stats().total.reserved_bytes
    for _ in range(2000):
        out = attend(q, k, v)
    jax.block_until_ready(out)
    # The parameters of 2,000 calls take more than a MiB, those that are under way at once less.
    assert jax_aat.memory_stats().total.reserved_bytes <= max(reserved, 2**20)


def test_a_profile_tells_the_time_of_the_stream():
    """What CUDA's events say of a call holds the kernels and little else."""
    q, k, v = random_qkv((1, 8192, 8, 64), jnp.bfloat16)
    jax.block_until_ready(attend(q, k, v))
    with jax_aat.profile() as prof:
        kept = [attend(q, k, v) for _ in range(3)]
    assert len(prof.calls) == len(kept)
    for call in prof.calls:
        assert sum(kernel.seconds for kernel in call.kernels) <= call.seconds
        assert call.seconds < call.stream_seconds < call.seconds + 0.1
    with jax_aat.profile(by_kernel=False) as prof:
        kept = [attend(q, k, v)]
    (call,) = prof.calls
    assert call.seconds < call.stream_seconds


@pytest.mark.parametrize("allocator", ["platform", "cuda_async"])
def test_memory_that_cannot_be_imported_is_copied(allocator):
    script = """
import jax, jax.numpy as jnp, jax_aat
keys = jax.random.split(jax.random.key(7), 3)
q, k, v = (jax.random.normal(key, (2, 300, 4, 64)) for key in keys)
with jax.default_matmul_precision("highest"):
    for length in (100, 300, 50):  # grows the staging buffer, then keeps it
        args = q[:, :length], k[:, :length], v[:, :length]
        out = jax.jit(lambda *x: jax_aat.tiled_attention(*x, implementation="vulkan"))(*args)
        expected = jax.nn.dot_product_attention(*args)
        error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
        assert error < 2e-5, error
        dispatch = jax_aat.last_dispatch()
        assert dispatch.platform == "cuda" and dispatch.imported_bytes == 0
        assert dispatch.staged_bytes > 4 * args[0].nbytes
        statistics = jax_aat.memory_stats()
        assert statistics.cuda_imports.live == 0
        assert statistics.cuda_exports.live_bytes >= dispatch.staged_bytes
"""
    # What this process holds of the GPU is not to be had twice.
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": allocator,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05",
    }
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)
