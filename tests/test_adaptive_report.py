"""State and report of `tiled_attention`: what a call says of itself is what it did."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from comparison import as_users_compile, assert_same_bits, normal

import jax_aat
from jax_aat.audit import Audit
from jax_aat.levels import EXACT, HIDDEN, MEAN, unpack_levels

B, T, N, K, H = 2, 128, 4, 2, 8
ADAPTATION = jax_aat.Adaptation(budget=0.5, query_tile=32, audit_rate=1 / 16)
attend = functools.partial(jax_aat.tiled_attention, is_causal=True, implementation="xla")


def inputs(rng, dtype="float32", queries=T):
    shapes = ((queries, N), (T, K), (T, K))
    return tuple(normal(rng, B, length, heads, H, dtype=dtype) for length, heads in shapes)


@pytest.fixture(scope="module")
def reported():
    """Arguments, output, report and plan of a call, with every row audited and certified."""
    rng = np.random.default_rng(5)
    q, k, v = inputs(rng)
    adaptation = dataclasses.replace(ADAPTATION, audit_rate=1.0)
    call = functools.partial(attend, adaptation=adaptation, return_report="certified")
    out, report = as_users_compile(call)(q, k, v)
    plan = jax_aat.plan_tiles(q, k, v, adaptation, is_causal=True)
    arrays = (np.asarray(x) for x in (q, k, v))
    exact = oracle.Attention(oracle.Problem(*arrays, scale=H**-0.5, causal=True)).out
    return out, report, plan, exact


def test_levels_and_flops_are_those_of_the_lists(reported):
    _, report, plan, _ = reported
    grid = plan.grid
    level = np.asarray(unpack_levels(plan.levels, grid.granules))
    seen = np.arange(grid.granules) * 16 < (np.arange(grid.tiles)[:, None] + 1) * grid.positions
    for head in range(N):
        of_list = level[:, head // grid.tile_heads]
        counts = [((of_list == which) & seen).sum() for which in range(4)]
        np.testing.assert_allclose(report.levels[head], counts / (B * seen.sum()), 1e-5)
    headers = np.asarray(plan.list_headers, np.int64)
    rows = 16 * headers[..., 2] + headers[..., 3]
    flops = 4 * H * grid.positions * rows.sum((0, 2)) / (B * T)
    np.testing.assert_allclose(report.flops, np.repeat(flops, grid.tile_heads), 1e-5)
    np.testing.assert_allclose(report.dense_flops, 4 * H * (T + 1) / 2, 1e-5)
    tiled = 4 * H * grid.positions * 16 * seen.sum() / T
    np.testing.assert_allclose(report.tiled_flops, tiled, 1e-5)
    diagonal = seen & (np.arange(grid.granules) * 16 + 16 > np.arange(grid.tiles)[:, None] * 16)
    np.testing.assert_allclose(report.forced, diagonal.sum() / seen.sum(), 1e-5)
    assert (report.planning_flops > 0).all()
    assert (report.overhead > 0).all()
    assert (report.change == 0).all()
    np.testing.assert_allclose(report.relative_flops.mean(), ADAPTATION.budget, 0.1)


def test_flops_are_those_of_queries_that_exist(rng):
    """Of a last tile with fewer positions than the others, and of a last granule likewise."""
    length = 100
    q, k, v = (x[:, :length] for x in inputs(rng))
    adaptation = dataclasses.replace(ADAPTATION, audit_rate=0.0, levels=(0, 1))
    _, report = attend(q, k, v, adaptation=adaptation, return_report=True)
    plan = jax_aat.plan_tiles(q, k, v, adaptation, is_causal=True)
    grid = plan.grid
    level = np.asarray(unpack_levels(plan.levels, grid.granules))
    sizes = np.minimum(16, length - 16 * np.arange(grid.granules))
    first = np.arange(grid.tiles) * grid.positions
    positions = np.minimum(grid.positions, length - first)
    assert positions[-1] < grid.positions
    rows = np.where(level == EXACT, sizes, 0).sum(-1) + (level == MEAN).sum(-1)
    flops = 4 * H * (rows * positions).sum((0, 2)) / (B * length)
    np.testing.assert_allclose(report.flops, np.repeat(flops, grid.tile_heads), 1e-5)
    seen = np.minimum(first + positions, length)[:, None] > 16 * np.arange(grid.granules)
    tiled = 4 * H * (positions * (seen * sizes).sum(-1)).sum() / length
    np.testing.assert_allclose(report.tiled_flops, tiled, 1e-5)
    # Of granules that a tile sees in part, what its queries do not see.
    query, key = np.arange(length)[:, None], np.arange(length)
    cut = 16 * (key // 16) + 15 > query // grid.positions * grid.positions
    cut &= 16 * (key // 16) < (query // grid.positions + 1) * grid.positions
    hidden = 4 * H * (cut & (key > query)).sum() / length
    np.testing.assert_allclose(report.hidden_flops, hidden, 1e-4)


@pytest.mark.parametrize("lengths", [{}, {"query_seq_lengths": jnp.array([97, 70])}], ids=str)
def test_exact_attention_costs_no_more_than_reading_all_that_tiles_see(lengths, rng):
    """Also where pairs are counted by granules, as segments hide keys."""
    q, k, v = (x[:, :100] for x in inputs(rng))
    segments = jnp.broadcast_to(jnp.arange(100) // 20, (B, 100))
    adaptation = dataclasses.replace(ADAPTATION, audit_rate=0.0)
    call = functools.partial(attend, query_segment_ids=segments, key_value_segment_ids=segments)
    _, report = call(q, k, v, adaptation=adaptation, return_report=True, **lengths)
    assert (report.dense_flops <= report.tiled_flops * (1 + 1e-6)).all()


def test_only_calls_that_plan_count_planning(rng):
    q, k, v = inputs(rng)
    call = as_users_compile(functools.partial(attend, adaptation=ADAPTATION, return_report=True))
    _, made = call(q, k, v)
    _, given = call(q, k, v, plan=jax_aat.plan_tiles(q, k, v, ADAPTATION, is_causal=True))
    assert (given.flops == made.flops).all()
    # Means of keys and values, states, and what each query takes of these.
    state = 2 * H**2 * K / N, (2 * H + 4) * H
    np.testing.assert_allclose(given.planning_flops, 4 * H * K / N + sum(state), 1e-6)
    adaptation = dataclasses.replace(ADAPTATION, replan_every=2)
    state = jax_aat.ResolutionState.init(q, k, adaptation, is_causal=True)
    call = as_users_compile(functools.partial(attend, adaptation=adaptation, return_report=True))
    for expected in (made, given, made):
        _, state, report = call(q, k, v, state=state)
        np.testing.assert_allclose(report.planning_flops, expected.planning_flops, 1e-6)


def test_says_what_audits_cost(reported):
    """Every row of this call was audited: as much as attention that is not causal."""
    _, report, _, _ = reported
    np.testing.assert_allclose(report.audit_flops, 4 * H * T, 1e-6)


def test_audits_of_long_sequences_take_no_more_rows(rng, monkeypatch):
    adaptation = dataclasses.replace(ADAPTATION, audit_rate=None)
    assert adaptation.audit_rate_for(4096) == 1 / 64
    assert adaptation.audit_rate_for(131072) == 64 / 131072
    monkeypatch.setattr(jax_aat.adaptation, "_AUDITED_ROWS", 1)
    call = functools.partial(attend, adaptation=adaptation, return_report=True)
    _, report = call(*inputs(rng))
    assert (report.audit.rows == B).all()


def test_tells_what_options_force_from_what_causality_does(rng):
    """A bias that varies in three granules of eight; the last tile alone sees the last of them."""
    q, k, v = inputs(rng)
    bias = np.zeros((1, 1, 1, T), np.float32)
    for granule in (0, 3, 7):
        bias[..., 16 * granule] = 1
    call = functools.partial(attend, adaptation=ADAPTATION, return_report=True)
    _, plain = call(q, k, v)
    _, report = call(q, k, v, jnp.asarray(bias))
    grid = ADAPTATION.grid(T, T, N, K)
    first = np.arange(grid.tiles)[:, None] * grid.positions
    granule = np.arange(grid.granules)
    seen = 16 * granule < first + grid.positions
    diagonal = seen & (16 * granule + 15 > first)
    by_bias = seen & ~diagonal & np.isin(granule, (0, 3, 7))
    assert by_bias.any()
    np.testing.assert_allclose(report.forced_by_options, by_bias.sum() / seen.sum(), 1e-6)
    np.testing.assert_allclose(report.forced - report.forced_by_options, plain.forced, 1e-5)
    assert (plain.forced_by_options == 0).all()
    assert "by options" in str(report)
    assert "by options" not in str(plain)


def test_a_budget_that_is_kept(reported):
    _, report, _, _ = reported
    assert 0.9 < report.budget_spent <= 1 + 1e-5
    np.testing.assert_allclose(report.allowed_flops, ADAPTATION.budget * report.dense_flops, 1e-6)
    np.testing.assert_allclose(report.budget_spent, 2 * report.relative_flops.mean(), 1e-5)
    assert "budget" not in str(report)
    unlimited = dataclasses.replace(report, allowed_flops=jnp.full(N, jnp.inf))
    assert unlimited.budget_spent == 0
    assert "budget" not in str(unlimited)


def test_says_when_a_budget_is_too_small_to_keep(rng):
    """Only what must be exact is exact then, and that costs more than allowed."""
    adaptation = jax_aat.Adaptation(budget=0.05, query_tile=32, audit_rate=0.0)
    call = jax.jit(functools.partial(attend, adaptation=adaptation, return_report=True))
    _, report = call(*inputs(rng))
    np.testing.assert_allclose(report.levels[:, EXACT], report.forced, 1e-6)
    spent = float(report.relative_flops.mean())
    assert spent > 0.06
    np.testing.assert_allclose(report.budget_spent, spent / 0.05, 1e-5)
    said = str(report).splitlines()[-1]
    assert f"the budget is not kept: {spent:.1%} of the FLOPs of exact attention" in said
    assert "5.0% are allowed" in said


def test_audit_of_every_row_is_the_true_error(reported):
    out, report, _, exact = reported
    error = ((np.asarray(out) - exact) ** 2).sum((0, 1, 3))
    true = error / (exact**2).sum((0, 1, 3))
    np.testing.assert_allclose(report.relative_error, np.sqrt(true), 1e-3)
    np.testing.assert_allclose(report.information_flow_quality, 1 - true, 1e-3)
    expected = report.relative_flops / (1 - true)
    np.testing.assert_allclose(report.compute_to_efficiency, expected, 1e-3)
    assert (report.adaptation_efficiency > 0.5).all()
    assert (report.adaptation_efficiency <= 1 + 1e-5).all()


def test_no_row_exceeds_its_certified_bound(reported):
    out, report, _, exact = reported
    assert report.bound.shape == (B, T, N)
    error = np.linalg.norm(np.asarray(out) - exact, axis=-1)
    assert (error <= np.asarray(report.bound)).all()
    assert np.isfinite(report.bound).all()


def test_prints_a_row_a_head(reported):
    _, report, _, _ = reported
    head, *rows = str(report).splitlines()
    for column in ("exact", "mean", "super-tile", "FLOPs", "IFQ", "CER", "AE", "error", "dR/dt"):
        assert column in head.split()
    assert [row.split()[0] for row in rows] == [str(i) for i in range(N)]
    assert f"{report.information_flow_quality[2]:.4f}" in rows[2]
    printed = jax.jit(lambda r: len(str(r)) * jnp.ones(()))(report)
    assert printed < 60


CASES = {
    "lengths": lambda rng: {
        "query_seq_lengths": jnp.array([100, 128]),
        "key_value_seq_lengths": jnp.array([128, 70]),
    },
    "bias of keys": lambda rng: {
        "bias": jnp.repeat(normal(rng, B, 1, 1, T // 16), 16, axis=-1),
    },
    "bias that varies": lambda rng: {"bias": normal(rng, 1, N, T, T)},
    "mask": lambda rng: {"mask": jnp.asarray(rng.random((B, 1, 1, T)) < 0.97)},
    "window": lambda rng: {},
}
STATIC = {"window": {"local_window_size": (70, 0)}, "bias of keys": {"logits_soft_cap": 3.0}}


@pytest.mark.parametrize("name", CASES)
def test_certifies_and_audits_every_option(name, rng):
    q, k, v = inputs(rng)
    options = CASES[name](rng)
    adaptation = dataclasses.replace(ADAPTATION, audit_rate=1.0, levels=(0, 1))
    static = functools.partial(attend, **STATIC.get(name, {}))
    call = functools.partial(static, adaptation=adaptation, return_report="certified")
    out, report = jax.jit(call)(q, k, v, **options)
    exact = jax.jit(static)(q, k, v, **options)
    error = np.linalg.norm(np.asarray(out - exact), axis=-1)
    assert (error <= np.asarray(report.bound)).all()
    true = np.sqrt((error**2).sum((0, 1)) / (np.asarray(exact) ** 2).sum((0, 1, 3)))
    np.testing.assert_allclose(report.relative_error, true, 2e-3, 1e-6)
    if name == "bias that varies":
        np.testing.assert_allclose(report.forced, 1)
        np.testing.assert_allclose(report.levels[:, EXACT], 1)


def test_returns_what_is_asked_for_in_order(rng):
    q, k, v = inputs(rng)
    state = jax_aat.ResolutionState.init(q, k, ADAPTATION)
    adaptive = functools.partial(attend, adaptation=ADAPTATION, return_report=True)
    call = jax.jit(functools.partial(adaptive, return_residual=True))
    out, residual, following, report = call(q, k, v, state=state)
    assert residual.shape == (B, T, N)
    assert isinstance(report, jax_aat.Report)
    assert report.bound is None
    assert following.step == 1
    alone = jax.jit(functools.partial(attend, adaptation=ADAPTATION))(q, k, v)
    np.testing.assert_allclose(out, alone, 1e-5, 1e-6)
    one, following, report = jax.eval_shape(
        functools.partial(adaptive, return_report="certified"),
        *(q[0], k[0], v[0]),
        state=jax_aat.ResolutionState.init(q[0], k[0], ADAPTATION),
    )
    assert one.shape == (T, N, H)
    assert report.bound.shape == (T, N)
    assert following.levels.shape[0] == 1


def test_a_tolerance_is_kept_by_the_real_router():
    """From far too fine and far too coarse a lambda, on keys that come in clusters."""
    adaptation = jax_aat.Adaptation(tolerance=0.1, query_tile=32)

    def draw(i):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(3), i), 4)
        topics = jax.random.normal(keys[0], (1, T // 16, K, H))
        k = jnp.repeat(topics, 16, 1) + 0.6 * jax.random.normal(keys[1], (1, T, K, H))
        q = jnp.repeat(jnp.repeat(topics[:, ::-1], 16, 1), N // K, 2)
        q = q + jax.random.normal(keys[2], (1, T, N, H))
        return q, k, k + jax.random.normal(keys[3], (1, T, K, H))

    @jax.jit
    def run(state):
        def step(state, i):
            q, k, v = draw(i)
            out, state = attend(q, k, v, adaptation=adaptation, state=state)
            exact = attend(q, k, v)
            return state, jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)

        return jax.lax.scan(step, state, jnp.arange(60))

    for start in (1e-10, 1.0):
        q, k, _ = draw(0)
        state, error = run(jax_aat.ResolutionState.init(q, k, adaptation, threshold=start))
        assert 0.1 / 1.3 < error.mean() < 0.13, start
        assert np.isfinite(state.log_lambda).all()


@pytest.mark.parametrize("alike", [True, False])
def test_says_where_nothing_is_saved(alike, rng):
    """Keys and values that are the same in every granule cost little; in noise all is exact."""
    length, adaptation = 512, jax_aat.Adaptation(tolerance=0.03, query_tile=32)
    q = normal(rng, 1, length, N, H)
    k, v = (normal(rng, 1, length, K, H) for _ in range(2))
    if alike:
        k, v = (jnp.repeat(x[:, ::16], 16, axis=1) for x in (k, v))

    def step(state, _):
        _, state, report = attend(q, k, v, adaptation=adaptation, state=state, return_report=True)
        return state, report

    state = jax_aat.ResolutionState.init(q, k, adaptation, is_causal=True)
    run = jax.jit(lambda state: jax.lax.scan(step, state, length=20)[1])
    last = jax.tree.map(lambda x: x[-1], run(state))
    assert ("nothing is saved: 1" in str(last)) != alike
    assert (last.relative_error < 0.03 if alike else last.levels[:, EXACT] > 0.999).all()


def test_a_plan_serves_several_calls(rng):
    adaptation = jax_aat.Adaptation(threshold=1e-3, query_tile=32, replan_every=3)
    q, k, v = inputs(rng)
    state = jax_aat.ResolutionState.init(q, k, adaptation, is_causal=True)

    @as_users_compile
    def run(state, scales):
        def step(state, scale):
            _, state = attend(q * scale, k, v, adaptation=adaptation, state=state)
            return state, state.levels

        return jax.lax.scan(step, state, scales)

    state, levels = run(state, jnp.array([1.0, 5.0, 0.1, 5.0, 1.0]))
    np.testing.assert_array_equal(levels[0], levels[1])
    np.testing.assert_array_equal(levels[0], levels[2])
    assert (levels[2] != levels[3]).any()
    np.testing.assert_array_equal(levels[3], levels[4])
    assert_same_bits(state.plan.levels, levels[4])
    state.plan.validate()


def test_levels_settle(rng):
    """The same call again changes nothing; a slightly other lambda hardly anything."""
    adaptation = jax_aat.Adaptation(tolerance=0.05, query_tile=32)
    plan = jax.jit(functools.partial(jax_aat.plan_tiles, adaptation=adaptation, is_causal=True))
    changed = np.zeros(2, int)
    # One draw of inputs may have no price so near to lambda.
    for _ in range(16):
        q, k, v = inputs(rng)
        first = jax_aat.ResolutionState.init(q, k, adaptation, threshold=3e-3)
        levels = plan(q, k, v, state=first).levels
        moved = dataclasses.replace(first, log_lambda=first.log_lambda + 0.15)
        settled = dataclasses.replace(moved, levels=levels)
        plans = [plan(q, k, v, state=state).levels for state in (moved, settled)]
        changed += [(unpack_levels(x, 8) != unpack_levels(levels, 8)).sum() for x in plans]
    assert changed[0] > 0
    assert changed[1] == 0


def test_state_and_report_under_transformations(rng):
    q, k, v = inputs(rng)
    state = jax_aat.ResolutionState.init(q, k, ADAPTATION)

    def loss(q, state):
        out, state, report = attend(q, k, v, adaptation=ADAPTATION, state=state, return_report=True)
        return jnp.square(out).sum(), (state, report)

    gradient, (following, report) = jax.jit(jax.grad(loss, has_aux=True))(q, state)
    alone = jax.jit(jax.grad(lambda q: jnp.square(attend(q, k, v, adaptation=ADAPTATION)).sum()))
    np.testing.assert_allclose(gradient, alone(q), rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(following) == jax.tree.structure(state)

    two = jnp.stack([q, 2 * q])
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    _, (_, reports) = jax.jit(jax.vmap(loss))(two, states)
    assert reports.flops.shape == (2, N)
    np.testing.assert_allclose(reports.audit.error[0], report.audit.error, rtol=1e-4)
    assert len(str(reports).splitlines()) == N + 1
    assert (reports.audit.error[0] != reports.audit.error[1]).any()


def test_changes_are_counted_from_the_last_call(rng):
    q, k, v = inputs(rng)
    adaptation = jax_aat.Adaptation(threshold=3e-3, query_tile=32, audit_rate=1 / 16)
    state = jax_aat.ResolutionState.init(q, k, adaptation)
    call = jax.jit(functools.partial(attend, adaptation=adaptation, return_report=True))
    _, state, first = call(q, k, v, state=state)
    _, state, same = call(q, k, v, state=state)
    _, state, other = call(5 * q, k, v, state=state)
    assert (first.change == 0).all()
    assert (same.change == 0).all()
    assert (other.change > 0).all()
    assert (unpack_levels(state.levels, 8) != HIDDEN).any()
    assert state.audit.rows[0] == B * T / 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"return_report": "yes"}, "return_report: got 'yes'"),
        ({"adaptation": None, "return_report": True}, "return_report: needs an adaptation"),
        ({"adaptation": None, "state": "init"}, "state: needs an adaptation"),
        ({"state": "wrong"}, "state: was made for levels"),
        ({"adaptation": jax_aat.Adaptation(tolerance=0.1)}, "a tolerance needs a state"),
        (
            {"adaptation": dataclasses.replace(ADAPTATION, replan_every=2), "state": "init"},
            "another replan_every",
        ),
    ],
)
def test_errors_say_what_to_do(change, message, rng):
    q, k, v = inputs(rng)
    arguments = {"adaptation": ADAPTATION} | change
    if arguments.get("state") == "init":
        arguments["state"] = jax_aat.ResolutionState.init(q, k, ADAPTATION)
    if arguments.get("state") == "wrong":
        arguments["state"] = jax_aat.ResolutionState.init(q[:, :64], k, ADAPTATION)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, **arguments)


def test_of_a_state_that_is_none(rng):
    q, k, v = inputs(rng)
    with pytest.raises(TypeError, match=r"expected a jax_aat\.ResolutionState"):
        attend(q, k, v, adaptation=ADAPTATION, state=3)
    with pytest.raises(ValueError, match="threshold: got 0"):
        jax_aat.ResolutionState.init(q, k, ADAPTATION, threshold=0)


@pytest.mark.parametrize("given", [1, None, np.array([1, 2]), jnp.bool_(True)], ids=repr)
def test_what_asks_for_a_report_is_no_array(given, rng):
    q, k, v = inputs(rng)
    with pytest.raises(
        TypeError, match=r"return_report: got .*expected False, True or 'certified'"
    ):
        jax_aat.tiled_attention(q, k, v, adaptation=ADAPTATION, return_report=given)


def test_a_report_says_that_no_query_sees_a_key(rng):
    q, k, v = inputs(rng)
    none = jnp.zeros(B, jnp.int32)
    report = jax_aat.tiled_attention(
        q, k, v, key_value_seq_lengths=none, adaptation=ADAPTATION, return_report=True,
        implementation="xla",
    )[1]  # fmt: skip
    assert str(report) == f"Report({N} heads; no query sees a key)"


def test_intervals_do_not_depend_on_who_was_asked_before():
    """With x64 and without: a table in float64 would be taken for one in float32."""
    audit = jax.tree.map(lambda x: x + 1, Audit.empty(13))
    with jax.enable_x64(True):
        first = np.asarray(audit.interval)
    np.testing.assert_array_equal(audit.interval, first)
