"""Few queries beside many keys: workgroups share the work list of a tile, in any condition.

Those of plans: `test_adaptive_vulkan.py`, in its cases of few queries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import TOLERANCE, Ran, assert_close, assert_same_bits, normal, oracle

from jax_aat import last_dispatch, tiled_attention
from jax_aat.problem import EMPTY_LOGSUMEXP

attend = functools.partial(tiled_attention, implementation="vulkan", return_residual=True)
reference = functools.partial(tiled_attention, implementation="xla", return_residual=True)


def operands(rng, queries, keys, heads=4, kv_heads=2, head_dim=16, batch=2, dtype="float32"):
    q = normal(rng, batch, queries, heads, head_dim, dtype=dtype)
    k, v = (normal(rng, batch, keys, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v


def assert_shared():
    assert any(name.startswith("merge_parts") for name in last_dispatch().kernels)


def everything(rng, queries, keys, heads, batch=2):
    """Conditions that leave some parts, and the last batch entry, nothing to see."""
    return {
        "bias": normal(rng, 1, heads, queries, keys),
        "mask": rng.random((batch, 1, queries, keys)) < 0.6,
        "local_window_size": (keys - 600, 3 * keys // 4),
        "logits_soft_cap": 2.0,
        "query_seq_lengths": np.array([queries] * (batch - 1) + [queries - 1]),
        "key_value_seq_lengths": np.array([3 * keys // 4] * (batch - 1) + [0]),
        "query_segment_ids": np.zeros((batch, queries), np.int32),
        "key_value_segment_ids": np.sort(rng.integers(0, 2, (batch, keys)), axis=1),
    }


CASES = {
    "one query": ({"queries": 1, "keys": 1537}, None),
    "one head": ({"queries": 3, "keys": 2000, "heads": 1, "kv_heads": 1, "head_dim": 33}, None),
    "two slices": ({"queries": 31, "keys": 1100, "heads": 2, "head_dim": 130}, None),
    "bfloat16": ({"queries": 1, "keys": 1300, "dtype": "bfloat16"}, None),
    "float16": ({"queries": 5, "keys": 1301, "heads": 6, "dtype": "float16"}, None),
    "everything": ({"queries": 7, "keys": 2100}, everything),
    "everything in bfloat16": ({"queries": 7, "keys": 2100, "dtype": "bfloat16"}, everything),
}


@pytest.mark.parametrize("name", CASES)
def test_results(name, rng):
    sizes, conditions = CASES[name]
    arrays = operands(rng, **sizes)
    options = conditions(rng, sizes["queries"], sizes["keys"], 4) if conditions else {}
    with Ran("vulkan", "forward"):
        out, lse = jax.block_until_ready(attend(*arrays, **options))
    assert_shared()
    expected_out, expected_lse = oracle(*arrays, **options)
    seen = expected_lse > EMPTY_LOGSUMEXP / 2
    assert seen.all() == (conditions is None)
    tolerance = TOLERANCE[sizes.get("dtype", "float32")][0]
    assert_close(out, expected_out, tolerance)
    assert_close(np.where(seen, lse, 0), np.where(seen, expected_lse, 0), tolerance)
    empty = np.asarray(max(EMPTY_LOGSUMEXP, float(jnp.finfo(lse.dtype).min)), lse.dtype)
    np.testing.assert_array_equal(np.asarray(lse)[~seen], empty)
    assert not np.asarray(out, np.float32)[~seen].any()


@pytest.mark.parametrize("lowest", [np.finfo(np.float32).min, -np.inf])
def test_rows_whose_scores_are_as_low_as_those_of_none(lowest, rng):
    """A bias of the least float32 hides nothing; where parts have no keys, too."""
    arrays = operands(rng, 2, 1500)
    bias = jnp.zeros((1, 1, 2, 1500)).at[0, 0, 1].set(lowest)
    lengths = jnp.array([1500, 40])
    results = jax.block_until_ready(attend(*arrays, bias, key_value_seq_lengths=lengths))
    assert_shared()
    # Not the oracle: float64 can add a product to so low a bias.
    expected = reference(*arrays, bias, key_value_seq_lengths=lengths)
    assert_close(results, expected, TOLERANCE["float32"][0])


def test_more_keys_than_a_workgroup_may_walk(rng):
    """Which is so where a driver ends loops, as lavapipe does."""
    arrays = operands(rng, 1, 20011, heads=2, kv_heads=1, head_dim=64, batch=1)
    results = jax.block_until_ready(attend(*arrays))
    assert_shared()
    assert_close(results, oracle(*arrays), TOLERANCE["float32"][0])


def test_what_is_not_finite_stays_in_its_row(rng):
    q, k, v = operands(rng, 2, 1500, batch=1)
    expected = attend(q, k, v, key_value_seq_lengths=jnp.array([1400]))
    q = q.at[0, 1, 2].set(jnp.nan)
    k, v = k.at[:, 1400:].set(jnp.inf), v.at[:, 1400:].set(jnp.nan)
    out, lse = jax.block_until_ready(attend(q, k, v, key_value_seq_lengths=jnp.array([1400])))
    assert_shared()
    assert jnp.isnan(out[0, 1, 2]).all()
    assert jnp.isnan(lse[0, 1, 2])
    others = np.ones((1, 2, 4), bool)
    others[0, 1, 2] = False
    assert_same_bits((out[others], lse[others]), tuple(x[others] for x in expected))


def test_same_bits_in_every_batch(rng):
    arrays = operands(rng, 2, 1700, batch=3)
    whole = jax.block_until_ready(jax.jit(attend)(*arrays))
    assert_shared()
    each = [attend(*(x[i : i + 1] for x in arrays)) for i in range(3)]
    assert_same_bits(whole, jax.tree.map(lambda *x: jnp.concatenate(x), *each))
    assert_same_bits(whole, jax.vmap(attend)(*arrays))
    assert_same_bits(whole, jax.jit(attend)(*arrays))


def test_gradients(rng):
    arrays = operands(rng, 2, 1100)
    loss = lambda out, lse: (jnp.sin(out).sum() + jnp.cos(lse).sum(),)  # noqa: E731
    gradient = jax.jit(jax.grad(lambda *x: loss(*attend(*x))[0], (0, 1, 2)))
    with Ran("vulkan", "forward", "backward"):
        found = jax.block_until_ready(gradient(*arrays))
    expected = jax.jit(jax.grad(lambda *x: loss(*reference(*x))[0], (0, 1, 2)))(*arrays)
    assert_close(found, expected, TOLERANCE["float32"][1])
    jax.block_until_ready(attend(*arrays))
    assert_shared()
