"""Levels and work lists that shaders make of prices, bit by bit as jax.numpy makes them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import Ran, assert_same_bits, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_aat import Adaptation, TilePlan, last_dispatch, router
from jax_aat.boundary import boundary
from jax_aat.levels import Grid, without_means
from jax_aat.lists import Capacity, pack
from jax_aat.primitives.plan import LISTS, make_plan
from jax_aat.primitives.vulkan_call import vulkan_call
from jax_aat.problem import Operands, Options, Slot

BUDGET = Adaptation(budget=0.25)  # that of SPARE_ROWS is given by the tests
KERNELS = ("plan_levels.f32", "plan_list_starts.f32", "plan_key_lists.f32", "plan_lists.f32")


def random_prices(rng, shape, kind: str) -> jax.Array:
    """Prices of a kind, [*batch, L, I, granules]."""
    if kind == "corrupted":
        return jnp.asarray(rng.integers(0, 2**32, shape, dtype=np.uint32))
    if kind == "alike":
        halves = rng.choice(np.array([0, 0x3A00, 0x3A01, 0x7F80]), (2, *shape))
    else:
        # Those of one size are settled by what they were, in most cases.
        spread = 0.3 if kind == "of one size" else 6
        floats = np.exp(rng.normal(-12, spread, (2, *shape))).astype(np.float32)
        floats *= rng.random((2, *shape)) < 0.9
        floats[rng.random((2, *shape)) < 0.1] = np.inf
        halves = floats.view(np.uint32) >> 16
    return jnp.asarray((halves[0] << 16 | halves[1]).astype(np.uint32))


@functools.partial(jax.jit, static_argnames=("options", "grid", "adaptation"))
def by_definition(operands, options, grid, adaptation):
    """Levels, lists and price, in jax.numpy."""
    levels, price = router.levels_at(operands[Slot.PRICES], operands, options, grid, adaptation)
    capacity = Capacity.of(grid, options.causal, options.window)
    lists = pack(levels, boundary(operands, options, grid).full, grid, capacity)
    return levels, *lists, price


@dataclasses.dataclass
class Case:
    """A call with prices and a goal."""

    operands: Operands
    options: Options
    grid: Grid
    adaptation: Adaptation

    @classmethod
    def random(
        cls,
        rng,
        queries=700,
        keys=1100,
        heads=4,
        kv_heads=2,
        batch=2,
        adaptation=BUDGET,
        causal=False,
        window=(-1, -1),
        lengths=False,
        segments=False,
        previous=False,
        spare=0.3,
        lambdas=(1e-7, 1e-3),
        prices="ordinary",
        dtype="float32",
    ) -> "Case":
        grid = adaptation.grid(queries, keys, heads, kv_heads)
        operands = {
            Slot.Q: normal(rng, batch, queries, heads, 8, dtype=dtype),
            Slot.K: normal(rng, batch, keys, kv_heads, 8, dtype=dtype),
            Slot.V: normal(rng, batch, keys, kv_heads, 8, dtype=dtype),
        }

        def integers(low, high, *shape):
            return jnp.asarray(rng.integers(low, high, shape), jnp.int32)

        if lengths:
            operands[Slot.Q_LENGTHS] = integers(-1, queries + 2, batch)
            operands[Slot.KV_LENGTHS] = integers(-1, keys + 2, batch)
        if segments:
            operands[Slot.Q_SEGMENTS] = jnp.sort(integers(-1, 3, batch, queries))
            operands[Slot.KV_SEGMENTS] = jnp.sort(integers(-1, 3, batch, keys))
        tiles = (batch, grid.lists, grid.tiles)
        operands[Slot.PRICES] = random_prices(rng, (*tiles, grid.granules), prices)
        if adaptation.budget is not None:
            share = rng.uniform(0, 2 * spare, batch)
            most = 16 * grid.lists * grid.tiles * grid.granules
            operands[Slot.SPARE_ROWS] = jnp.asarray(share * most, jnp.float32)
        else:
            spread = np.exp(rng.uniform(*np.log(lambdas), (batch, grid.lists)))
            operands[Slot.LAMBDA] = jnp.asarray(spread, jnp.float32)
        if previous:
            words = rng.integers(0, 2**32, (*tiles, grid.words), dtype=np.uint32)
            is_dropped = adaptation.levels == (0,)
            operands[Slot.PREVIOUS_LEVELS] = (without_means if is_dropped else jnp.asarray)(words)
        return cls(operands, Options(1.0, causal, window), grid, adaptation)

    def expected(self) -> Operands:
        """What jax.numpy makes of it."""
        made = by_definition(self.operands, self.options, self.grid, self.adaptation)
        return dict(zip((*LISTS, Slot.LAMBDA), made, strict=True))

    def planned(self, **changed) -> Operands:
        with Ran("vulkan", "plan"):
            operands = self.operands | {Slot[name]: x for name, x in changed.items()}
            return jax.block_until_ready(make_plan(operands, self.options, self.adaptation))

    def check(self) -> None:
        actual, expected = self.planned(), self.expected()
        assert actual.keys() == expected.keys()
        for slot, x in expected.items():
            np.testing.assert_array_equal(actual[slot], x, err_msg=slot.name, strict=True)
        TilePlan.of_results(actual, self.operands, self.options, self.adaptation).validate()


def threshold(**options) -> Adaptation:
    return Adaptation(threshold=1.0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "queries": 1100, "heads": 8, "prices": "alike"},
        {"causal": True, "queries": 2500, "keys": 2500, "batch": 1, "lengths": True},
        {"window": (300, 40)},
        {"window": (-1, 300), "lengths": True},
        {"window": (0, -1), "causal": True},
        {"lengths": True, "batch": 4},
        {"segments": True},
        {"segments": True, "causal": True, "lengths": True, "keys": 2100},
        {"adaptation": Adaptation(budget=0.5, levels=(0,))},
        {"adaptation": Adaptation(budget=0.5, levels=(0, 1)), "causal": True},
        {"adaptation": Adaptation(budget=0.5, query_tile=16), "heads": 12, "kv_heads": 1},
        {"adaptation": Adaptation(budget=0.5, query_tile=256), "heads": 3, "kv_heads": 3},
        {"adaptation": threshold(), "causal": True},
        {"adaptation": threshold(), "previous": True},
        {"adaptation": threshold(levels=(0,)), "previous": True, "causal": True},
        {"adaptation": threshold(levels=(0, 1)), "previous": True, "segments": True},
        {"adaptation": threshold(), "lambdas": (1e-30, 1e30), "previous": True},
        {"queries": 1, "keys": 1},
        {"queries": 5, "keys": 17, "causal": True},
        {"queries": 3000, "keys": 33},
        {"queries": 40, "keys": 5000, "heads": 1, "kv_heads": 1},
        # More than a workgroup of plan_levels makes at once.
        {"queries": 20, "keys": 131_400, "heads": 1, "kv_heads": 1, "batch": 1},
        {"dtype": "bfloat16"},
        {"prices": "corrupted"},
        {"prices": "corrupted", "causal": True, "window": (500, -1), "lengths": True},
        {"prices": "corrupted", "adaptation": threshold(), "segments": True},
        {"prices": "alike", "spare": 0.5},
    ],
    ids=str,
)
def test_plan_is_that_of_the_definition(rng, options):
    Case.random(rng, **options).check()


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("window", [(-1, -1), (90, 70), (90, -1), (-1, 70)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_previous_levels_under_all_conditions(rng, causal, window, lengths, segments):
    """Each is a pipeline of its own; a driver's compiler got one of them wrong."""
    case = Case.random(
        rng,
        *(600, 700, 2, 1),
        adaptation=threshold(query_tile=16, super_tile=256),
        previous=True,
        causal=causal,
        window=window,
        lengths=lengths,
        segments=segments,
        lambdas=(3e-6, 1e-5),
        prices="of one size",
    )
    if lengths:
        case.operands[Slot.Q_LENGTHS] = jnp.array([600, 431], jnp.int32)
        case.operands[Slot.KV_LENGTHS] = jnp.array([683, 450], jnp.int32)
    case.check()
    settled = case.expected()[Slot.LEVELS]
    del case.operands[Slot.PREVIOUS_LEVELS]
    assert (case.expected()[Slot.LEVELS] != settled).any()


