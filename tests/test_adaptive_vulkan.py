"""Adaptive attention on a Vulkan device for random levels maps, against the dense oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import TOLERANCE, Ran, as_users_compile, assert_close, normal
from levels_maps import Array, plan_of, random_levels, tiles_of
from oracle import Problem, visible

from jax_aat import Adaptation, last_dispatch, plan_tiles, primitives, tiled_attention
from jax_aat.levels import Grid
from jax_aat.primitives.vulkan_call import vulkan_call
from jax_aat.problem import Operands, Options, Slot
from jax_aat.reference import dense_adaptive_attention

FLOATS = (Slot.Q, Slot.K, Slot.V, Slot.BIAS, Slot.COARSE_K, Slot.COARSE_V, Slot.LEVEL_BIAS)


class Case:
    """A call with a random plan.

    Attributes:
      grid: How the call is cut.
      problem: What the exact part of the call is, for the oracle.
      levels: [B, L, I, granules].
      operands: By slot.
      options: Those of the primitive.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        queries: int = 100,
        keys: int = 100,
        heads: int = 2,
        kv_heads: int | None = None,
        head_dim: int = 32,
        query_tile: int = 32,
        super_tile: int = 256,
        dtype: str = "float32",
        level_bias: bool = True,
        bias: tuple[int, ...] | None = None,
        segments: bool = False,
        scale: float | None = None,
        batch: int = 2,
        **conditions,
    ):
        kv_heads = kv_heads or heads
        self.grid = grid = Grid(queries, keys, heads, kv_heads, query_tile, super_tile)
        self.dtype = dtype

        def normal(*shape: int) -> Array:
            return rng.normal(size=shape).astype(dtype)

        self.operands: Operands = {
            Slot.Q: normal(batch, queries, heads, head_dim),
            Slot.K: normal(batch, keys, kv_heads, head_dim),
            Slot.V: normal(batch, keys, kv_heads, head_dim),
            Slot.COARSE_K: normal(batch, grid.coarse_rows, kv_heads, head_dim),
            Slot.COARSE_V: normal(batch, grid.coarse_rows, kv_heads, head_dim),
        }
        if level_bias:
            biases = rng.normal(size=(batch, queries, heads, 2)).astype("float32")
            self.operands[Slot.LEVEL_BIAS] = biases
        if bias is not None:
            self.operands[Slot.BIAS] = rng.normal(size=bias).astype("float32")
        if segments:
            for name, size in (("q_segments", queries), ("kv_segments", keys)):
                conditions[name] = np.sort(rng.integers(0, 3, (batch, size)).astype(np.int32))
        if "mask" in conditions:
            conditions["mask"] = rng.random(conditions["mask"]) < 0.97
        for name in ("q_lengths", "kv_lengths"):
            if name in conditions:
                conditions[name] = np.asarray(conditions[name], np.int32)
        scale = head_dim**-0.5 if scale is None else scale
        q, k, v = (self.operands[slot] for slot in (Slot.Q, Slot.K, Slot.V))
        self.problem = problem = Problem(q, k, v, scale=scale, **conditions)
        for field, slot in (
            ("mask", Slot.MASK),
            ("q_lengths", Slot.Q_LENGTHS),
            ("kv_lengths", Slot.KV_LENGTHS),
            ("q_segments", Slot.Q_SEGMENTS),
            ("kv_segments", Slot.KV_SEGMENTS),
        ):
            if getattr(problem, field) is not None:
                self.operands[slot] = getattr(problem, field)
        self.seen = visible(problem)
        full = self.seen.copy()
        if problem.q_lengths is not None:
            full |= (np.arange(queries) >= problem.q_lengths[:, None])[:, None, :, None]
        self.levels = random_levels(rng, grid, self.seen, full)
        self.operands |= plan_of(grid, self.levels, self.seen)
        self.operands = {slot: jnp.asarray(x) for slot, x in self.operands.items()}
        self.options = Options(
            scale, problem.causal, problem.window, problem.soft_cap, query_tile, super_tile
        )

    @property
    def floats(self) -> dict[Slot, jax.Array]:
        """The operands that have derivatives."""
        return {slot: x for slot, x in self.operands.items() if slot in FLOATS}

    def compute(self, floats, implementation: str = "vulkan"):
        """(out, logsumexp, shares)."""
        return primitives.forward(self.operands | floats, self.options, implementation)

    def oracle(self, floats):
        """The same by definition."""
        problem, operands = self.problem, self.operands | floats
        left, right = problem.window
        size = 10**6
        return dense_adaptive_attention(
            operands[Slot.Q],
            operands[Slot.K],
            operands[Slot.V],
            operands.get(Slot.BIAS),
            operands.get(Slot.MASK),
            coarse_key=operands[Slot.COARSE_K],
            coarse_value=operands[Slot.COARSE_V],
            levels=operands[Slot.LEVELS],
            level_bias=operands.get(Slot.LEVEL_BIAS),
            query_tile=self.options.query_tile,
            super_tile=self.options.super_tile,
            scale=problem.scale,
            is_causal=problem.causal,
            query_seq_lengths=operands.get(Slot.Q_LENGTHS),
            key_value_seq_lengths=operands.get(Slot.KV_LENGTHS),
            local_window_size=(size if left < 0 else left, size if right < 0 else right),
            query_segment_ids=operands.get(Slot.Q_SEGMENTS),
            key_value_segment_ids=operands.get(Slot.KV_SEGMENTS),
            logits_soft_cap=problem.soft_cap or None,
        )

    def like(self, rng: np.random.Generator, x: jax.Array) -> jax.Array:
        """Random numbers shaped as `x`."""
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)


