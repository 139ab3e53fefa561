"""Planning and `tiled_attention(adaptation=...)`: budget, quality, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import (
    as_users_compile,
    assert_close,
    assert_same_bits,
    in_fixed_order,
    normal,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_aat
from jax_aat import Adaptation
from jax_aat.levels import EXACT, HIDDEN, MEAN, SUPER_MEAN, Grid, pack_levels, unpack_levels
from jax_aat.problem import Options, Slot
from jax_aat.router import planning_flops
from jax_aat.visible_pairs import dense_flops, hidden_rows

TILE = 32
STATIC = ("adaptation", "is_causal", "local_window_size", "return_residual", "return_report")
SHORTER = {"key_value_seq_lengths": jnp.array([70])}
untraced_attention = functools.partial(jax_aat.tiled_attention, implementation="xla")
tiled_attention = jax.jit(untraced_attention, static_argnames=STATIC)
plan_tiles = jax.jit(jax_aat.plan_tiles, static_argnames=STATIC[:3])


def clustered(rng, length, heads=4, kv_heads=2, head_dim=16, batch=1):
    """Queries, keys and values of topics that last 16 positions."""
    centres = 1.5 * rng.normal(size=(24, head_dim))
    topic = np.repeat(rng.integers(0, 24, (batch, length // 16, kv_heads)), 16, axis=1)
    noise = lambda n: 0.3 * rng.normal(size=(batch, length, n, head_dim))  # noqa: E731
    asked = np.repeat(
        np.repeat(rng.integers(0, 24, (batch, length // 16, kv_heads)), 16, 1), heads // kv_heads, 2
    )
    q, k = 2 * centres[asked] + noise(heads), centres[topic] + noise(kv_heads)
    v = rng.normal(size=centres.shape)[topic] + noise(kv_heads)
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def spent(plan, q, k, adaptation, **options):
    """FLOPs of a call over those of exact attention, by batch entry."""
    operands, call = {Slot.Q: q, Slot.K: k, Slot.V: k}, Options(1.0, **options)
    planned = planning_flops(operands, call, plan.grid, adaptation)
    hidden = 4 * q.shape[-1] * plan.grid.query_tile * hidden_rows(operands, call, plan.grid)
    total = plan.row_flops(q.shape[-1]) - hidden + planned
    return np.asarray(total / dense_flops(operands, call, plan.grid))


@pytest.mark.parametrize("case", ["causal", "window", "lengths"])
def test_hidden_rows_are_those_of_granules_cut_by_the_boundary(case, rng):
    queries, keys, head_dim, tile = 150, 173, 8, 32
    q, k = normal(rng, 2, queries, 4, head_dim), normal(rng, 2, keys, 2, head_dim)
    operands, window = {Slot.Q: q, Slot.K: k, Slot.V: k}, (-1, -1)
    row, column = np.arange(queries)[:, None], np.arange(keys)
    sees = np.broadcast_to(column <= row, (2, queries, keys)).copy()
    if case == "window":
        window = (40, 9)
        sees &= column >= row - 40
    elif case == "lengths":
        operands |= {Slot.Q_LENGTHS: jnp.array([150, 77]), Slot.KV_LENGTHS: jnp.array([100, 173])}
        sees[0, :, 100:] = sees[1, 77:] = False
    grid = Grid(queries, keys, 4, 2, tile, 256)
    positions, tiles = grid.positions, grid.tiles
    sees = np.pad(sees, ((0, 0), (0, tiles * positions - queries), (0, 16 * grid.granules - keys)))
    blocks = sees.reshape(2, tiles, positions, grid.granules, 16)
    real = np.arange(tiles * positions) < np.array([[queries], [queries]])
    if case == "lengths":
        real &= np.arange(tiles * positions) < np.array([[150], [77]])
    real = real.reshape(2, tiles, positions)[:, :, :, None, None]
    exists = real & (np.arange(16 * grid.granules) < keys).reshape(grid.granules, 16)
    cut = blocks.any((2, 4)) & (blocks != exists).any((2, 4))
    pairs = cut.sum((1, 2)) * positions * 16 - np.where(cut[:, :, None, :, None], blocks, 0).sum(
        (1, 2, 3, 4)
    )
    call = Options(1.0, causal=True, window=window)
    hidden = hidden_rows(operands, call, grid)
    np.testing.assert_allclose(hidden, pairs * grid.lists / positions, 1e-5)


@pytest.mark.parametrize(("budget", "causal"), [(0.2, False), (0.35, True)])
def test_budget_is_kept(budget, causal, rng):
    structured = clustered(rng, 1536, batch=2)
    adaptation = Adaptation(budget=budget, query_tile=TILE)
    choose = functools.partial(plan_tiles, adaptation=adaptation, is_causal=causal)
    for kind in ("clustered", "random", "equal"):
        q, k, v = structured
        if kind == "random":
            q, k, v = (normal(rng, *x.shape) for x in structured)
        elif kind == "equal":
            q, k, v = (jnp.ones_like(x) for x in structured)
        plan = choose(q, k, v).validate()
        share = spent(plan, q, k, adaptation, causal=causal)
        assert (share <= budget).all(), (kind, share)
        # What is equal may all change its level at one price.
        assert kind == "equal" or (share >= 0.9 * budget).all(), (kind, share)


@pytest.mark.parametrize("adaptation", [Adaptation(threshold=0.0), Adaptation(budget=1.0)])
def test_exact_where_everything_is_to_be_exact(adaptation, rng):
    q, k, v = (normal(rng, 2, 200, n, 16) for n in (4, 2, 2))
    options = {"is_causal": True, "local_window_size": 100}
    out, lse = tiled_attention(q, k, v, adaptation=adaptation, return_residual=True, **options)
    expected = tiled_attention(q, k, v, return_residual=True, **options)
    assert_close((out, lse), expected, 1e-6)


def test_error_is_far_below_that_of_a_window(rng):
    q, k, v = clustered(rng, 2048)
    exact = tiled_attention(q, k, v, is_causal=True)
    adaptation = Adaptation(budget=0.25)
    error = relative_error(tiled_attention(q, k, v, is_causal=True, adaptation=adaptation), exact)
    position = np.arange(2048)
    window = position[:, None] - position < 2048 * 0.125
    mask = jnp.asarray(window | (position < 16))[None, None]
    windowed = relative_error(tiled_attention(q, k, v, mask=mask, is_causal=True), exact)
    assert error < windowed / 5, (error, windowed)


def test_heads_that_need_more_get_more(rng):
    q, k, v = (normal(rng, 1, 1024, 4, 16) for _ in range(3))
    q = q.at[:, :, 0].multiply(0.01)
    plan = plan_tiles(q, k, v, Adaptation(budget=0.4, query_tile=TILE))
    rows = plan.rows().sum(-1)[0]
    assert rows[0] < 0.5 * rows[1:].min(), rows


def test_the_nearest_granules_are_exact_at_any_price(rng):
    q, k, v = clustered(rng, 2048)
    plan = plan_tiles(q, k, v, Adaptation(threshold=1e20, query_tile=64), is_causal=True)
    level = np.asarray(unpack_levels(plan.levels, plan.grid.granules))
    start = np.arange(plan.grid.granules) * 16
    first = np.arange(plan.grid.tiles)[:, None] * plan.grid.positions
    end = first + plan.grid.positions
    # A 64th of what is seen, rounded up, and twice as many for their importance.
    count = -(-end // (64 * 16))
    assert (level[..., (start >= first - 16 * count) & (start < end)] == EXACT).all()
    exact = ((level == EXACT) & (start < first)).sum(-1)
    assert (exact <= 3 * count[:, 0]).all()


@pytest.mark.parametrize(("levels", "stages"), [((0,), 2), ((0, 1), 1), ((0, 1, 2), 2)])
def test_only_levels_in_use(levels, stages, rng):
    q, k, v = clustered(rng, 2048)
    adaptation = Adaptation(threshold=1e-3, levels=levels, stages=stages)
    plan = plan_tiles(q, k, v, adaptation, is_causal=True).validate()
    level = np.asarray(unpack_levels(plan.levels, plan.grid.granules))
    start = np.arange(plan.grid.granules) * 16
    last = (np.arange(plan.grid.tiles)[:, None] + 1) * plan.grid.positions - 1
    assert set(np.unique(level[:, :, start <= last])) == {
        *levels,
        *((HIDDEN,) if levels == (0,) else ()),
    }
    assert (level[:, :, start > last] == HIDDEN).all()


def test_no_level_tells_of_hidden_keys(rng):
    """What causality, lengths and segments hide has no influence on a row."""
    q, k, v = clustered(rng, 2048)
    adaptation = Adaptation(threshold=1e-2)
    segments = jnp.asarray(np.arange(2048) >= 1100, jnp.int32)[None]

    def rows(k, v, **options):
        plan = plan_tiles(q, k, v, adaptation, **options)
        return plan, tiled_attention(q, k, v, plan=plan, **options)

    for options, hidden, seen in (
        ({"is_causal": True}, slice(1500, None), slice(0, 1500)),
        ({"key_value_seq_lengths": jnp.array([1500])}, slice(1500, None), slice(None)),
        (
            {"query_segment_ids": segments, "key_value_segment_ids": segments},
            slice(1100, None),
            slice(0, 1100),
        ),
    ):
        plan, out = rows(k, v, **options)
        assert (np.asarray(unpack_levels(plan.levels, plan.grid.granules)) == SUPER_MEAN).any()
        other = k.at[:, hidden].multiply(-3.0), v.at[:, hidden].add(7.0)
        changed = tiled_attention(q, *other, plan=plan, **options)
        assert_same_bits(out[:, seen], changed[:, seen])


def test_a_bias_that_varies_makes_granules_exact(rng):
    q, k, v = clustered(rng, 512)
    adaptation = Adaptation(threshold=1.0)
    bias = jnp.zeros((1, 1, 1, 512)).at[..., 128:256].set(jnp.arange(128.0) / 99)
    plan = plan_tiles(q, k, v, adaptation, bias)
    level = np.asarray(unpack_levels(plan.levels, plan.grid.granules))
    assert (level[..., 8:16] == EXACT).all()
    assert (np.delete(level, range(8, 16), -1) == MEAN).any()
    # Where one varies, no mean of its super-tile, of the first 256 keys, stands for all.
    assert (level[..., :16] != SUPER_MEAN).all()
    assert (level[..., 16:] == SUPER_MEAN).any()


def test_a_plan_follows_the_lengths_of_a_call(rng):
    q, k, v = clustered(rng, 1024, batch=2)
    adaptation = Adaptation(threshold=1e-2, query_tile=TILE)
    short, long = jnp.array([200, 500]), jnp.array([900, 1010])
    plan = plan_tiles(q, k, v, adaptation, key_value_seq_lengths=short)
    result = tiled_attention(q, k, v, plan=plan, key_value_seq_lengths=long)
    exact = tiled_attention(q, k, v, key_value_seq_lengths=long)
    # What was beyond the length when the plan was made is exact.
    assert relative_error(result, exact) < 0.1


SHORT = jnp.array([50])
FIRST = jnp.arange(128)[None] // 64
HIDING = {
    "keys": {"key_value_seq_lengths": SHORT},
    "queries": {"query_seq_lengths": SHORT},
    "segments": {"query_segment_ids": FIRST, "key_value_segment_ids": FIRST},
    "mask": {"mask": (jnp.arange(128) < 50)[None, None, None]},
}


@pytest.mark.parametrize("case", HIDING)
def test_a_call_without_what_hid_keys_sees_them_exactly(case, implementation, rng):
    """What lengths, segments or a mask hid when a plan was made does not stay hidden."""
    q, k, v = (normal(rng, 1, 128, n, 8) for n in (4, 2, 2))
    adaptation = Adaptation(threshold=1e9, query_tile=TILE)
    call = functools.partial(untraced_attention, q, k, v, implementation=implementation)
    plan = jax_aat.plan_tiles(q, k, v, adaptation, implementation=implementation, **HIDING[case])
    assert plan.validate().hides
    hidden = np.asarray(unpack_levels(plan.levels, plan.grid.granules)) == HIDDEN
    assert hidden.any()
    operands, options = {Slot.Q: q, Slot.K: k, Slot.V: v}, Options(1.0)
    adapted = plan.for_call(operands, options)
    assert not adapted.validate().hides
    level = np.asarray(unpack_levels(adapted.levels, adapted.grid.granules))
    assert (level[hidden] == EXACT).all()
    # One made without any of these is used as it is.
    assert adapted.for_call(operands, options) is adapted
    assert_same_bits(call(plan=plan), call(plan=adapted))
    mapped = jax.vmap(lambda plan: call(plan=plan))(jax.tree.map(lambda x: x[None], plan))
    assert_close(mapped[0], call(plan=adapted), 1e-6)


def test_derivatives_of_a_frozen_plan(rng):
    """The gradient is that of coarse rows, state and exact rows, as finite differences find it."""
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float64) for x in clustered(rng, 2112, 2, 1, 8))
        plan = plan_tiles(q, k, v, Adaptation(threshold=0.05), is_causal=True)
        level = np.asarray(unpack_levels(plan.levels, plan.grid.granules))
        assert set(np.unique(level)) == {0, 1, 2, 3}
        weight = normal(rng, *q.shape, dtype="float64")

        @jax.jit
        def loss(q, k, v):
            return (weight * tiled_attention(q, k, v, plan=plan, is_causal=True)).sum()

        direction = tuple(normal(rng, *x.shape, dtype="float64") for x in (q, k, v))
        moved = lambda h: loss(*(x + h * d for x, d in zip((q, k, v), direction, strict=True)))  # noqa: E731
        # So short that it hardly ever meets the bound of a level bias, where the slope changes.
        expected = (moved(1e-7) - moved(-1e-7)) / 2e-7
        gradient = jax.grad(loss, (0, 1, 2))(q, k, v)
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        # As large as this is along most directions; along this one terms may cancel.
        scale = np.sqrt(sum(jnp.square(g).sum() for g in gradient))
        np.testing.assert_allclose(along, expected, rtol=0, atol=1e-6 * scale)
        tangent = jax.jvp(loss, (q, k, v), direction)[1]
        np.testing.assert_allclose(tangent, expected, rtol=0, atol=1e-6 * scale)


def test_transformations(rng):
    q, k, v = clustered(rng, 256, batch=3)
    adaptation = Adaptation(budget=0.6, query_tile=16)

    def attend(q, k, v):
        return tiled_attention(q, k, v, adaptation=adaptation, is_causal=True)

    def everything(attend, *xs):
        out, pull = jax.vjp(attend, *xs)
        return out, pull(2 * out)

    everything_of_it = functools.partial(everything, attend)
    whole = jax.jit(everything_of_it)
    expected = whole(q, k, v)
    # One lambda a batch entry: mapping equals batching equals a loop.
    assert_close(as_users_compile(jax.vmap(whole))(q, k, v), expected, 1e-5)
    looped = [attend(*(x[i : i + 1] for x in (q, k, v))) for i in range(3)]
    assert_close(jnp.concatenate(looped), expected[0], 1e-5)
    remat = functools.partial(everything, jax.checkpoint(attend))
    assert_close(jax.jit(remat)(q, k, v), expected, 1e-5)
    repeated = in_fixed_order(everything_of_it)
    assert_same_bits(repeated(q, k, v), repeated(q, k, v))


def test_shards_plan_for_themselves(rng):
    def attend(q, k, v):
        adaptation = Adaptation(budget=0.6, query_tile=16)
        return tiled_attention(q, k, v, adaptation=adaptation, is_causal=True)

    devices = jax.devices("cpu")[:2]
    mesh = jax.make_mesh((2,), ("b",), (jax.sharding.AxisType.Auto,), devices=devices)
    spec = jax.sharding.PartitionSpec("b")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.default_device(devices[0]):
        q, k, v = clustered(rng, 256, batch=2)
        assert_close(jax.jit(mapped)(q, k, v), jax.jit(attend)(q, k, v), 1e-6)


def test_plans_are_carried_and_stacked(rng):
    q, k, v = clustered(rng, 256)
    adaptation = Adaptation(budget=0.5, query_tile=16)
    plans = [plan_tiles(x, k, v, adaptation, is_causal=True) for x in (q, -q)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *plans)

    def layer(x, plan):
        return tiled_attention(x, k, v, plan=plan, is_causal=True), None

    scanned = jax.jit(lambda q, plans: jax.lax.scan(layer, q, plans)[0])(q, stacked)
    expected = layer(layer(q, plans[0])[0], plans[1])[0]
    assert_close(scanned, expected, 1e-5)
    mapped = jax.jit(jax.vmap(lambda plan: layer(q, plan)[0]))(stacked)
    assert_close(mapped, jnp.stack([layer(q, plan)[0] for plan in plans]), 1e-5)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from((1, 15, 16, 17, 32, 90)), st.integers(0, 2**32 - 1))
def test_levels_are_packed(granules, seed):
    levels = np.random.default_rng(seed).integers(0, 4, (2, 3, granules))
    words = pack_levels(jnp.asarray(levels))
    np.testing.assert_array_equal(unpack_levels(words, granules), levels)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "exactly one of budget, tolerance and threshold"),
        ({"budget": 0.1, "threshold": 0.1}, ValueError, "got budget and threshold"),
        ({"budget": 0}, ValueError, "budget: got 0"),
        ({"budget": 1.5}, ValueError, "at most 1"),
        ({"budget": "much"}, TypeError, "expected a Python number"),
        ({"tolerance": -1}, ValueError, "at least 0"),
        ({"budget": 0.1, "levels": (0, 2)}, ValueError, "levels: got"),
        ({"budget": 0.1, "query_tile": 100}, ValueError, "query_tile: got 100"),
        ({"budget": 0.1, "stages": 3}, ValueError, "stages: got 3"),
        ({"budget": 0.1, "audit_rate": 2}, ValueError, "audit_rate"),
        ({"tolerance": 0.1, "audit_rate": 0}, ValueError, "audit_rate"),
        ({"budget": 0.1, "replan_every": 0}, ValueError, "replan_every"),
        (
            {"budget": 0.1, "replan_every": True},
            TypeError,
            "replan_every: got True, expected an in",
        ),
        ({"budget": 0.1, "stages": True}, TypeError, "stages: got True, expected 1 or 2"),
        ({"budget": 0.1, "query_tile": 32.0}, TypeError, r"query_tile: got 32\.0, expected 16 or"),
        ({"budget": 0.1, "levels": [0, 1]}, TypeError, r"levels: got \[0, 1\], expected \(0,\) or"),
        ({"budget": 0.1, "levels": (False, 1)}, TypeError, "levels: got False"),
    ],
)
def test_adaptation_is_checked(fields, error, message):
    with pytest.raises(error, match=message):
        Adaptation(**fields)


def test_arguments_are_checked():
    q = jnp.ones((1, 256, 4, 16))
    plan = plan_tiles(q, q, q, Adaptation(budget=0.5, query_tile=16))
    with pytest.raises(TypeError, match=r"adaptation: got 0\.5"):
        untraced_attention(q, q, q, adaptation=0.5)
    with pytest.raises(TypeError, match=r"adaptation: got None .*expected a jax_aat\.Adapt"):
        plan_tiles(q, q, q, None)
    with pytest.raises(TypeError, match=r"adaptation: got an array float32\["):
        jax_aat.plan_tiles(q, q, q, q)
    with pytest.raises(TypeError, match="plan: got"):
        untraced_attention(q, q, q, plan=3)
    with pytest.raises(ValueError, match="tolerance needs a state"):
        untraced_attention(q, q, q, adaptation=Adaptation(tolerance=0.1))
    with pytest.raises(ValueError, match="plan: was made for"):
        untraced_attention(q, q, q, adaptation=Adaptation(budget=0.1), plan=plan)
    assert hash(Adaptation(budget=0.1)) == hash(Adaptation(budget=0.1))
    assert jax_aat.TilePlan is type(plan)


def test_symbolic_lengths_are_refused_in_words():
    (length,) = jax.export.symbolic_shape("s")
    operand = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    adaptation = Adaptation(budget=0.5)
    call = jax.jit(lambda x: untraced_attention(x, x, x, adaptation=adaptation))
    with pytest.raises(ValueError, match="got symbolic length s, adaptation needs a known one"):
        jax.export.export(call)(operand)