@pytest.mark.parametrize("prices", ["ordinary", "alike", "corrupted"])
def test_every_budget_finds_its_price(rng, prices):
    case = Case.random(rng, 200, 300, batch=12, prices=prices)
    most = 16 * case.grid.lists * case.grid.tiles * case.grid.granules
    few = [-np.inf, -3.0, -0.5, 0.0, 0.5, 1.0, 17.0, most / 2]
    spare = [*few, most - 1, most, most + 0.5, np.inf]
    case.operands[Slot.SPARE_ROWS] = jnp.asarray(spare, jnp.float32)
    case.check()
    price = np.asarray(case.planned()[Slot.LAMBDA])[:, 0]
    assert (price[1:] <= price[:-1]).all()
    # Without any room a row is priceless, with room for all it is free.
    assert np.isinf(price[0])
    assert price[-1] == 0


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-37, 1.5, 192.0, 3e38, np.inf])
def test_every_price_is_served(rng, value):
    case = Case.random(rng, 100, 300, adaptation=threshold(), previous=True)
    case.operands[Slot.LAMBDA] = jnp.full((2, case.grid.lists), value, jnp.float32)
    case.check()


def test_kernels_are_those_of_the_goal(rng):
    case = Case.random(rng, 50, 50)
    case.planned()
    searched = ("plan_price.f32",) * 4
    assert last_dispatch().kernels == (*searched, *KERNELS, "plan_key_lists.f32")
    assert last_dispatch().path == "portable"
    case = Case.random(rng, 50, 50, adaptation=threshold(), segments=True)
    case.planned()
    assert last_dispatch().kernels == ("segment_ranges.f32", *KERNELS, "plan_key_lists.f32")