def in_float64_trees(function, *trees):
    """Result of `function` where all that floats is float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), trees)
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


CASES = {
    "plain": {},
    "no_level_bias": dict(level_bias=False),
    "causal": dict(queries=150, keys=150, causal=True),
    "ragged": dict(queries=45, keys=77, query_tile=16),
    "one_tile": dict(queries=9, keys=40, query_tile=128),
    "long": dict(queries=70, keys=2100, query_tile=64, super_tile=1024, batch=1),
    "long_causal": dict(queries=2070, keys=2070, query_tile=128, batch=1, heads=1, causal=True),
    "groups": dict(heads=8, kv_heads=2, causal=True, query_tile=64),
    "chunks": dict(heads=6, kv_heads=1, query_tile=16, batch=1),
    "wide": dict(head_dim=128, batch=1, query_tile=128),
    "widest": dict(head_dim=250, batch=1, heads=1),
    "window": dict(queries=150, keys=150, window=(60, 3)),
    "lengths": dict(q_lengths=[40, 100], kv_lengths=[100, 60]),
    "lengths_of_0": dict(q_lengths=[0, 100], kv_lengths=[100, 0]),
    "segments": dict(segments=True, query_tile=16),
    "mask": dict(mask=(2, 2, 100, 100), query_tile=16),
    "soft_cap": dict(soft_cap=1.5, scale=1.0),
    "bias_of_heads": dict(bias=(1, 2, 1, 1), soft_cap=5.0),
    "bias_of_queries": dict(bias=(2, 1, 100, 1), causal=True),
    "bias_of_keys": dict(bias=(1, 1, 1, 2100), queries=70, keys=2100, query_tile=64),
    "bias_of_pairs": dict(bias=(2, 8, 100, 100), heads=8, kv_heads=2, query_tile=16, causal=True),
    "few_queries": dict(queries=9, keys=2100, query_tile=32, super_tile=256, batch=1),
    "few_queries_two_tiles": dict(queries=30, keys=1100, query_tile=16, batch=1),
    "no_keys_but_many": dict(keys=1100, queries=20, batch=1, dtype="float16"),
    "float16": dict(dtype="float16", causal=True, heads=4, kv_heads=2),
    "bfloat16": dict(dtype="bfloat16", queries=130, keys=200, query_tile=64),
    "bfloat16_wide": dict(dtype="bfloat16", queries=130, keys=200, query_tile=64, head_dim=128),
}


@pytest.fixture(params=CASES)
def case(request, rng) -> Case:
    return Case(rng, **CASES[request.param])


def test_forward(case):
    with Ran("vulkan", "forward"):
        actual = case.compute({})
    assert_close(actual, in_float64_trees(case.oracle, case.floats), TOLERANCE[case.dtype][0])


@pytest.mark.parametrize("name", ["few_queries", "few_queries_two_tiles", "no_keys_but_many"])
def test_workgroups_share_long_lists(name, rng):
    """Which `test_forward` compares with the oracle."""
    jax.block_until_ready(Case(rng, **CASES[name]).compute({}))
    assert any(name.startswith("merge_parts") for name in last_dispatch().kernels)


def test_tangent(case, rng):
    along = {slot: case.like(rng, x) for slot, x in case.floats.items()}
    with Ran("vulkan", "tangent"):
        _, actual = jax.jvp(case.compute, (case.floats,), (along,))

    def oracle(floats, along):
        return jax.jvp(case.oracle, (floats,), (along,))[1]

    expected = in_float64_trees(oracle, case.floats, along)
    assert_close(actual, expected, TOLERANCE[case.dtype][1])


def test_gradients(case, rng):
    results, pull = jax.vjp(case.compute, case.floats)
    cotangents = tuple(case.like(rng, x) for x in results)
    with Ran("vulkan", "backward"):
        (actual,) = pull(cotangents)

    def oracle(floats, *cotangents):
        return jax.vjp(case.oracle, floats)[1](cotangents)[0]

    expected = in_float64_trees(oracle, case.floats, *cotangents)
    assert actual.keys() == expected.keys()
    assert_close(actual, expected, TOLERANCE[case.dtype][1])


BIAS_SHAPE = (2, 2, 40, 1040)


@functools.cache
def bias_case() -> Case:
    """All levels, two super-tiles, two heads that share a list."""
    rng = np.random.default_rng(0)
    sizes = dict(zip(("batch", "heads", "queries", "keys"), BIAS_SHAPE, strict=True))
    return Case(rng, kv_heads=1, head_dim=8, query_tile=16, soft_cap=2.0, scale=1.0, **sizes)


@functools.partial(jax.jit, static_argnums=0)
def bias_gradient(implementation: str, operands: Operands, cotangents) -> jax.Array:
    """Of the results of `bias_case` with these operands."""

    def attend(bias):
        values = operands | {Slot.BIAS: bias}
        return primitives.forward(values, bias_case().options, implementation)

    return jax.vjp(attend, operands[Slot.BIAS])[1](cotangents)[0]


@pytest.mark.parametrize("summed", list(itertools.product([False, True], repeat=4)))
def test_gradient_of_a_bias_that_broadcasts(rng, summed):
    """Equals XLA's for the whole matrix of logits, summed where the bias broadcasts."""
    case = bias_case()
    axes = tuple(axis for axis in range(4) if summed[axis])
    shape = [1 if axis in axes else size for axis, size in enumerate(BIAS_SHAPE)]
    bias = normal(rng, *shape)
    cotangents = tuple(case.like(rng, x) for x in case.compute({Slot.BIAS: bias}))
    with Ran("vulkan", "forward", "backward"):
        actual = bias_gradient("vulkan", case.operands | {Slot.BIAS: bias}, cotangents)
        actual.block_until_ready()
    whole = case.operands | {Slot.BIAS: jnp.broadcast_to(bias, BIAS_SHAPE)}
    terms = np.asarray(bias_gradient("xla", whole, cotangents), np.float64)
    expected = terms.sum(axes, keepdims=True)
    assert actual.shape == expected.shape
    # Of a sum along keys softmax leaves little: its error is one of its terms.
    assert np.linalg.norm(actual - expected) <= 1e-4 * np.linalg.norm(terms)


