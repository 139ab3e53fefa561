"""`ResolutionState`: the controller on a stand-in for attention, hysteresis, dR/dt."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from comparison import assert_close, assert_same_bits, normal

from jax_aat import Adaptation, plan_tiles, tiled_attention
from jax_aat.audit import Audit
from jax_aat.levels import (
    EXACT,
    HIDDEN,
    MEAN,
    SUPER_MEAN,
    Grid,
    pack_levels,
    settled,
    unpack_levels,
)
from jax_aat.state import REST, ResolutionState, resolution_change

GRID = Grid(1024, 1024, 4, 2, 128, 1024)  # two lists of two heads
ROWS, STEPS = 16, 200


def audit_of(error: jax.Array, shares: jax.Array) -> Audit:
    """The audit of rows with [rows, N] shares of a squared error of each list."""
    y = jnp.repeat(error, 2) ** 2 * shares / ROWS
    ones = jnp.ones(4)
    return Audit(ROWS * ones, ROWS * ones, y.sum(0), (y**2).sum(0), y.max(0), ones, ones, ones)


@functools.partial(jax.jit, static_argnames=("tolerance", "power"))
def drift(state, shares, sizes, tolerance, power):
    """True errors [steps, L] of lists whose error grows as a power of lambda, and drifts."""

    def step(state, now):
        shares, time = now
        size = jnp.exp(sizes + jnp.sin(time / 30) / 2 + power * state.log_price)
        error = 0.8 * size / jnp.sqrt(1 + size**2) + 1e-7
        return state.after(
            state.levels, audit_of(error, shares), jnp.full(2, 0.5), tolerance
        ), error

    return jax.lax.scan(step, state, (shares, jnp.arange(float(STEPS))))[1]


@pytest.mark.parametrize("tolerance", [0.03, 0.1])
@pytest.mark.parametrize("power", [0.4, 0.8])
@pytest.mark.parametrize("start", [1e-12, 1e-6, 1e-3, 1.0, 1e6])
def test_keeps_a_tolerance_from_any_lambda(start, power, tolerance, rng):
    state = ResolutionState.of_grid(GRID, 1, start)
    shares = jnp.asarray(rng.lognormal(-0.5, 1, (STEPS, ROWS, 4)), jnp.float32)
    sizes = jnp.asarray(rng.uniform(-2, 4, 2), jnp.float32)
    error = np.asarray(drift(state, shares, sizes, tolerance, power))
    assert (error.mean(0) < 1.3 * tolerance).all()
    assert (error.mean(0) > tolerance / 1.3).all()
    assert (error[50:] < 3 * tolerance).all()


def test_falls_back_to_exact_where_nothing_can_be_saved():
    """Both lists keep the tolerance, but the second spends more than dense attention for it."""
    shares = jnp.ones((ROWS, 4))

    @jax.jit
    def step(state, _):
        error = jnp.where(state.log_price > -jnp.inf, 0.05 * jnp.exp(state.log_price), 0)
        spent = jnp.where(state.log_price > -jnp.inf, jnp.array([0.4, 1.01]), 1.03)
        return state.after(state.levels, audit_of(error, shares), spent, 0.05), state.log_price

    _, prices = jax.lax.scan(step, ResolutionState.of_grid(GRID, 1), length=STEPS)
    exact = np.asarray(prices) == -np.inf
    assert not exact[:, 0].any()
    assert exact[50:, 1].mean() > 0.9
    # It asks again now and then.
    assert not exact[:, 1][50 : 50 + 2 * REST].all()


def test_without_an_audit_or_a_tolerance_lambda_stays():
    state = ResolutionState.of_grid(GRID, 1, 1e-3)
    audit = audit_of(jnp.full(2, 0.5), jnp.ones((ROWS, 4)))
    for after in (state.after(state.levels, None), state.after(state.levels, audit)):
        np.testing.assert_array_equal(after.log_lambda, state.log_lambda)
        assert after.step == 1
    np.testing.assert_allclose(after.audit.relative_error, 0.5, 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_of_a_call_that_is_not_finite_nothing_is_learnt(bad):
    state = ResolutionState.of_grid(GRID, 1, 1.0)
    good = audit_of(jnp.array([0.06, 0.06]), jnp.ones((ROWS, 4)))
    spoilt = jax.tree.map(lambda x: x.at[0].set(bad), good)

    def after(state, audit):
        return state.after(state.levels, audit, jnp.full(2, 0.5), 0.05)

    start = after(after(state, good), good)
    once = after(start, spoilt)
    np.testing.assert_array_equal(once.log_lambda[..., 0], start.log_lambda[..., 0])
    assert (once.log_lambda[..., 1] < start.log_lambda[..., 1]).all()
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x[..., :2], y[..., :2]), once.audit, start.audit
    )
    assert (after(once, good).log_lambda < once.log_lambda).all()
    assert np.isfinite(after(state, spoilt).log_lambda).all()


def test_an_average_that_contradicts_the_audit_is_dropped():
    state = ResolutionState.of_grid(GRID, 1)
    for error in (0.1, 0.1, 1e-4):
        state = state.after(state.levels, audit_of(jnp.array([error, 0.1]), jnp.ones((ROWS, 4))))
    np.testing.assert_allclose(state.audit.relative_error, [1e-4, 1e-4, 0.1, 0.1], 1e-5)


def test_is_a_pytree_of_fixed_shapes():
    state = ResolutionState.of_grid(GRID, 3)
    audit = audit_of(jnp.full(2, 0.5), jnp.ones((ROWS, 4)))
    after = jax.jit(lambda s: s.after(s.levels, audit, jnp.ones(2), 0.1))(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    mapped = jax.vmap(lambda s: s.after(s.levels, audit, jnp.ones(2), 0.1))(stacked)
    np.testing.assert_array_equal(mapped.log_lambda[1], after.log_lambda)


def test_levels_change_only_beyond_the_margin():
    levels = {"finer": [0, 0, 0, 1, 1], "level": [0, 0, 1, 1, 1], "coarser": [0, 1, 1, 2, 1]}
    by_name = {name: jnp.array(x) for name, x in levels.items()}
    previous = jnp.array([MEAN, MEAN, EXACT, SUPER_MEAN, HIDDEN])
    np.testing.assert_array_equal(settled(**by_name, previous=previous), [0, 1, 0, 2, 1])


def test_a_state_of_other_levels_brings_no_means(implementation, rng):
    """They lie between exact and hidden, where hysteresis would keep them."""
    q, k, v = (normal(rng, 1, 1024, 2, 8) for _ in range(3))
    adaptation = Adaptation(threshold=1.5e-5, levels=(0,))
    plan = functools.partial(plan_tiles, q, k, v, adaptation, implementation=implementation)
    state = ResolutionState.init(q, k, adaptation)
    alone = plan()
    for level in (MEAN, SUPER_MEAN):
        levels = pack_levels(jnp.full((1, 2, 16, 64), level))
        assert_same_bits(plan(state=dataclasses.replace(state, levels=levels)), alone)
    level = unpack_levels(alone.levels, 64)
    assert set(np.unique(level)) == {EXACT, HIDDEN}


def test_resolution_change_counts_what_both_see():
    old = jnp.array([[[[EXACT, MEAN, SUPER_MEAN, HIDDEN]], [[EXACT, EXACT, EXACT, EXACT]]]])
    new = jnp.array([[[[EXACT, EXACT, MEAN, EXACT]], [[EXACT, EXACT, EXACT, HIDDEN]]]])
    for super_tile, rows in ((1024, -6), (256, -4)):
        grid = Grid(32, 64, 2, 2, 32, super_tile)
        change = resolution_change(pack_levels(new), pack_levels(old), grid)
        np.testing.assert_allclose(change, [(4 - rows) / 3, 0])


def test_a_state_and_its_plan_go_through_a_checkpoint(rng, tmp_path):
    """What Orbax restores is the same bits, and the next call uses the plan that was saved."""
    q, k, v = (normal(rng, 1, 96, heads, 8) for heads in (2, 1, 1))
    adaptation = Adaptation(tolerance=0.1, query_tile=16, replan_every=2, audit_rate=1 / 16)
    new = functools.partial(ResolutionState.init, q, k, adaptation, is_causal=True)

    @jax.jit
    def call(q, state):
        return tiled_attention(
            q, k, v, is_causal=True, adaptation=adaptation, state=state, implementation="xla"
        )

    _, state = call(q, new(seed=3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", new())
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same_bits(restored, state)
    restored.plan.validate()
    out, following = call(2 * q[:, ::-1], restored)
    expected, expected_following = call(2 * q[:, ::-1], state)
    assert_same_bits((out, following), (expected, expected_following))
    assert_same_bits(following.plan.levels, state.plan.levels)
    assert following.step == 2


def test_a_plan_of_a_state_hides_no_more_than_a_call(rng):
    """A call without lengths that reuses the plan of one with lengths sees every key exactly."""
    q, k, v = (normal(rng, 1, 96, heads, 8) for heads in (2, 1, 1))
    adaptation = Adaptation(threshold=1e-12, query_tile=32, replan_every=4, audit_rate=0)
    call = functools.partial(tiled_attention, q, k, v, adaptation=adaptation, implementation="xla")
    new = ResolutionState.init(q, k, adaptation)

    @jax.jit
    def calls(state):
        """One with lengths, two without by a scan, one with lengths."""
        _, state = call(state=state, key_value_seq_lengths=jnp.array([20]))
        state, outs = jax.lax.scan(lambda s, _: call(state=s)[::-1], state, length=2)
        short, state = call(state=state, key_value_seq_lengths=jnp.array([20]))
        return outs, short, state

    exact = functools.partial(tiled_attention, q, k, v, implementation="xla")
    outs, short, state = calls(new)
    assert_close(outs, jnp.stack([exact()] * 2), 1e-5)
    assert_close(short, exact(key_value_seq_lengths=jnp.array([20])), 1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(new)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), new)
    assert_close(jax.jit(jax.vmap(calls))(stacked)[0][1], outs, 1e-5)


def test_a_state_of_another_call_is_an_error(rng):
    q, k = normal(rng, 1, 32, 2, 8), normal(rng, 1, 32, 1, 8)
    adaptation = Adaptation(threshold=1e-3, query_tile=16, replan_every=2)
    state = ResolutionState.init(q, k, adaptation)
    call = functools.partial(tiled_attention, q, k, k, implementation="xla", state=state)
    other = dataclasses.replace(adaptation, threshold=1e-2)
    with pytest.raises(ValueError, match=r"state: was made for Adaptation\(.*=0\.001.*has Adapt"):
        call(adaptation=other)
    with pytest.raises(ValueError, match="state: was made for is_causal of False, the call has T"):
        call(adaptation=adaptation, is_causal=True)


@pytest.mark.parametrize("replan_every", [1, 2])
def test_a_state_may_be_donated_from_the_first_call_on(rng, replan_every):
    q, k = normal(rng, 1, 32, 2, 8), normal(rng, 1, 32, 1, 8)
    adaptation = Adaptation(threshold=1e-3, query_tile=16, replan_every=replan_every)
    attention = functools.partial(tiled_attention, adaptation=adaptation, implementation="xla")
    donating = jax.jit(lambda state: attention(q, k, k, state=state), donate_argnums=0)
    first, state = donating(ResolutionState.init(q, k, adaptation))
    assert_same_bits(first, attention(q, k, k, state=ResolutionState.init(q, k, adaptation))[0])
    assert donating(state)[1].step == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adaptation": None}, TypeError, "adaptation: got None .*expected a jax_aat.Adaptation"),
        ({"threshold": "x"}, TypeError, "threshold: got 'x' .*expected a Python number"),
        ({"threshold": 0.0}, ValueError, "threshold: got 0.0, expected a positive number"),
        ({"seed": 0.5}, TypeError, "seed: got 0.5 .*expected an integer"),
        ({"seed": -1}, ValueError, "seed: got -1, expected one from 0 to"),
        ({"seed": 2**32}, ValueError, "seed: got 4294967296, expected one from 0 to"),
        ({"is_causal": "no"}, TypeError, "is_causal: got 'no' .*expected True or False"),
        ({"key": jnp.zeros((32, 1, 8))}, ValueError, "query and key: got shapes"),
        ({"key": jnp.zeros((2, 32, 1, 8))}, ValueError, "query and key: got shapes"),
        ({"key": jnp.zeros((1, 32, 3, 8))}, ValueError, "N a multiple of K"),
        ({"key": jnp.zeros((1, 32, 1, 16))}, ValueError, "query and key: got shapes"),
    ],
)
def test_arguments_of_a_first_state_are_checked(change, error, message):
    given = {"query": jnp.zeros((1, 32, 2, 8)), "key": jnp.zeros((1, 32, 1, 8))}
    with pytest.raises(error, match=message):
        ResolutionState.init(**(given | {"adaptation": Adaptation(budget=0.5)} | change))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("levels", None, TypeError, "state.levels: got None .*expected an array"),
        ("levels", jnp.zeros((1, 1, 4, 1), jnp.int32), ValueError, "state.levels: got int32"),
        ("step", jnp.float32(0), ValueError, r"state.step: got float32\[\], expected int32\[\]"),
        ("log_lambda", jnp.zeros(7), ValueError, r"state.log_lambda: got float32\[7\], expected"),
        ("audit.norm", jnp.zeros(3), ValueError, r"state.audit.norm: got float32\[3\], expected"),
    ],
)
def test_arrays_of_a_state_are_checked(rng, name, value, error, message):
    q, k = normal(rng, 1, 32, 2, 8), normal(rng, 1, 32, 1, 8)
    adaptation = Adaptation(threshold=1e-3, query_tile=16)
    state = ResolutionState.init(q, k, adaptation)
    if name.startswith("audit."):
        changed = dataclasses.replace(state.audit, **{name.removeprefix("audit."): value})
        state = dataclasses.replace(state, audit=changed)
    else:
        state = dataclasses.replace(state, **{name: value})
    with pytest.raises(error, match=message):
        tiled_attention(q, k, k, adaptation=adaptation, state=state, implementation="xla")
