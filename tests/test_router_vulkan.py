"""Prices that the shaders of the router make, against those of jax.numpy."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import Ran, assert_same_bits, look_into

from jax_aat import Adaptation, last_dispatch, router, scores
from jax_aat.adaptation import grid_of
from jax_aat.primitives import plan as planning
from jax_aat.primitives.plan import make_plan, make_prices
from jax_aat.problem import Operands, Options, Slot

UNITS = {"float32": 2, "float16": 5, "bfloat16": 5}
"""How far upper halves of float32 may lie apart: sums are taken in another order."""
SHARE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-3}
"""Share of the granules that may lie further apart: candidates change places where they tie."""
TINY = 0x2B80
"""Upper half of 2^-40, the square of a probability of 16 ulps of 1, which rounding of sums reaches:
which of the granules below are candidates is its matter (1 of 10 cases of one shape)."""
SCALE = 0.25


def clustered(
    rng, queries, keys, heads=4, kv_heads=2, head_dim=16, batch=2, dtype="float32"
) -> Operands:
    """Queries and keys of topics that last 24 positions, and random values."""
    centres = 1.5 * rng.normal(size=(12, head_dim))

    def rows(length, heads):
        topics = rng.integers(0, 12, (batch, length // 24 + 1, heads))
        noise = 0.4 * rng.normal(size=(batch, length, heads, head_dim))
        return centres[np.repeat(topics, 24, axis=1)[:, :length]] + noise

    values = rng.normal(size=(batch, keys, kv_heads, head_dim))
    arrays = (rows(queries, heads), rows(keys, kv_heads), values)
    return {slot: jnp.asarray(x, dtype) for slot, x in zip(Slot, arrays, strict=False)}


def made(operands, options, adaptation):
    """Prices, and whether cooperative matrices made them."""
    with Ran("vulkan", "plan"):
        call = jax.jit(lambda x: make_prices(x, options, adaptation))
        prices = np.asarray(call(operands)).astype(np.int64)
    kernels = last_dispatch().kernels
    return prices, any(kernel.startswith("cross_tile_router_coopmat") for kernel in kernels)


@contextlib.contextmanager
def products_of_halves():
    """Rounds what the router multiplies as cooperative matrices do."""
    exact = scores._product

    def rounded(subscripts, a, b):
        return exact(subscripts, *(jax.lax.reduce_precision(x, 5, 10) for x in (a, b)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_product", rounded)
        yield


def reference(operands, options, adaptation, halves=False):
    """Compiles once what gives the prices of jax.numpy for operands like these."""
    grid = grid_of(operands, adaptation)
    fixed = {"options": options, "grid": grid, "adaptation": adaptation}
    call = jax.jit(functools.partial(router.break_even, **fixed))

    def expected(operands):
        # On the CPU: where products are rounded otherwise, other candidates tie.
        operands = jax.device_put(operands, jax.devices("cpu")[0])
        with products_of_halves() if halves else contextlib.nullcontext():
            return np.asarray(call(operands)).astype(np.int64)

    return expected


def differ(ours, theirs, dtype):
    """Where prices are of what only one side saw or judged; where they lie apart, of each kind."""
    units, explained = [], []
    for shift in (16, 0):
        halves = [x >> shift & 0xFFFF for x in (ours, theirs)]
        upper = (np.maximum(half, TINY) for half in halves)
        units.append(np.abs(np.subtract(*upper)) > UNITS[dtype])
        # 0 stands for what is not seen; which of numbers so small become 0 is rounding's, too.
        explained.append(np.max(halves, axis=0) <= TINY)
    seen = ((ours == 0) != (theirs == 0)) & ~np.all(explained, axis=0)
    return np.stack([seen, *units])


def ties(expected, operands, theirs, halves, draws=16):
    """Where `differ` holds for the reference itself, of operands that rounding may set apart.

    Shaders tell key tiles apart by 2^-16 of their importance. That the last one that is looked into
    and the next are closer happened in 3 of 2,500 draws of one shape, and changes all granules of
    both.
    """
    rng = np.random.default_rng(0)
    eps = 1e-3 if halves else 1e-4
    wide = {slot: operands[slot].astype(jnp.float32) for slot in (Slot.Q, Slot.K, Slot.V)}
    found = False
    for _ in range(draws):
        moved = {
            slot: (x * (1 + eps * rng.normal(size=x.shape))).astype(jnp.float32)
            for slot, x in wide.items()
        }
        found |= differ(expected(operands | moved), theirs, operands[Slot.Q].dtype.name)
    return found


def assert_alike(operands, options, adaptation):
    """Compares both prices; what is seen and judged exactly."""
    ours, halves = made(operands, options, adaptation)
    expected = reference(operands, options, adaptation, halves)
    theirs = expected(operands)
    assert ours.shape == theirs.shape
    dtype = operands[Slot.Q].dtype.name
    different = differ(ours, theirs, dtype)
    allowed = np.array([0, *2 * [2 + SHARE[dtype] * ours.size]])
    if (different.sum((1, 2, 3, 4)) > allowed).any():
        different &= ~ties(expected, operands, theirs, halves)
    wrong = different.sum((1, 2, 3, 4))
    assert (wrong <= allowed).all(), f"seen, exact, mean: {wrong} of {ours.size} differ"


@pytest.mark.parametrize("levels", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("stages", [1, 2])
def test_stages_and_levels(stages, levels, rng):
    adaptation = Adaptation(budget=0.25, stages=stages, levels=levels, query_tile=32)
    assert_alike(clustered(rng, 70, 1300), Options(SCALE), adaptation)


@pytest.mark.parametrize("super_tile", [512, 1024])  # 256 by default
def test_super_tiles(super_tile, rng):
    adaptation = Adaptation(budget=0.25, query_tile=32, super_tile=super_tile)
    assert_alike(clustered(rng, 70, 1300), Options(SCALE), adaptation)


@pytest.mark.parametrize("goal", [{"budget": 0.9}, {"budget": 0.03}, {"threshold": 0.01}])
def test_goals(goal, rng):
    assert_alike(clustered(rng, 70, 1300), Options(SCALE), Adaptation(**goal, query_tile=32))


OPTIONS = {
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (300, -1)},
    "window": {"window": (700, 50)},
    "window without a left side": {"window": (-1, 70)},
    "soft cap": {"soft_cap": 3.0, "causal": True},
    "negative scale": {"scale": -SCALE},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, rng):
    options = Options(**{"scale": SCALE} | OPTIONS[name])
    assert_alike(clustered(rng, 1200, 1200), options, Adaptation(budget=0.25, query_tile=128))


@pytest.mark.parametrize("causal", [False, True])
def test_lengths(causal, rng):
    operands = clustered(rng, 1200, 1200, batch=3)
    operands[Slot.Q_LENGTHS] = jnp.asarray([800, 1200, 0], jnp.int32)
    operands[Slot.KV_LENGTHS] = jnp.asarray([1103, 513, 0], jnp.int32)
    # What lies past a length may be anything.
    for slot in (Slot.K, Slot.V):
        operands[slot] = operands[slot].at[1, 513:].set(jnp.nan)
    operands[Slot.Q] = operands[Slot.Q].at[0, 800:].set(jnp.nan)
    assert_alike(operands, Options(SCALE, causal), Adaptation(budget=0.25, query_tile=64))


def test_segments(rng):
    operands = clustered(rng, 1200, 1200)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 1200)), axis=1), jnp.int32)
    operands |= {Slot.Q_SEGMENTS: ids, Slot.KV_SEGMENTS: ids}
    assert_alike(operands, Options(SCALE), Adaptation(budget=0.25, query_tile=64))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "query_tile", "head_dim"),
    [
        (2, 2, 128, 64),
        (12, 4, 32, 30),
        (16, 1, 16, 32),
        (32, 1, 32, 20),
        (16, 1, 256, 13),
        (1, 1, 256, 256),
        (2, 1, 16, 3),
    ],
)
def test_shapes(heads, kv_heads, query_tile, head_dim, rng):
    operands = clustered(rng, 270, 1100, heads, kv_heads, head_dim, batch=1)
    adaptation = Adaptation(budget=0.2, query_tile=query_tile)
    assert_alike(operands, Options(head_dim**-0.5), adaptation)


def test_queries_that_do_not_exist_have_no_say(rng):
    """Prices of 16 queries are the same in a tile that has room for 16 times as many."""
    operands = clustered(rng, 16, 1100, 1, 1, 256, batch=8)

    def prices(query_tile):
        adaptation = Adaptation(budget=0.2, query_tile=query_tile)
        return reference(operands, Options(1 / 16), adaptation)(operands)

    full, roomy = prices(16), prices(256)
    apart = np.abs(np.subtract(*(np.maximum(x >> 16, TINY) for x in (full, roomy))))
    assert (apart > UNITS["float32"]).sum() <= 2 + SHARE["float32"] * apart.size


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 2100), (40, 17), (33, 1024)])
def test_lengths_of_sequences(queries, keys, rng):
    operands = clustered(rng, queries, keys, batch=1)
    assert_alike(operands, Options(SCALE), Adaptation(budget=0.25, query_tile=32))


@pytest.mark.parametrize("levels", [(0,), (0, 1, 2)])
@pytest.mark.parametrize(("query_tile", "head_dim"), [(32, 16), (64, 48), (128, 64), (256, 80)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(dtype, query_tile, head_dim, levels, rng):
    operands = clustered(rng, 140, 1100, head_dim=head_dim, dtype=dtype, batch=1)
    adaptation = Adaptation(budget=0.25, query_tile=query_tile, levels=levels)
    assert_alike(operands, Options(4 / head_dim), adaptation)


@pytest.mark.parametrize("name", ["causal window", "window", "soft cap"])
def test_options_in_halves(name, rng):
    options = Options(**{"scale": SCALE} | OPTIONS[name])
    operands = clustered(rng, 1200, 1200, dtype="float16")
    assert_alike(operands, options, Adaptation(budget=0.25, query_tile=64))


def test_lengths_in_halves(rng):
    operands = clustered(rng, 700, 1200, dtype="bfloat16")
    operands[Slot.Q_LENGTHS] = jnp.asarray([601, 0], jnp.int32)
    operands[Slot.KV_LENGTHS] = jnp.asarray([1103, 513], jnp.int32)
    assert_alike(operands, Options(SCALE), Adaptation(budget=0.25, query_tile=128))


def test_many_tiles_share_a_workgroup(rng):
    operands = clustered(rng, 1100, 1100, 1, 1, head_dim=4, batch=18)
    assert_alike(operands, Options(SCALE, True), Adaptation(budget=0.25, query_tile=16))


def test_large_logits(rng):
    operands = clustered(rng, 200, 1300)
    operands[Slot.Q] *= 30
    assert_alike(operands, Options(SCALE), Adaptation(budget=0.25, query_tile=32))


def test_equal_keys(rng):
    """Every granule ties: of equals the first are candidates, and all are among the foremost."""
    operands = clustered(rng, 64, 512)
    operands = {slot: jnp.ones_like(x) for slot, x in operands.items()}
    assert_alike(operands, Options(SCALE), Adaptation(budget=0.25, query_tile=32))


def test_same_bits_every_time(rng):
    operands, adaptation = clustered(rng, 500, 2100), Adaptation(budget=0.25, query_tile=32)
    first = made(operands, Options(SCALE, True), adaptation)
    for _ in range(3):
        assert_same_bits(made(operands, Options(SCALE, True), adaptation), first)


@pytest.fixture
def few_judged(monkeypatch):
    """As if tiles of so short sequences looked into 11 key tiles only."""
    look_into(monkeypatch.setattr, 11)


FOREMOST = {
    "causal": {"causal": True},
    "not causal": {},
    "window": {"window": (2600, 300)},
    "narrow window": {"window": (700, -1), "causal": True},
    "soft cap": {"soft_cap": 3.0},
}


@pytest.mark.parametrize("name", FOREMOST)
def test_foremost_key_tiles(name, rng, few_judged):
    queries = 150 if name == "not causal" else 4900
    operands = clustered(rng, queries, 4900, 2, 1, head_dim=8, batch=1)
    options = Options(**{"scale": SCALE} | FOREMOST[name])
    assert_alike(operands, options, Adaptation(budget=0.2, query_tile=256))


@pytest.mark.parametrize("levels", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("stages", [1, 2])
def test_foremost_by_stages_and_levels(stages, levels, rng, few_judged):
    adaptation = Adaptation(budget=0.2, stages=stages, levels=levels, query_tile=64)
    operands = clustered(rng, 70, 4900, 8, 2, head_dim=6, batch=1)
    assert_alike(operands, Options(SCALE), adaptation)


def test_one_stage_looks_into_as_much(rng, few_judged):
    adaptation = Adaptation(budget=0.4, stages=1, query_tile=64)
    operands = clustered(rng, 100, 4900, batch=1)
    assert_alike(operands, Options(SCALE), adaptation)
    prices = reference(operands, Options(SCALE), adaptation)(operands)
    exact = (prices >> 16 > 0).reshape(1, -1, 307)
    assert exact.sum(-1).max() > 8 * 11


@pytest.mark.parametrize("causal", [False, True])
def test_foremost_with_lengths(causal, rng, few_judged):
    operands = clustered(rng, 3300, 3300, 2, 1, head_dim=8, batch=3)
    operands[Slot.Q_LENGTHS] = jnp.asarray([3000, 3300, 0], jnp.int32)
    operands[Slot.KV_LENGTHS] = jnp.asarray([3103, 1100, 0], jnp.int32)
    for slot in (Slot.K, Slot.V):
        operands[slot] = operands[slot].at[1, 1100:].set(jnp.nan)
    assert_alike(operands, Options(SCALE, causal), Adaptation(budget=0.25, query_tile=128))


@pytest.mark.parametrize(("keys", "length"), [(3400, 3104), (3240, 3240)])
def test_a_key_tile_is_near_by_what_is_seen_of_it(keys, length, rng, few_judged):
    """Of the last one that is seen, here by its end alone, and least important."""
    operands = clustered(rng, 3400, keys, 2, 1, head_dim=8, batch=1)
    operands[Slot.Q] = operands[Slot.Q].at[..., 0].set(4.0)
    key = operands[Slot.K].at[..., 0].set(0.0)
    operands[Slot.K] = key.at[:, length // 128 * 128 : length, :, 0].set(-8.0)
    operands[Slot.KV_LENGTHS] = jnp.asarray([length], jnp.int32)
    assert_alike(operands, Options(SCALE, True), Adaptation(budget=0.25, query_tile=128))


def test_near_key_tiles_behind_more_that_are_cut_than_a_tile_looks_into(rng, few_judged):
    operands = clustered(rng, 3200, 3200, 2, 1, head_dim=8, batch=1)
    position = np.arange(3200)
    ids = np.where(position < 2048, position % 2, 1)
    operands[Slot.Q_SEGMENTS] = jnp.ones((1, 3200), jnp.int32)
    operands[Slot.KV_SEGMENTS] = jnp.asarray(ids[None], jnp.int32)
    assert_alike(operands, Options(SCALE, True), Adaptation(budget=0.25, query_tile=128))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_foremost_with_segments(dtype, rng, few_judged):
    operands = clustered(rng, 3200, 3200, 2, 1, dtype=dtype)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 3200)), axis=1), jnp.int32)
    operands |= {Slot.Q_SEGMENTS: ids, Slot.KV_SEGMENTS: ids}
    assert_alike(operands, Options(SCALE), Adaptation(budget=0.25, query_tile=128))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("query_tile", "head_dim"), [(64, 16), (128, 64)])
def test_foremost_in_halves(query_tile, head_dim, causal, rng, few_judged):
    queries = 3300 if causal else 100
    operands = clustered(rng, queries, 3300, 2, 1, head_dim, batch=1, dtype="float16")
    adaptation = Adaptation(budget=0.25, query_tile=query_tile)
    assert_alike(operands, Options(4 / head_dim, causal), adaptation)


def test_more_are_judged_where_candidates_ask_for_more(rng, few_judged):
    """A budget of 0.4 asks for 32 of the 39 key tiles."""
    adaptation = Adaptation(budget=0.4, query_tile=64)
    assert_alike(clustered(rng, 100, 4900, batch=1), Options(SCALE), adaptation)
    of_all = Adaptation(budget=0.5, query_tile=64)
    assert_alike(clustered(rng, 100, 4900, batch=1), Options(SCALE), of_all)


def test_floor_beyond_what_is_judged(rng, few_judged):
    """Where squares of probabilities are 0 in what is judged, granules elsewhere tie with them."""
    operands = clustered(rng, 64, 4096, batch=1)
    operands[Slot.Q] *= 200
    adaptation = Adaptation(threshold=1e-4, query_tile=64)
    expected_prices = reference(operands, Options(SCALE), adaptation)(operands)
    assert ((expected_prices >> 16) == 0x6F00).reshape(-1, 32, 8).all(-1).any()
    assert_alike(operands, Options(SCALE), adaptation)


@pytest.mark.parametrize("budget", [0.485, 0.6])
def test_more_granules_than_shared_memory_takes_notes_of(budget, rng):
    """More than 2,048, which is what lavapipe has room for: of 259 of 266 key tiles, or of all."""
    operands = clustered(rng, 40, 34000, 1, 1, head_dim=4, batch=1)
    assert_alike(operands, Options(SCALE), Adaptation(budget=budget, query_tile=16))


BRIEF = {
    "causal": ({"causal": True}, {"budget": 0.2}),
    "lengths and a window": ({"window": (1400, 300)}, {"threshold": 1e-4}),
    "all are kept, by a budget": ({}, {"budget": 0.45, "levels": (0,)}),
    "all are kept, by a threshold": ({}, {"threshold": 1e-4, "levels": (0,)}),
}


@pytest.mark.parametrize("name", BRIEF)
def test_prices_of_the_foremost_say_as_much_as_all(name, rng, monkeypatch):
    """A plan is the same, bit by bit, whether shaders keep prices of all granules in between."""
    look_into(monkeypatch.setattr, 6)
    options, fields = BRIEF[name]
    options = Options(**{"scale": SCALE} | options)
    adaptation = Adaptation(query_tile=16, super_tile=256, **fields)
    operands = clustered(rng, 1800 if options.causal else 100, 1800, 2, 1, head_dim=8)
    if "kept" in name:
        # As importance is 0 elsewhere. Of so few that are looked into a budget has room for more.
        operands[Slot.Q] *= 200
        monkeypatch.setattr(planning, "judged_key_tiles", lambda *_: 2)
    if name == "lengths and a window":
        operands[Slot.Q_LENGTHS] = jnp.asarray([100, 60], jnp.int32)
        operands[Slot.KV_LENGTHS] = jnp.asarray([1710, 900], jnp.int32)
    grid = grid_of(operands, adaptation)
    prices = make_prices(operands, options, adaptation)
    assert (prices >> 16 == 0x6F00).any() == ("kept" in name)
    previous = None
    if adaptation.threshold:
        levels = (2, grid.lists, grid.tiles, grid.words)
        previous = jnp.asarray(rng.integers(0, 2**32, levels, dtype=np.uint32))
    operands |= router.goal_of(operands, options, grid, adaptation, None, previous)

    def plan(operands):
        with Ran("vulkan", "plan"):
            call = jax.jit(lambda x: make_plan(x, options, adaptation))
            return jax.block_until_ready(call(operands))

    brief, full = plan(operands), plan(operands | {Slot.PRICES: prices})
    for slot in brief:
        assert_same_bits(brief[slot], full[slot])
