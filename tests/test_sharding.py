"""`tiled_attention` on eight CPU devices: split by batch and heads, without gathering."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import Ran, assert_close, in_float64, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_aat import Adaptation, ResolutionState, adaptive, tiled_attention
from jax_aat.reference import dense_attention

B, T, S, H = 4, 20, 24, 16
ALL = (0, 1, 2, 3)
QUERY = P("data", None, "model", None)
RAN = {
    "forward": ("forward",),
    "gradient": ("forward", "backward"),
    "hvp": ("forward", "tangent", "backward"),
}
COLLECTIVES = r"\b(all-gather|all-to-all|collective-permute|reduce-scatter)\b"

pytestmark = pytest.mark.usefixtures("eight_cpu_devices")


@pytest.fixture
def eight_cpu_devices():
    devices = jax.devices("cpu")
    assert len(devices) == 8
    with jax.default_device(devices[0]):
        yield


def mesh_of(data: int, model: int, axis_type: AxisType = AxisType.Auto):
    return jax.make_mesh(
        (data, model), ("data", "model"), (axis_type,) * 2, devices=jax.devices("cpu")
    )


def make_arrays(rng, heads, kv_heads):
    """query, key, value, bias."""
    return (
        normal(rng, B, T, heads, H),
        normal(rng, B, S, kv_heads, H),
        normal(rng, B, S, kv_heads, H),
        normal(rng, 1, heads, 1, S),
    )


def specs_of(key=QUERY):
    return QUERY, key, key, P(None, "model", None, None)


def passes(attention):
    """Forward, gradient and Hessian-vector product."""

    def loss(*arrays):
        out, lse = attention(*arrays)
        return (jnp.sin(out) * jnp.cos(lse)[..., None]).sum()

    gradient = jax.grad(loss, ALL)
    return {
        "forward": attention,
        "gradient": gradient,
        "hvp": lambda *arrays: jax.jvp(gradient, arrays, arrays)[1],
    }


def expected_of(arrays):
    def everything(*arrays):
        attention = functools.partial(dense_attention, is_causal=True)
        return {name: f(*arrays) for name, f in passes(attention).items()}

    return in_float64(everything, *arrays)


@pytest.fixture
def attention(implementation):
    return functools.partial(
        tiled_attention, is_causal=True, implementation=implementation, return_residual=True
    )


CASES = {
    # heads, kv_heads, (data, model)
    "one key/value head a query head": (4, 4, (2, 4)),
    "grouped, split by key/value heads": (8, 4, (4, 2)),
    "a key/value head on two devices": (8, 2, (2, 4)),
    "one key/value head on all": (8, 1, (1, 8)),
    "heads that would straddle": (6, 3, (4, 2)),
}
SPLIT_EVENLY = tuple(CASES)[:2]


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [(name, AxisType.Auto) for name in CASES]
    + [(name, AxisType.Explicit) for name in tuple(CASES)[1:3]],
)
def test_batch_and_heads_over_a_mesh(name, axis_type, attention, implementation, rng):
    heads, kv_heads, extents = CASES[name]
    mesh = mesh_of(*extents, axis_type)
    arrays = make_arrays(rng, heads, kv_heads)
    expected = expected_of(arrays)
    specs = specs_of(QUERY if name in SPLIT_EVENLY else P("data"))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
        for which, function in passes(attention).items():
            compiled = jax.jit(function).lower(*placed).compile()
            with Ran(implementation, *RAN[which]):
                result = jax.block_until_ready(compiled(*placed))
            assert_close(result, expected[which], 1e-4)
            if name in SPLIT_EVENLY:
                assert re.findall(COLLECTIVES, compiled.as_text()) == []
                assert result[0].sharding.is_equivalent_to(placed[0].sharding, 4)
            elif which == "forward" and name != "heads that would straddle":
                assert re.findall(COLLECTIVES, compiled.as_text()) == []


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_that_no_array_names(axis_type, attention, rng):
    """As at the first step under `jax.set_mesh`, where nothing was placed yet."""
    arrays = [np.asarray(x) for x in make_arrays(rng, 4, 2)]
    gradient = passes(attention)["gradient"]
    with jax.set_mesh(mesh_of(4, 2, axis_type)):
        assert_close(jax.jit(gradient)(*arrays), expected_of(arrays)["gradient"], 1e-4)


def test_a_mesh_that_a_constraint_alone_names(attention, rng):
    mesh = mesh_of(2, 4)
    arrays = make_arrays(rng, 4, 4)

    def constrained(*arrays):
        return attention(*map(jax.lax.with_sharding_constraint, arrays, specs_of()))

    with jax.set_mesh(mesh):
        for which, function in passes(constrained).items():
            compiled = jax.jit(function).lower(*arrays).compile()
            result = compiled(*arrays)
            assert_close(result, expected_of(arrays)[which], 1e-4)
            assert re.findall(COLLECTIVES, compiled.as_text()) == []
        assert result[0].sharding.is_equivalent_to(NamedSharding(mesh, QUERY), 4)


def test_gradients_of_replicated_keys(attention, implementation, rng):
    """Queries split by heads, keys not: what the devices found is summed."""
    mesh = mesh_of(2, 4)
    arrays = make_arrays(rng, 8, 2)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs_of(P("data")))
    gradient = passes(attention)["gradient"]
    compiled = jax.jit(gradient, in_shardings=shardings, out_shardings=shardings)
    compiled = compiled.lower(*arrays).compile()
    assert_close(compiled(*arrays), expected_of(arrays)["gradient"], 1e-4)
    if implementation == "vulkan":
        assert re.findall(COLLECTIVES, compiled.as_text()) == []


def test_lengths_that_are_split_are_gathered(attention, rng):
    mesh = mesh_of(2, 4)
    arrays = make_arrays(rng, 4, 2)
    along_rows = NamedSharding(mesh, P("data", "model"))
    placed = [*(jax.device_put(x, along_rows) for x in arrays[:3]), arrays[3]]
    for which, function in passes(attention).items():
        assert_close(jax.jit(function)(*placed), expected_of(arrays)[which], 1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, attention, rng):
    mesh = mesh_of(2, 4)
    arrays = make_arrays(rng, 4, 4)
    mapped = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=specs_of(),
        out_specs=(QUERY, P("data", None, "model")),
        check_vma=check_vma,
    )
    expected = expected_of(arrays)
    for which, function in passes(mapped).items():
        compiled = jax.jit(function).lower(*arrays).compile()
        assert_close(compiled(*arrays), expected[which], 1e-4)
        assert re.findall(COLLECTIVES, compiled.as_text()) == []


def test_gradient_inside_shard_map_sums_over_what_broadcasts(attention, rng):
    """Keys that every device holds whole, and a bias without batch axis."""
    mesh = mesh_of(4, 2)
    arrays = make_arrays(rng, 4, 1)
    specs = specs_of(P("data"))

    def gradient(*arrays):
        def loss(*arrays):
            out, lse = attention(*arrays)
            mine = (jnp.sin(out) * jnp.cos(lse)[..., None]).sum()
            return jax.lax.psum(mine, ("data", "model"))

        return jax.grad(loss, ALL)(*arrays)

    mapped = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))
    assert_close(mapped(*arrays), expected_of(arrays)["gradient"], 1e-4)


def test_a_state_of_each_shard(implementation, rng):
    """One that keeps its plan, so that branches of different origin must be alike."""
    adaptation = Adaptation(threshold=1e-3, query_tile=32, replan_every=2)
    q, k, v = (normal(rng, 2, 128, heads, H) for heads in (2, 1, 1))

    def three_calls(q, k, v):
        state, outs = ResolutionState.init(q, k, adaptation, is_causal=True), []
        for _ in range(3):
            out, state = tiled_attention(
                *(q, k, v),
                is_causal=True,
                adaptation=adaptation,
                state=state,
                implementation=implementation,
            )
            outs.append(out)
        return jnp.concatenate(outs, 1)

    split = functools.partial(jax.shard_map, in_specs=P("data"), out_specs=P("data"))
    actual = jax.jit(split(three_calls, mesh=mesh_of(2, 4), axis_names={"data"}))(q, k, v)
    alone = jax.jit(three_calls)
    expected = [alone(*(x[i : i + 1] for x in (q, k, v))) for i in range(2)]
    assert_close(actual, np.concatenate(expected), 1e-6)


def test_shard_map_over_one_of_two_axes(attention, rng):
    mesh = mesh_of(4, 2)
    arrays = make_arrays(rng, 4, 2)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs_of(), strict=True)
    ]
    mapped = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("data"), P()),
        out_specs=(P("data"), P("data")),
        axis_names={"data"},
    )
    expected = expected_of(arrays)
    for which, function in passes(mapped).items():
        assert_close(jax.jit(function)(*placed), expected[which], 1e-4)


def test_vmap_over_a_split_axis(attention, rng):
    mesh = mesh_of(4, 2)
    arrays = make_arrays(rng, 4, 2)
    q, k, v = (x[:, None] for x in arrays[:3])
    mapped = jax.vmap(attention, (0, 0, 0, None))
    by_batch = NamedSharding(mesh, P("data"))
    compiled = jax.jit(mapped, in_shardings=(by_batch,) * 3 + (NamedSharding(mesh, P()),))
    compiled = compiled.lower(q, k, v, arrays[3]).compile()
    result = [np.asarray(x)[:, 0] for x in compiled(q, k, v, arrays[3])]
    assert_close(result, list(expected_of(arrays)["forward"]), 1e-4)
    assert re.findall(COLLECTIVES, compiled.as_text()) == []


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_that_share_a_lambda_are_planned_together(kv_heads, rng, set_traced):
    """Also where nobody reads the plan, whose budget is that of all heads of a batch entry."""
    set_traced(adaptive, "plans_in_one_submission", lambda *_: True)
    adaptation = Adaptation(budget=0.5, query_tile=32)
    attend = functools.partial(
        tiled_attention, is_causal=True, adaptation=adaptation, implementation="vulkan"
    )
    q, k, v = (normal(rng, 4, 400, heads, H) for heads in (4, kv_heads, kv_heads))
    arrays = (q * np.array([0.2, 0.2, 3, 3])[:, None], k, v)
    expected = jax.jit(attend)(*arrays)
    mesh = mesh_of(4, 2)
    keys = QUERY if kv_heads == 2 else P("data")
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, (QUERY, keys, keys), strict=True)
    ]
    with Ran("vulkan", "forward"):
        out = jax.block_until_ready(jax.jit(attend)(*placed))
    assert_close(out, expected, 1e-6)
