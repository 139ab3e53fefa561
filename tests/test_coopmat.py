"""The cooperative-matrix kernels against a float64 oracle, where a device has the matrices."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import comparison
import jax
import numpy as np
import pytest
import test_adaptive_vulkan
import test_router_vulkan
from oracle import Attention, relative_error
from test_kernels import TOLERANCE, backward, forward, make, normal, tangent

from jax_aat import Adaptation, _native, plan_tiles, tiled_attention, tuning, vulkan
from jax_aat.problem import Options, Slot

# Several tiles of 128 rows (64 where heads are wider than 128) and blocks of 64, cut by the ends of
# the sequences.
CASES = {
    "full": dict(queries=256, keys=256),
    "ragged": dict(queries=300, keys=203),
    "causal": dict(queries=300, keys=300, causal=True),
    "groups_of_3": dict(queries=150, keys=333, heads=6, kv_heads=2, causal=True),
    "groups_of_8": dict(queries=100, keys=200, heads=8, kv_heads=1, window=(30, 20)),
    "groups_of_32": dict(queries=40, keys=77, heads=32, kv_heads=1, batch=(1,)),
    "one_query": dict(queries=1, keys=300),
    "head_dim_8": dict(head_dim=8, queries=140, keys=140, causal=True),
    "head_dim_40": dict(head_dim=40, queries=140, keys=140),
    "head_dim_72": dict(head_dim=72, queries=140, keys=140, causal=True),
    "head_dim_128": dict(head_dim=128, queries=300, keys=300, causal=True),
    "wide_ragged": dict(head_dim=128, queries=300, keys=203),
    "wide_groups_of_3": dict(head_dim=96, queries=150, keys=333, heads=6, kv_heads=2, causal=True),
    "wide_groups_of_8": dict(
        head_dim=128, queries=100, keys=200, heads=8, kv_heads=1, window=(30, 20)
    ),
    "wide_groups_of_32": dict(head_dim=128, queries=40, keys=77, heads=32, kv_heads=1, batch=(1,)),
    "wide_lengths": dict(
        head_dim=128, queries=200, keys=200, q_lengths=[150, 0], kv_lengths=[40, 200]
    ),
    "wide_segments": dict(head_dim=128, queries=200, keys=200, segments=True, causal=True),
    "wide_bias": dict(head_dim=128, queries=140, keys=200, bias=(1, 2, 140, 200), causal=True),
    "wide_soft_cap": dict(head_dim=128, queries=140, keys=200, soft_cap=1.5, scale=1.0),
    "head_dim_136": dict(head_dim=136, queries=140, keys=140, causal=True),
    "head_dim_200": dict(head_dim=200, queries=140, keys=203, heads=6, kv_heads=2),
    "head_dim_256": dict(head_dim=256, queries=200, keys=200, causal=True),
    "widest_groups_of_8": dict(
        head_dim=256, queries=100, keys=200, heads=8, kv_heads=1, window=(30, 20)
    ),
    "widest_one_query": dict(head_dim=256, queries=1, keys=300),
    "widest_lengths": dict(
        head_dim=256, queries=150, keys=150, q_lengths=[100, 0], kv_lengths=[40, 150]
    ),
    "widest_segments": dict(head_dim=256, queries=150, keys=150, segments=True, causal=True),
    "widest_bias": dict(head_dim=256, queries=100, keys=140, bias=(1, 2, 100, 140), causal=True),
    "widest_soft_cap": dict(head_dim=256, queries=100, keys=140, soft_cap=1.5, scale=1.0),
    "negative_scale": dict(queries=140, keys=140, scale=-0.2),
    "lengths": dict(queries=200, keys=200, q_lengths=[150, 0], kv_lengths=[40, 200]),
    "segments": dict(queries=200, keys=200, segments=True, causal=True),
    "mask": dict(queries=140, keys=200, mask=(2, 2, 140, 200)),
    "bias": dict(queries=140, keys=200, bias=(1, 2, 140, 200), causal=True),
    "soft_cap": dict(queries=140, keys=200, soft_cap=1.5, scale=1.0),
}


@pytest.fixture(scope="module", autouse=True)
def layout_is_probed():
    """The first call makes the runtime ask the device how it lays out matrices."""
    forward(make())


def kernels_after(results):
    """What ran last, once these are there."""
    jax.block_until_ready(results)
    return vulkan.last_dispatch().kernels


def require_matrices(dtype):
    if not vulkan.has_matrices(vulkan.default_device().traits, dtype):
        pytest.skip(f"the device has no cooperative matrices of {dtype}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_passes(name, dtype):
    require_matrices(dtype)
    problem = make(**{"head_dim": 64, "dtype": dtype} | CASES[name])
    expected = Attention(problem)
    tolerance, derivative_tolerance = TOLERANCE[dtype]
    out, logsumexp = forward(problem)
    assert vulkan.last_dispatch().path == "coopmat"
    assert relative_error(out, expected.out) <= tolerance
    assert relative_error(logsumexp, expected.logsumexp) <= 2e-5

    cotangents = {Slot.DOUT: normal(7, out), Slot.DLSE: normal(8, logsumexp)}
    wanted = [Slot.DQ, Slot.DK, Slot.DV]
    gradients = backward(problem, out, logsumexp, cotangents, wanted)
    ran = vulkan.last_dispatch().kernels
    stores = problem.q.shape[-1] > 64 and problem.mask is None and problem.q_segments is None
    dq = "dq_stored_coopmat" if stores else "dq_coopmat"
    assert any(kernel.startswith(f"attend_backward_{dq}") for kernel in ran)
    assert any(kernel.startswith("attend_backward_dkv_coopmat") for kernel in ran)
    for slot, reference in zip(wanted, expected.backward(*cotangents.values()), strict=False):
        assert relative_error(gradients[slot], reference) <= derivative_tolerance, slot


# Of which there are kernels of tangents, for bfloat16: float16 has no range for them.
NOT_WIDE = [name for name, case in CASES.items() if case.get("head_dim", 64) <= 128]


def assert_tangents_are_right(problem, slots):
    expected = Attention(problem)
    out, logsumexp = forward(problem)
    like = {Slot.DQ: problem.q, Slot.DK: problem.k, Slot.DV: problem.v, Slot.DBIAS: problem.bias}
    along = {slot: normal(slot, like[slot]) for slot in slots}
    found = tangent(problem, out, logsumexp, along)
    ran = vulkan.last_dispatch().kernels
    assert any(kernel.startswith("attend_tangent_coopmat") for kernel in ran)
    references = expected.tangent(**{slot.name.lower(): x for slot, x in along.items()})
    for x, reference in zip(found, references, strict=True):
        assert relative_error(x, reference) <= TOLERANCE[problem.q.dtype.name][1]


@pytest.mark.parametrize("name", NOT_WIDE)
def test_tangents(name):
    require_matrices("bfloat16")
    problem = make(**{"head_dim": 64, "dtype": "bfloat16"} | CASES[name])
    slots = [Slot.DQ, Slot.DK, Slot.DV] + [Slot.DBIAS] * (problem.bias is not None)
    assert_tangents_are_right(problem, slots)


ONE_TANGENT = [(given, {}) for given in (Slot.DQ, Slot.DK, Slot.DV)]
ONE_TANGENT += [(given, {"bias": (1, 4, 150, 150)}) for given in (Slot.DK, Slot.DV, Slot.DBIAS)]


@pytest.mark.parametrize(("given", "options"), ONE_TANGENT, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_tangent_alone(head_dim, given, options):
    require_matrices("bfloat16")
    sizes = dict(queries=150, keys=150, heads=4, kv_heads=2)
    assert_tangents_are_right(
        make(dtype="bfloat16", head_dim=head_dim, **sizes, **options), [given]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tangents_of_any_size(dtype):
    """They are linear: small ones come out as precise as others, beside weights of many keys."""
    require_matrices(dtype)
    problem = make(dtype=dtype, head_dim=64, queries=64, keys=4096, heads=1, batch=(1,))
    out, logsumexp = forward(problem)
    like = {Slot.DQ: problem.q, Slot.DK: problem.k, Slot.DV: problem.v}
    along = {slot: normal(slot, x).astype(np.float32) * 1e-3 for slot, x in like.items()}
    along = {slot: x.astype(problem.q.dtype) for slot, x in along.items()}
    expected = Attention(problem).tangent(**{slot.name.lower(): x for slot, x in along.items()})
    for x, reference in zip(tangent(problem, out, logsumexp, along), expected, strict=True):
        assert relative_error(x, reference) <= TOLERANCE[dtype][1]


@contextmanager
def other_shapes(dtype, head_dim, *, planned):
    """Kernels run in the last shape that a tuning may choose."""
    device = vulkan.default_device()
    names = ["forward", "backward_dq", "backward_dkv"]
    if dtype == "bfloat16":
        names.append("tangent")
    kernels = [tuning.Kernel(name, dtype, head_dim, planned) for name in names]
    shapes = {kernel: tuning.shapes_of(device, kernel) for kernel in kernels}
    assert all(len(fitting) > 1 for fitting in shapes.values())
    before = tuning.tuning(device)
    tuning.set_tuning(device, {kernel: fitting[-1] for kernel, fitting in shapes.items()})
    try:
        yield
    finally:
        tuning.set_tuning(device, before)


NARROW = [name for name, case in CASES.items() if case.get("head_dim", 64) <= 64]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NARROW)
def test_passes_in_other_shapes(name, dtype):
    require_matrices(dtype)
    with other_shapes(dtype, CASES[name].get("head_dim", 64), planned=False):
        test_passes(name, dtype)
        if dtype == "bfloat16":
            test_tangents(name)


@pytest.fixture
def unknown_layout():
    """Kernels look at elements of matrices through shared memory."""
    before = vulkan.default_device().traits
    _native.hide_matrix_layout(True)
    hidden = {"coopmat_layout_known": False, "coopmat_relays": True}
    assert vulkan.default_device().traits == {**before, **hidden}
    yield
    _native.hide_matrix_layout(False)
    assert vulkan.default_device().traits == before


UNKNOWN_LAYOUT = [
    "ragged",
    "groups_of_3",
    "one_query",
    "head_dim_40",
    "head_dim_128",
    "wide_segments",
    "wide_bias",
    "head_dim_256",
    "widest_lengths",
    "widest_segments",
    "soft_cap",
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", UNKNOWN_LAYOUT)
def test_passes_where_no_layout_is_known(name, dtype, request):
    require_matrices(dtype)
    request.getfixturevalue("unknown_layout")
    test_passes(name, dtype)
    if name in NOT_WIDE and dtype == "bfloat16":
        test_tangents(name)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_plans_where_no_layout_is_known(head_dim, rng, request):
    require_matrices("bfloat16")
    request.getfixturevalue("unknown_layout")
    test_plans(128, head_dim, rng)
    test_correction(head_dim, 4, {"is_causal": True}, rng)
    test_tangents_of_plans(128, head_dim, "all", rng)
    test_plan_of_few_queries(head_dim, rng)


def test_router_where_no_layout_is_known(rng, request):
    require_matrices("bfloat16")
    operands = test_router_vulkan.clustered(rng, 700, 700, head_dim=64, dtype="bfloat16")
    options = Options(scale=0.125, causal=True)
    adaptation = Adaptation(budget=0.25, query_tile=128, stages=2)
    found = []
    for layout in ("known", "unknown"):
        if layout == "unknown":
            request.getfixturevalue("unknown_layout")
        prices, on_matrices = test_router_vulkan.made(operands, options, adaptation)
        assert on_matrices
        found.append(prices)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("scores", ["growing", "far_apart"])
def test_careful_pass_where_no_layout_is_known(scores, request):
    require_matrices("bfloat16")
    request.getfixturevalue("unknown_layout")
    for sizes in ((300, 320), (5, 1100)):
        test_weights_out_of_the_range_of_the_fast_pass(sizes, globals()[scores], "bfloat16", 64)


@pytest.mark.parametrize("wanted", [Slot.DQ, Slot.DK, Slot.DV])
def test_one_gradient_alone(wanted):
    require_matrices("bfloat16")
    problem = make(dtype="bfloat16", head_dim=64, queries=150, keys=150, heads=4, kv_heads=2)
    out, logsumexp = forward(problem)
    cotangents = {Slot.DOUT: normal(7, out), Slot.DLSE: normal(8, logsumexp)}
    everything = [Slot.DQ, Slot.DK, Slot.DV]
    together = backward(problem, out, logsumexp, cotangents, everything)[wanted]
    alone = backward(problem, out, logsumexp, cotangents, [wanted])[wanted]
    np.testing.assert_array_equal(alone, together)


def operand(rng, heads, head_dim):
    return comparison.normal(rng, 2, 700, heads, head_dim).astype("bfloat16")


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("query_tile", [64, 128, 256])
def test_plans(query_tile, head_dim, rng):
    require_matrices("bfloat16")
    q, dout = (operand(rng, 8, head_dim) for _ in range(2))
    k, v = (operand(rng, 2, head_dim) for _ in range(2))
    adaptation = Adaptation(budget=0.5, query_tile=query_tile)
    plan = plan_tiles(q, k, v, adaptation, is_causal=True, implementation="xla")

    def run(implementation, *operands):
        attention = partial(tiled_attention, implementation=implementation, is_causal=True)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, plan=plan), *operands)
        ran = [kernels_after(out)]
        gradients = pull(dout.astype(out.dtype))
        return (out, *gradients), [*ran, kernels_after(gradients)]

    found, (forward_kernels, backward_kernels) = run("vulkan", q, k, v)
    assert "attend_forward_coopmat.bf16" in forward_kernels
    for kernel in ("dq", "dkv"):
        assert f"attend_backward_{kernel}_coopmat.bf16" in backward_kernels
    expected, _ = run("xla", *(x.astype("float32") for x in (q, k, v)))
    tolerances = (TOLERANCE["bfloat16"][0], *(TOLERANCE["bfloat16"][1],) * 3)
    for x, reference, tolerance in zip(found, expected, tolerances, strict=True):
        assert relative_error(x, reference) <= tolerance


@pytest.mark.parametrize("moving", ["query", "key", "value", "all"])
@pytest.mark.parametrize(("query_tile", "head_dim"), [(64, 40), (128, 64), (256, 64), (128, 128)])
def test_tangents_of_plans(query_tile, head_dim, moving, rng):
    require_matrices("bfloat16")
    operands = [operand(rng, heads, head_dim) for heads in (8, 2, 2)]
    tangents = [operand(rng, heads, head_dim) for heads in (8, 2, 2)]
    along = [i for i, name in enumerate(["query", "key", "value"]) if moving in (name, "all")]
    adaptation = Adaptation(budget=0.5, query_tile=query_tile)
    plan = plan_tiles(*operands, adaptation, is_causal=True, implementation="xla")

    def run(implementation, dtype):
        attention = partial(
            tiled_attention, implementation=implementation, is_causal=True, plan=plan
        )
        given = [[x.astype(dtype) for x in xs] for xs in (operands, tangents)]

        def of_moving(*xs):
            every = list(given[0])
            for i, x in zip(along, xs, strict=True):
                every[i] = x
            return attention(*every)

        return jax.jvp(of_moving, *([xs[i] for i in along] for xs in given))[1]

    found = run("vulkan", "bfloat16")
    assert "attend_tangent_coopmat.bf16" in kernels_after(found)
    assert relative_error(found, run("xla", "float32")) <= TOLERANCE["bfloat16"][1]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", test_adaptive_vulkan.COUNTED)
def test_rows_in_lists_are_the_rows_multiplied(rng, name, head_dim):
    require_matrices("bfloat16")
    options = test_adaptive_vulkan.CASES[name] | dict(head_dim=head_dim, query_tile=128)
    case = test_adaptive_vulkan.Case(rng, **options, dtype="bfloat16")
    test_adaptive_vulkan.assert_lists_are_what_is_multiplied(case)
    assert "attend_forward_coopmat.bf16" in vulkan.last_dispatch().kernels


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_plan_of_few_queries(head_dim, rng):
    """Workgroups share the list of a tile."""
    require_matrices("bfloat16")
    q = comparison.normal(rng, 2, 7, 8, head_dim).astype("bfloat16")
    k, v = (comparison.normal(rng, 2, 3000, 2, head_dim).astype("bfloat16") for _ in range(2))
    plan = plan_tiles(q, k, v, Adaptation(budget=0.5, query_tile=64), implementation="xla")
    out = tiled_attention(q, k, v, plan=plan, implementation="vulkan")
    kernels = kernels_after(out)
    assert "attend_forward_coopmat.bf16" in kernels
    assert any(kernel.startswith("merge_parts") for kernel in kernels)
    expected = tiled_attention(
        *(x.astype("float32") for x in (q, k, v)), plan=plan, implementation="xla"
    )
    assert relative_error(out, expected) <= TOLERANCE["bfloat16"][0]


@pytest.mark.parametrize(
    ("head_dim", "heads", "options"),
    [
        (40, 4, {"is_causal": True}),
        (64, 4, {"is_causal": True}),
        (64, 6, {"is_causal": True}),
        (128, 4, {"is_causal": True}),
        (64, 4, {}),
        (64, 4, {"is_causal": True, "query_seq_lengths": [2500, 0]}),
        (64, 4, {"is_causal": True, "key_value_seq_lengths": [2600, 1900]}),
    ],
    ids=str,
)
def test_correction(head_dim, heads, options, rng):
    """Values that go along with their keys, so that the correction is a large part of them."""
    require_matrices("bfloat16")
    q = comparison.normal(rng, 2, 2600, heads, head_dim).astype("bfloat16")
    k = comparison.normal(rng, 2, 2600, 2, head_dim).astype("bfloat16")
    options = {name: x if x is True else np.array(x) for name, x in options.items()}
    adaptation = Adaptation(budget=0.25, query_tile=128)
    plan = plan_tiles(q, k, k, adaptation, implementation="xla", **options)

    def attend(implementation, *operands, adaptation=adaptation):
        return tiled_attention(
            *operands, adaptation=adaptation, plan=plan, implementation=implementation, **options
        )

    out = attend("vulkan", q, k, k)
    kernels = kernels_after(out)
    assert "attend_forward_coopmat.bf16" in kernels
    assert "state_correction.bf16" not in kernels
    expected = attend("xla", *(x.astype("float32") for x in (q, k, k)))
    assert relative_error(out, expected) <= TOLERANCE["bfloat16"][0]


@pytest.mark.parametrize("head_dim", [40, 64])
def test_plans_in_other_shapes(head_dim, rng):
    require_matrices("bfloat16")
    with other_shapes("bfloat16", head_dim, planned=True):
        test_plans(128, head_dim, rng)


def growing(problem):
    """Every block of keys beats the ones before by far more than float16 or float32 can hold."""
    keys = problem.k.shape[-3]
    growth = np.linspace(1, 60, keys, dtype=np.float32)[:, None, None]
    return np.abs(problem.q.astype(np.float32)), np.abs(problem.k.astype(np.float32)) * growth


def far_apart(problem):
    """Neighbouring queries whose scores are of quite different size, and below zero."""
    queries = problem.q.shape[-3]
    sizes = np.where(np.arange(queries) % 2, 40, 0.1).astype(np.float32)[:, None, None]
    q, k = problem.q.astype(np.float32), problem.k.astype(np.float32)
    return np.abs(q) * sizes, -np.abs(k)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scores", [growing, far_apart])
@pytest.mark.parametrize("sizes", [(300, 320), (5, 1100)], ids=["tiles", "parts of lists"])
def test_weights_out_of_the_range_of_the_fast_pass(sizes, scores, dtype, head_dim):
    """The careful pass computes these tiles, or parts, anew, and leaves the others as they are."""
    require_matrices(dtype)
    queries, keys = sizes
    problem = make(dtype=dtype, head_dim=head_dim, queries=queries, keys=keys, batch=(2,))
    plain = forward(problem)[0]
    q, k = (x[0].astype(problem.q.dtype) for x in scores(problem))
    problem = replace(problem, q=problem.q.copy(), k=problem.k.copy())
    problem.q[0], problem.k[0] = q, k
    expected = Attention(problem)
    out, logsumexp = forward(problem)
    kernels = vulkan.last_dispatch().kernels
    assert sum(kernel.startswith("attend_forward_coopmat") for kernel in kernels) == 2
    assert any(kernel.startswith("merge_parts") for kernel in kernels) == (queries < 32)
    assert relative_error(out[0], expected.out[0]) <= TOLERANCE[dtype][0]
    assert relative_error(logsumexp, expected.logsumexp) <= 2e-5
    np.testing.assert_array_equal(out[1], plain[1])


def test_heads_take_turns_where_there_is_no_room_for_all_score_gradients():
    require_matrices("bfloat16")
    length = 2048
    room = vulkan.default_device().traits["max_score_gradient_bytes"] // (2 * length**2)
    heads = room + 5
    sizes = dict(dtype="bfloat16", head_dim=128, queries=length, keys=length, batch=(1,))
    problem = make(**sizes, heads=heads, kv_heads=heads)
    wanted = [Slot.DQ, Slot.DK, Slot.DV]

    def gradients(problem):
        out, logsumexp = forward(problem)
        cotangent = np.roll(problem.v, 1, axis=1)
        found = backward(problem, out, logsumexp, {Slot.DOUT: cotangent}, wanted)
        kernels = vulkan.last_dispatch().kernels
        return found, sum(kernel.startswith("attend_backward_dq_stored") for kernel in kernels)

    together, steps = gradients(problem)
    assert steps == 3
    for first in (0, room // 2 - 2, heads - 4):
        part = slice(first, first + 4)
        some = replace(problem, **{x: getattr(problem, x)[:, :, part] for x in ("q", "k", "v")})
        alone, steps = gradients(some)
        assert steps == 1
        for slot in wanted:
            np.testing.assert_array_equal(together[slot][:, :, part], alone[slot])


def test_nan_stays_in_its_row():
    require_matrices("bfloat16")
    problem = make(dtype="bfloat16", head_dim=64, queries=300, keys=320, causal=True)
    expected, _ = forward(problem)
    problem = replace(problem, q=problem.q.copy())
    problem.q[0, 170, 1] = np.nan
    out, logsumexp = (x.copy() for x in forward(problem))
    assert np.isnan(out[0, 170, 1].astype(np.float32)).all()
    assert np.isnan(logsumexp[0, 170, 1])
    out[0, 170, 1] = expected[0, 170, 1]
    assert relative_error(out, expected) <= TOLERANCE["bfloat16"][0]


def test_the_same_bits_every_time():
    require_matrices("bfloat16")
    problem = make(dtype="bfloat16", head_dim=128, queries=300, keys=300, causal=True)
    runs = []
    for _ in range(3):
        out, logsumexp = forward(problem)
        cotangents = {Slot.DOUT: normal(7, out)}
        gradients = backward(problem, out, logsumexp, cotangents, [Slot.DQ, Slot.DK, Slot.DV])
        runs.append([out, logsumexp, *gradients.values()])
    for run in runs[1:]:
        for x, first in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(x, first)