def test_batch_axes_share_what_they_have_in_common(rng):
    """An operand of size 1 along a batch axis is that of all entries."""
    case = Case.random(rng, 200, 300, segments=True)
    whole = case.planned(KV_SEGMENTS=jnp.tile(case.operands[Slot.KV_SEGMENTS][:1], (2, 1)))
    shared = case.planned(KV_SEGMENTS=case.operands[Slot.KV_SEGMENTS][:1])
    assert_same_bits(shared, whole)


def test_vmap_equals_a_loop(rng):
    cases = [Case.random(rng, 100, 200, causal=True) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(case.operands for case in cases))
    plan = functools.partial(make_plan, options=cases[0].options, adaptation=BUDGET)
    with Ran("vulkan", "plan"):
        mapped = jax.jit(jax.vmap(plan))(stacked)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(case.planned() for case in cases))
    assert_same_bits(mapped, expected)
    # Keys and values that are not mapped.
    unmapped = dict.fromkeys(stacked, 0) | {Slot.K: None, Slot.V: None}
    operands = stacked | {slot: cases[0].operands[slot] for slot in (Slot.K, Slot.V)}
    assert_same_bits(jax.vmap(plan, in_axes=(unmapped,))(operands), expected)


def test_a_plan_has_no_derivative(rng):
    case = Case.random(rng, 50, 50)

    def loss(q):
        plan = make_plan(case.operands | {Slot.Q: q}, case.options, BUDGET)
        return (q * q).sum() + plan[Slot.LAMBDA].sum() + plan[Slot.LEVELS].sum()

    q = case.operands[Slot.Q]
    with Ran("vulkan", "plan"):
        assert_same_bits(jax.grad(loss)(q), 2 * q)
        _, tangent = jax.jvp(loss, (q,), (q,))
    np.testing.assert_allclose(tangent, 2 * (q * q).sum(), rtol=1e-5)


@pytest.mark.parametrize("spec", [P("data"), P("data", None, "model"), P(None, None, "model")])
def test_sharded_equals_whole(rng, spec):
    devices = jax.devices("cpu")[:4]
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=devices)
    with jax.default_device(devices[0]):
        case = Case.random(rng, 100, 200, causal=True, segments=True)
        expected = case.expected()
        operands = dict(case.operands)
        for slot in (Slot.Q, Slot.K, Slot.V):
            operands[slot] = jax.device_put(operands[slot], NamedSharding(mesh, spec))
        plan = functools.partial(make_plan, options=case.options, adaptation=BUDGET)
        with Ran("vulkan", "plan"):
            actual = jax.block_until_ready(jax.jit(plan)(operands))
        assert_same_bits(actual, expected)


def test_shard_map_over_the_batch(rng):
    devices = jax.devices("cpu")[:2]
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=devices)
    with jax.default_device(devices[0]):
        case = Case.random(rng, 100, 200)
        plan = functools.partial(make_plan, options=case.options, adaptation=BUDGET)
        split = jax.shard_map(plan, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        with Ran("vulkan", "plan"):
            actual = jax.block_until_ready(jax.jit(split)(case.operands))
        assert_same_bits(actual, case.expected())


def test_lists_that_are_too_short_are_cut(rng):
    """Whatever there is no room for is left out, and nothing is written behind the end."""
    case = Case.random(rng, 300, 600, adaptation=threshold())
    options = dataclasses.replace(case.options.planned(case.grid), level_count=3)
    expected = case.expected()
    del expected[Slot.LAMBDA]
    for slot in (Slot.LIST_ENTRIES, Slot.KEY_LIST_ENTRIES):
        expected[slot] = expected[slot][..., :7]
    types = {slot: jax.ShapeDtypeStruct(x.shape, x.dtype) for slot, x in expected.items()}
    actual = vulkan_call("jax_aat_plan", options, case.operands, types)
    assert_same_bits(dict(zip(types, actual, strict=True)), expected)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({Slot.LAMBDA: None}, "lambda is missing among the arguments"),
        ({Slot.SPARE_ROWS: (2,)}, "slot 33 is not among the arguments"),
        ({Slot.BIAS: (2, 1, 1, 1)}, "slot 3 is not among the arguments"),
        ({Slot.PRICES: (2, 2, 4, 6)}, "prices has size 6"),
        ({"level_count": 0}, "1 to 3 levels"),
        ({"query_tile": 0}, "power of two"),
        ({"super_tile": 128}, "256, 512 or 1024 keys; got 128"),
    ],
    ids=str,
)
def test_refusals(rng, changed, words):
    case = Case.random(rng, 100, 100, adaptation=threshold())
    numbers = {name: x for name, x in changed.items() if isinstance(name, str)}
    options = dataclasses.replace(case.options.planned(case.grid), **{"level_count": 3} | numbers)
    for slot, shape in changed.items():
        if isinstance(slot, Slot):
            case.operands.pop(slot, None)
            if shape is not None:
                dtype = "uint32" if slot is Slot.PRICES else "float32"
                case.operands[slot] = jnp.zeros(shape, dtype)
    types = {
        slot: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for slot, x in Case.random(rng, 100, 100, adaptation=threshold()).expected().items()
        if slot is not Slot.LAMBDA
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        jax.block_until_ready(vulkan_call("jax_aat_plan", options, case.operands, types))
