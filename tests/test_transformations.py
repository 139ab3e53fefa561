"""`tiled_attention` under every transformation of JAX, against the oracle or a Python loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import Ran, assert_close, assert_same_bits, in_float64, normal
from jax import export
from jax.test_util import check_grads

from jax_aat import Adaptation, ResolutionState, plan_tiles, router, tiled_attention
from jax_aat.primitives.batch_axes import BatchAxes
from jax_aat.reference import dense_attention

B, T, S, N, K, H = 2, 9, 11, 4, 2, 16
ALL = (0, 1, 2, 3)
TARGETS = ("jax_aat_forward", "jax_aat_tangent", "jax_aat_backward", "jax_aat_plan")


@pytest.fixture
def arrays(rng):
    """query, key, value, bias."""
    return (
        normal(rng, B, T, N, H),
        normal(rng, B, S, K, H),
        normal(rng, B, S, K, H),
        normal(rng, 1, N, 1, S),
    )


@pytest.fixture
def attention(implementation):
    """(query, key, value, bias) -> (out, logsumexp)."""
    return functools.partial(
        tiled_attention, is_causal=True, implementation=implementation, return_residual=True
    )


def dense(*arrays):
    return dense_attention(*arrays, is_causal=True)


def curved(attention):
    """A tensor that is curved in both results."""

    def function(*arrays):
        out, lse = attention(*arrays)
        return jnp.sin(out) * jnp.cos(lse)[..., None]

    return function


def loss(attention):
    """The sum of `curved`."""
    return lambda *arrays: curved(attention)(*arrays).sum()


STRICT = {
    "no jit": jax.disable_jit,
    "no broadcasting between ranks": functools.partial(jax.numpy_rank_promotion, "raise"),
    "no promotion of dtypes": functools.partial(jax.numpy_dtype_promotion, "strict"),
}


@pytest.mark.parametrize("adaptation", [None, Adaptation(budget=0.5)], ids=["exact", "adaptive"])
@pytest.mark.parametrize("strict", STRICT)
def test_where_users_forbid_it_in_their_own_code(strict, adaptation, attention, arrays):
    attend = functools.partial(attention, adaptation=adaptation)
    derivative = jax.grad(loss(attend), argnums=(0, 3))
    right = attend(*arrays), derivative(*arrays)
    router._rows_by_shape.cache_clear()
    with STRICT[strict]():
        found = attend(*arrays), derivative(*arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, right)


def primitives(function, *args):
    """Equations of our primitives in the jaxpr of a function, those of inner jaxprs included."""
    found = []

    def search(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in TARGETS:
                found.append(eqn)
                continue
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner, "eqns"):
                        search(inner)

    search(jax.make_jaxpr(function)(*args))
    return found


def along(f, tangents):
    """The derivative of `f` in the direction of `tangents`."""
    return lambda *arrays: jax.jvp(f, arrays, tangents)[1]


# Of attention, all to tensors: the terms of a lone scalar cancel in some random inputs, and its
# relative error then has no bound.
SECOND_ORDER = {
    "forward over reverse": lambda a, xs, ts: along(jax.grad(loss(a), ALL), ts)(*xs),
    "reverse over reverse": lambda a, xs, ts: jax.vjp(jax.grad(loss(a), ALL), *xs)[1](ts),
    "reverse over forward": lambda a, xs, ts: jax.grad(along(loss(a), ts), ALL)(*xs),
    "forward over forward": lambda a, xs, ts: along(along(curved(a), ts), ts)(*xs),
}


@pytest.mark.parametrize("order", SECOND_ORDER)
def test_second_order(order, attention, arrays, implementation, rng):
    tangents = tuple(normal(rng, *x.shape) for x in arrays)

    def derivative(attention, *values):
        return SECOND_ORDER[order](attention, values[:4], values[4:])

    expected = in_float64(functools.partial(derivative, dense), *arrays, *tangents)
    passes = ("tangent",) if order == "forward over forward" else ("tangent", "backward")
    with Ran(implementation, "forward", *passes):
        result = jax.block_until_ready(
            jax.jit(functools.partial(derivative, attention))(*arrays, *tangents)
        )
    assert_close(result, expected, 1e-4)


def test_third_order(attention, arrays):
    def third(attention, q, k, v, bias):
        direction = (k[:, :T].repeat(N // K, 2),)
        f = lambda x: loss(attention)(x, k, v, bias)  # noqa: E731
        return jax.grad(along(along(f, direction), direction))(q)

    expected = in_float64(functools.partial(third, dense), *arrays)
    assert_close(jax.jit(functools.partial(third, attention))(*arrays), expected, 1e-4)


def test_check_grads_of_order_two(attention, arrays):
    small = tuple(x[:1, :4] if x.ndim == 4 and x.shape[1] != N else x[..., :4] for x in arrays)
    # Steps of 1e-4, the default, leave differences of float32 two digits.
    tolerance = {"atol": 0.02, "rtol": 0.02, "eps": 1e-2}
    check_grads(jax.jit(loss(attention)), small, order=2, modes=("fwd", "rev"), **tolerance)


def test_check_grads_of_order_two_in_float64(arrays):
    with jax.enable_x64(True):
        small = tuple(jnp.asarray(np.asarray(x, np.float64))[..., :5, :, :] for x in arrays[:3])
        attend = functools.partial(
            tiled_attention, is_causal=True, logits_soft_cap=2.0, return_residual=True
        )
        check_grads(jax.jit(loss(attend)), small, order=2, modes=("fwd", "rev"))


def test_jacobians_in_both_modes(attention, arrays):
    q, k, v, bias = arrays[0][:1, :3], arrays[1][:1, :4], arrays[2][:1, :4], arrays[3][..., :4]

    def jacobian(transform, attention, *xs):
        return transform(attention, argnums=ALL)(*xs)

    expected = in_float64(functools.partial(jacobian, jax.jacrev, dense), q, k, v, bias)
    for transform in (jax.jacfwd, jax.jacrev):
        result = jax.jit(functools.partial(jacobian, transform, attention))(q, k, v, bias)
        assert_close(result, expected, 1e-4)


def test_linearize_and_its_transpose(attention, arrays):
    results, linear = jax.linearize(attention, *arrays)
    assert_close(linear(*arrays), jax.jvp(attention, arrays, arrays)[1], 1e-6)
    transposed = jax.linear_transpose(linear, *arrays)(results)
    assert_close(transposed, jax.vjp(attention, *arrays)[1](results), 1e-6)


def test_zero_tangents_are_left_out(attention, arrays):
    q, k, v, bias = arrays
    (_, tangent) = primitives(
        lambda v, dv: jax.jvp(lambda v: attention(q, k, v, bias), (v,), (dv,)), v, v
    )
    assert [slot.name for slot in tangent.params["slots"]][-1] == "DV"
    assert len(tangent.invars) == 4 + 2 + 1
    (_, backward) = primitives(jax.grad(lambda v: attention(q, k, v, bias)[0].sum()), v)
    assert [slot.name for slot in backward.params["results"]] == ["DV"]
    assert len(backward.invars) == 4 + 2 + 1  # no cotangent of logsumexp


IN_AXES = [
    (0, None, None, None),
    (None, 1, None, None),
    (None, None, 2, None),
    (None, None, None, 3),
    (1, 0, 0, None),
    (None, -1, 4, 0),
    (4, 3, 2, 1),
]


@pytest.mark.parametrize("in_axes", IN_AXES)
def test_vmap_over_any_operands_and_axes(in_axes, attention, arrays, rng):
    mapped = [
        x if axis is None else jnp.stack([x, 0.5 * x + 0.1, -x], axis)
        for x, axis in zip(arrays, in_axes, strict=True)
    ]

    def gradients(*xs):
        return *attention(*xs), *jax.grad(loss(attention), ALL)(*xs)

    result = jax.jit(jax.vmap(gradients, in_axes))(*mapped)
    alone = jax.jit(gradients)
    looped = [
        alone(
            *(
                x if axis is None else jnp.take(x, i, axis)
                for x, axis in zip(mapped, in_axes, strict=True)
            )
        )
        for i in range(3)
    ]
    assert_close(result, jax.tree.map(lambda *xs: jnp.stack(xs), *looped), 1e-5)


def test_vmap_neither_loops_nor_copies(attention, arrays):
    q, k, v, bias = arrays
    batched = jnp.stack([q] * 5)
    (eqn,) = primitives(jax.vmap(attention, (0, None, None, None)), batched, k, v, bias)
    assert [x.aval.shape for x in eqn.invars] == [
        (5, B, T, N, H),
        (1, B, S, K, H),
        (1, B, S, K, H),
        (1, 1, N, 1, S),
    ]


def test_nested_vmap_beyond_the_batch_axes_of_the_runtime(attention, rng):
    """Six batch axes that broadcast each in its own way."""
    q, k, v = normal(rng, 2, 2, 5, 2, H), normal(rng, 3, 1, 7, 1, H), normal(rng, 2, 1, 7, 1, H)
    mask = jnp.asarray(rng.random((2, 1, 1, 1, 7)) < 0.7).at[..., 0].set(True)

    def plain(q, k, v, mask):
        return attention(q[None], k, v, None, mask)[0].sum(0)

    axes = [(0, None, None, None), (None, 0, None, None), (None, None, 0, None)]
    axes += [(None, None, None, 0), (0, None, None, None)]
    mapped = functools.reduce(lambda f, a: jax.vmap(f, a), axes, plain)
    total = lambda *xs: jnp.square(mapped(*xs)).sum()  # noqa: E731
    result, gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v, mask)

    def looped(q, k, v):
        choices = itertools.product(range(2), range(3), range(2), range(2), range(2))
        attended = (
            dense_attention(q[a, b][None], k[c], v[d], None, mask[e], is_causal=True)[0]
            for a, c, d, e, b in choices
        )
        return sum(jnp.square(x).sum() for x in attended)

    expected = in_float64(jax.value_and_grad(looped, (0, 1, 2)), q, k, v)
    assert_close((result, gradient), expected, 1e-4)


def test_batch_axes_are_merged():
    # Two operands over five axes: alike in the first two, then each apart.
    batch, shapes = (2, 3, 4, 5, 1), [(2, 3, 1, 5, 1), (2, 3, 4, 1, 1)]
    axes = BatchAxes.merging(batch, shapes, limit=4)
    assert axes.groups == ((0, 2), (2, 3), (3, 5))
    assert [axes.merged_shape((*shape, 7)) for shape in shapes] == [(6, 1, 5, 7), (6, 4, 1, 7)]
    few = BatchAxes.merging(batch, shapes, limit=2)
    assert [few.merged_shape(shape) for shape in shapes] == [(24, 5), (24, 1)]
    x = jnp.arange(30.0).reshape(2, 3, 1, 5, 1)
    assert_same_bits(few.merge(x), jnp.broadcast_to(x, (2, 3, 4, 5, 1)).reshape(24, 5))
    assert_same_bits(few.restore(few.merge(x), x.shape), 4 * x)


def test_control_flow(attention, arrays):
    q, k, v, bias = arrays
    step = lambda x: attention(x, k, v, bias)[0]  # noqa: E731

    def scanned(q):
        return jax.lax.scan(lambda x, _: (step(x), None), q, None, length=3)[0]

    def counted(q):
        return jax.lax.fori_loop(0, 3, lambda _, x: step(x), q)

    def chosen(q):
        return jax.lax.cond(q[0, 0, 0, 0] > -1e9, lambda x: step(step(step(x))), lambda x: x, q)

    def gradient(function, q):
        return jax.value_and_grad(lambda q: jnp.square(function(q)).sum())(q)

    expected = jax.jit(functools.partial(gradient, lambda q: step(step(step(q)))))(q)
    for function in (scanned, counted, chosen):
        assert_close(jax.jit(functools.partial(gradient, function))(q), expected, 1e-5)


def test_checkpoint_policies(attention, arrays):
    saved = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_logsumexp")
    expected = jax.grad(loss(attention), ALL)(*arrays)
    for policy, forwards in ((None, 2), (saved, 1)):
        gradient = jax.grad(jax.checkpoint(loss(attention), policy=policy), ALL)
        names = [eqn.primitive.name for eqn in primitives(gradient, *arrays)]
        assert names.count("jax_aat_forward") == forwards
        assert_close(jax.jit(gradient)(*arrays), expected, 1e-6)


def test_donation(attention, arrays):
    expected = attention(*arrays)[0]
    donated = jax.jit(lambda *xs: attention(*xs)[0], donate_argnums=0)
    query = jnp.array(arrays[0])
    assert_close(donated(query, *arrays[1:]), expected, 1e-6)
    assert query.is_deleted()


def test_eval_shape(attention, arrays):
    out, lse = jax.eval_shape(attention, *(jnp.bfloat16(x) for x in arrays))
    assert (out.shape, out.dtype) == ((B, T, N, H), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((B, T, N), jnp.bfloat16)


# JAX wants to be told that the meaning of a custom call will not change under an exported program.
CHECKS = [export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]


@pytest.mark.parametrize("symbolic", [False, True])
def test_export_round_trip(symbolic, attention, arrays):
    batch, queries, keys = export.symbolic_shape("b, t, s") if symbolic else (B, T, S)
    shapes = [(batch, queries, N, H), (batch, keys, K, H), (batch, keys, K, H), (1, N, 1, keys)]
    types = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    @jax.jit
    def both(*arrays):
        return attention(*arrays), jax.grad(loss(attention), ALL)(*arrays)

    exported = export.export(both, disabled_checks=CHECKS)(*types)
    restored = export.deserialize(exported.serialize())
    assert_close(restored.call(*arrays), both(*arrays), 1e-5)


def test_export_with_derivatives(attention, arrays):
    exported = export.export(jax.jit(attention), disabled_checks=CHECKS)(*arrays)
    restored = export.deserialize(exported.serialize(vjp_order=1))
    result = jax.grad(loss(restored.call), ALL)(*arrays)
    assert_close(result, jax.grad(loss(attention), ALL)(*arrays), 1e-5)


def test_export_for_other_platforms(attention, arrays):
    exported = export.export(
        jax.jit(attention), platforms=("cpu", "cuda", "tpu"), disabled_checks=CHECKS
    )(*arrays)
    restored = export.deserialize(exported.serialize())
    assert_close(jax.jit(restored.call)(*arrays), attention(*arrays), 1e-6)


def test_export_of_adaptive_calls_with_a_symbolic_batch(rng):
    adaptation = Adaptation(budget=0.5, query_tile=16)
    state = Adaptation(threshold=1e-3, query_tile=16, replan_every=2, audit_rate=1 / 8)

    def everything(q, k, v, lengths):
        call = functools.partial(
            tiled_attention,
            is_causal=True,
            key_value_seq_lengths=lengths,
            implementation="xla",
            return_report="certified",
        )

        def loss(q):
            out, report = call(q, k, v, adaptation=adaptation)
            return (out**2).sum(), report

        carried = ResolutionState.init(q, k, state, is_causal=True)
        following = call(q, k, v, adaptation=state, state=carried)
        return jax.value_and_grad(loss, has_aux=True)(q), following

    (batch,) = export.symbolic_shape("b")
    shapes = [(batch, 48, 2, 8), (batch, 48, 1, 8), (batch, 48, 1, 8)]
    types = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    function = jax.jit(everything)
    exported = export.export(function)(*types, jax.ShapeDtypeStruct((batch,), jnp.int32))
    restored = export.deserialize(exported.serialize())
    for size in (1, 3):
        arrays = [normal(rng, size, *shape[1:]) for shape in shapes]
        arrays.append(jnp.array([48, 30, 17])[:size])
        actual, expected = restored.call(*arrays), function(*arrays)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), actual, expected
        )


def test_export_with_plans_states_and_reports(implementation, rng):
    """They are arguments and results of an exported function like any other."""
    q, k, v = (normal(rng, 1, 48, heads, 8) for heads in (2, 1, 1))
    adaptation = Adaptation(threshold=1e-3, query_tile=16, replan_every=2, audit_rate=1 / 8)
    options = {"is_causal": True, "implementation": implementation}
    plan = plan_tiles(q, k, v, adaptation, **options)
    state = ResolutionState.init(q, k, adaptation, is_causal=True)
    call = functools.partial(tiled_attention, **options, return_report=True)

    @jax.jit
    def by_plan(q, plan):
        return call(q, k, v, plan=plan)

    @jax.jit
    def by_state(q, state):
        return call(q, k, v, adaptation=adaptation, state=state)

    for function, carried in ((by_plan, plan), (by_state, state)):
        exported = export.export(function, disabled_checks=CHECKS)(q, carried)
        restored = export.deserialize(exported.serialize())
        assert restored.in_tree == exported.in_tree
        assert restored.out_tree == exported.out_tree
        assert_same_bits(restored.call(q, carried), function(q, carried))
    _, following, report = restored.call(q, state)
    assert following.plan.adaptation == adaptation
    assert "head" in str(report)


def test_parts_merge_by_their_residuals(attention, arrays):
    """Attention over all keys from attention over halves, gradients included."""
    q, k, v, bias = arrays

    def merged(q, k, v, bias):
        half = functools.partial(attention, is_causal=False)
        parts = [half(q, k[:, s], v[:, s], bias[..., s]) for s in (slice(0, 5), slice(5, S))]
        outs, lses = (jnp.stack(xs) for xs in zip(*parts, strict=True))
        return (jax.nn.softmax(lses, axis=0)[..., None] * outs).sum(0)

    def gradients(function, *xs):
        return jax.value_and_grad(lambda *ys: jnp.exp(function(*ys)).sum(), ALL)(*xs)

    whole = lambda *xs: dense_attention(*xs)[0]  # noqa: E731
    expected = in_float64(functools.partial(gradients, whole), q, k, v, bias)
    assert_close(jax.jit(functools.partial(gradients, merged))(q, k, v, bias), expected, 1e-4)
