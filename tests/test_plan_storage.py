"""Plans as data: written and read, checked, refused where they are corrupted."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_same_bits, normal
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_adaptive_plan import (
    SHORTER,
    TILE,
    clustered,
    plan_tiles,
    tiled_attention,
    untraced_attention,
)

import jax_aat
from jax_aat import Adaptation


@pytest.fixture(scope="module")
def stored():
    q, k, v = clustered(np.random.default_rng(3), 256)
    return plan_tiles(q, k, v, Adaptation(budget=0.5, query_tile=16), is_causal=True)


def test_plans_are_stored(stored):
    assert "exact" in str(stored)
    leaves, structure = jax.tree.flatten(stored)
    blob = serialization.to_bytes(dict(enumerate(leaves)))
    read = serialization.from_bytes(dict(enumerate(leaves)), blob)
    restored = jax.tree.unflatten(structure, [jnp.asarray(read[i]) for i in range(len(leaves))])
    assert_same_bits(restored.validate(), stored)
    assert_same_bits(pickle.loads(pickle.dumps(stored)).validate(), stored)


NAMES = ("levels", "list_headers", "list_entries", "key_list_headers", "key_list_entries")


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_corrupted_plan_is_an_error(stored, data):
    name = data.draw(st.sampled_from(NAMES))
    x = np.array(getattr(stored, name))
    at = data.draw(st.integers(0, x.size - 1))
    value = data.draw(st.integers(0, 2**32 - 1))
    # A header may call fewer granules full than are: the keys of the others are tested in vain.
    is_fewer_full = name == "list_headers" and at % 4 == 1 and value < x.flat[at]
    if x.flat[at] == value or is_fewer_full:
        return
    x.flat[at] = value
    broken = dataclasses.replace(stored, **{name: jnp.asarray(x)})
    with pytest.raises(ValueError, match=r"plan\..*corrupted"):
        broken.validate()
    # Attention with it is wrong, but reads nothing that is not there.
    q = jnp.ones((1, 256, 4, 16))
    assert (
        tiled_attention(q, q[:, :, :2], q[:, :, :2], plan=broken, is_causal=True).shape == q.shape
    )


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"local_window_size": (40, 20)}, {"is_causal": True, **SHORTER}],
)
def test_granules_that_are_cut_cannot_be_called_full(options, rng):
    """Shaders test no key of a granule that a plan calls full."""
    q, k, v = (normal(rng, 1, 128, n, 8) for n in (4, 2, 2))
    plan = plan_tiles(q, k, v, Adaptation(budget=1.0, query_tile=TILE), **options).validate()
    headers = np.array(plan.list_headers)
    assert (headers[..., 1] < headers[..., 2]).any()
    headers[..., 1] = headers[..., 2]
    broken = dataclasses.replace(plan, list_headers=jnp.asarray(headers))
    with pytest.raises(ValueError, match=r"plan\.list_.*corrupted"):
        broken.validate()


def test_a_price_that_is_no_number_is_an_error(stored, tmp_path):
    broken = dataclasses.replace(stored, log_lambda=stored.log_lambda * jnp.nan)
    broken.save(tmp_path / "plan")
    with pytest.raises(ValueError, match=r"plan\.log_lambda: the plan is corrupted"):
        jax_aat.TilePlan.load(tmp_path / "plan")


def test_a_plan_that_cannot_be_written_leaves_the_file(stored, tmp_path):
    stored.save(tmp_path / "plan")
    abstract = jax.eval_shape(lambda: stored)
    with pytest.raises(ValueError, match="plan: its arrays have no values"):
        abstract.save(tmp_path / "plan")
    assert_same_bits(jax_aat.TilePlan.load(tmp_path / "plan"), stored)


def test_numbers_of_numpy_are_those_of_python(stored, tmp_path):
    adaptation = Adaptation(
        budget=np.float32(0.5),
        levels=(np.int32(0), np.int64(1), 2),
        query_tile=np.int64(16),
        stages=np.uint8(2),
        audit_rate=np.float64(0.5),
        replan_every=np.int64(1),
    )
    plan = dataclasses.replace(stored, adaptation=adaptation)
    plan.save(tmp_path / "plan")
    assert jax_aat.TilePlan.load(tmp_path / "plan").adaptation == adaptation
    assert type(adaptation.budget) is float
    assert type(adaptation.query_tile) is int


def test_a_plan_without_values_has_a_name(stored):
    q = jnp.ones((1, 256, 4, 16))
    call = functools.partial(tiled_attention, q, q[:, :, :2], q[:, :, :2], is_causal=True)
    report = jax.eval_shape(lambda: call(plan=stored, return_report=True)[1])
    for x in (jax.eval_shape(lambda: stored), report):
        assert "no values" in str(x)
        assert repr(x)

    def traced(x):
        assert "no values" in str(dataclasses.replace(stored, log_lambda=x))
        return x

    jax.make_jaxpr(traced)(stored.log_lambda)


def test_a_plan_of_another_size_is_an_error(stored):
    q = jnp.ones((1, 256, 4, 16))
    wrong = dataclasses.replace(stored, list_entries=stored.list_entries[..., :-1])
    with pytest.raises(ValueError, match=r"plan\.list_entries: got"):
        wrong.validate()
    for name, broken in (
        ("list_entries", stored.list_entries[..., :-1]),
        ("list_headers", stored.list_headers.astype(jnp.float32)),
        ("key_list_headers", stored.key_list_headers[:, :, :1]),
        ("log_lambda", stored.log_lambda[0]),
    ):
        with pytest.raises(ValueError, match=rf"plan\.{name}: got .*, expected (uint|float)32\["):
            untraced_attention(
                *(q, q[:, :, :2], q[:, :, :2]),
                plan=dataclasses.replace(stored, **{name: broken}),
                is_causal=True,
            )
    for arrays, options in (
        ((q[:, :255], q[:, :, :2], q[:, :, :2]), {"is_causal": True}),
        ((q, q[:, :, :2], q[:, :, :2]), {}),
        ((q, q, q), {"is_causal": True}),
        ((jnp.repeat(q, 2, 0), *(jnp.ones((2, 256, 2, 16)),) * 2), {"is_causal": True}),
    ):
        with pytest.raises(ValueError, match="plan: was made for"):
            untraced_attention(*arrays, plan=stored, **options)


def test_a_plan_says_what_it_may_hide(stored, tmp_path):
    """Hidden keys that nothing hides are an error, unless lengths and the like may have."""
    hidden = stored.grid, stored.adaptation, True, (-1, -1), 1
    jax_aat.TilePlan.unfilled(*hidden, hides=True).validate()
    unfilled = jax_aat.TilePlan.unfilled(*hidden)
    assert jax.tree.structure(unfilled) == jax.tree.structure(stored)
    with pytest.raises(ValueError, match="a level that causality or window forbids"):
        unfilled.validate()
    plan = dataclasses.replace(stored, hides=True)
    plan.save(tmp_path / "plan")
    read = jax_aat.TilePlan.load(tmp_path / "plan")
    assert jax.tree.structure(read) == jax.tree.structure(plan)