def call_forward(case, operands, *extra: Slot):
    """The bare custom call, which gives the results in slot `extra` besides: (results by slot)."""
    sizes = case.operands[Slot.Q].shape
    types = {
        Slot.OUT: jax.ShapeDtypeStruct(sizes, case.operands[Slot.Q].dtype),
        Slot.LSE: jax.ShapeDtypeStruct(sizes[:-1], jnp.float32),
        Slot.SHARES: jax.ShapeDtypeStruct((*sizes[:-1], 2), jnp.float32),
        Slot.ROW_COUNTS: jax.ShapeDtypeStruct((*sizes[:-1], 2), jnp.uint32),
    }
    types = {slot: t for slot, t in types.items() if slot is not Slot.ROW_COUNTS or slot in extra}
    values = vulkan_call("jax_aat_forward", case.options, operands, types)
    return dict(zip(types, values, strict=True))


def assert_lists_are_what_is_multiplied(case):
    """The work of a call as its lists tell it is what a counter in the shader counts."""
    counts = call_forward(case, case.operands, Slot.ROW_COUNTS)[Slot.ROW_COUNTS]
    sizes = case.grid.granule_sizes
    expected = np.zeros(counts.shape, np.uint32)
    for (batch, chunk, i), tile in tiles_of(case.grid, case.levels, case.seen).items():
        heads = slice(chunk * case.grid.tile_heads, (chunk + 1) * case.grid.tile_heads)
        rows = slice(i * case.grid.positions, (i + 1) * case.grid.positions)
        exact = sum(sizes[granule] for granule in tile.full + tile.mixed)
        expected[batch, rows, heads] = (exact, len(tile.coarse))
    assert expected.any(axis=(0, 1, 2)).all()
    np.testing.assert_array_equal(counts, expected)


COUNTED = ["long_causal", "ragged", "chunks", "lengths", "window"]


@pytest.mark.parametrize("name", COUNTED)
def test_rows_in_lists_are_the_rows_multiplied(rng, name):
    assert_lists_are_what_is_multiplied(Case(rng, **CASES[name]))


def test_flops_of_a_report_are_the_rows_multiplied(rng):
    """Of a plan that the router made, whose last query tile is not full."""
    case = Case(rng, queries=1104, keys=1104, heads=4, kv_heads=2, causal=True)
    q, k, v = (case.operands[slot] for slot in (Slot.Q, Slot.K, Slot.V))
    adaptation = Adaptation(budget=0.3)
    call = dict(is_causal=True, implementation="vulkan")
    plan = plan_tiles(q, k, v, adaptation, **call)
    _, report = tiled_attention(
        q, k, v, adaptation=adaptation, plan=plan, return_report=True, **call
    )
    case.options = case.options.planned(plan.grid)
    operands = {Slot.Q: q, Slot.K: k, Slot.V: v} | plan.operands()
    found = call_forward(case, operands, Slot.ROW_COUNTS)
    counts = np.asarray(found[Slot.ROW_COUNTS], np.float64)
    assert counts.any(axis=(0, 1)).all()
    flops = 4 * q.shape[-1] * counts.sum(-1).mean((0, 1))
    np.testing.assert_allclose(report.flops, flops, 1e-6)


PLAN = (
    *(Slot.LEVELS, Slot.LIST_HEADERS, Slot.LIST_ENTRIES),
    *(Slot.KEY_LIST_HEADERS, Slot.KEY_LIST_ENTRIES),
)


@pytest.mark.parametrize("slot", PLAN)
@pytest.mark.parametrize("garbage", ["ones", "random", "zeros"])
def test_corrupted_plan_reads_nothing_outside(rng, slot, garbage):
    """Whatever a plan holds, a call ends, and the next one is right."""
    lengths = dict(q_lengths=[80], kv_lengths=[1090])
    case = Case(rng, queries=90, keys=1100, batch=1, bias=(1, 2, 1, 1100), **lengths)
    shape = case.operands[slot].shape
    bad = {
        "ones": np.full(shape, 0xFFFFFFFF, np.uint32),
        "random": rng.integers(0, 2**32, shape, np.uint32),
        "zeros": np.zeros(shape, np.uint32),
    }[garbage]
    corrupted = case.operands | {slot: jnp.asarray(bad)}

    def attend(floats):
        return primitives.forward(corrupted | floats, case.options, "vulkan")

    results, pull = jax.vjp(attend, case.floats)
    jax.block_until_ready(pull(tuple(jnp.ones_like(x) for x in results)))
    along = {slot: jnp.ones_like(x) for slot, x in case.floats.items()}
    jax.block_until_ready(jax.jvp(attend, (case.floats,), (along,)))
    expected = in_float64_trees(case.oracle, case.floats)
    assert_close(case.compute({}), expected, TOLERANCE["float32"][0])


def test_maps_use_all_levels(rng):
    """The random maps are what these tests take them for."""
    assert set(np.unique(Case(rng, **CASES["long_causal"]).levels)) == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("levels", [(0,), (0, 1, 2)])
def test_equals_xla_for_a_plan_of_the_router(rng, dtype, levels):
    """Results and gradients, through the public functions."""
    adaptation = Adaptation(threshold=1e-4, levels=levels, query_tile=64)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1100, heads, 16)), dtype) for heads in (2, 1, 1))
    bias = jnp.repeat(normal(rng, 1, 1, 1, 69, dtype=dtype), 16, axis=-1)[..., :1100]
    choose = jax.jit(functools.partial(plan_tiles, adaptation=adaptation, is_causal=True))
    plan = choose(q, k, v, bias=bias)
    cotangent = normal(rng, *q.shape, dtype=dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def results(implementation, plan, cotangent, *values):
        def attend(q, k, v, bias):
            options = dict(is_causal=True, plan=plan, implementation=implementation)
            return tiled_attention(q, k, v, bias, **options)

        out, pull = jax.vjp(attend, *values)
        return out, pull(cotangent)

    expected, expected_gradients = results("xla", plan, cotangent, q, k, v, bias)
    with Ran("vulkan", "forward", "backward"):
        actual, gradients = results("vulkan", plan, cotangent, q, k, v, bias)
        jax.block_until_ready(gradients)
    assert_close(actual, expected, TOLERANCE[dtype][0])
    assert_close(gradients, expected_gradients, TOLERANCE[dtype][1])


def test_transformations(rng):
    """jit, vmap and second order with a frozen plan equal what XLA computes."""
    adaptation = Adaptation(threshold=1e-4, query_tile=16)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 1, 90, 1, 8)), jnp.float32) for _ in range(3))

    choose = jax.vmap(functools.partial(plan_tiles, adaptation=adaptation))
    plans = as_users_compile(choose)(q, k, v)

    def curvature(implementation):
        def one(plan, *values):
            def loss(q, k, v):
                out = tiled_attention(q, k, v, plan=plan, implementation=implementation)
                return jnp.square(out).sum()

            return jax.jvp(jax.grad(loss, (0, 1, 2)), values, values[::-1])

        return jax.jit(jax.vmap(one))(plans, q, k, v)

    with Ran("vulkan", "forward", "tangent", "backward"):
        actual = jax.block_until_ready(curvature("vulkan"))
    assert_close(actual, curvature("xla"), TOLERANCE["float32"][1])
