"""The attention functions inside Flax's layers, against Flax's own with the same parameters."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from comparison import Ran, assert_close, relative_error
from flax import nnx
from jax.flatten_util import ravel_pytree

from jax_aat import Adaptation, tiled_attention
from jax_aat.flax import linen_attention, nnx_attention

BATCH, LENGTH, FEATURES, HEADS = 2, 19, 24, 4


def inputs(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape or (BATCH, LENGTH, FEATURES))


def padding_mask() -> jax.Array:
    """Float32, as Flax makes it: the second sequence is five positions shorter."""
    real = jnp.arange(LENGTH)[None, :] < jnp.array([LENGTH, LENGTH - 5])[:, None]
    return nn.make_attention_mask(jnp.ones((BATCH, LENGTH)), real)


MASKS = {
    "none": lambda: None,
    "causal float32": lambda: nn.make_causal_mask(jnp.ones((BATCH, LENGTH))),
    "causal bool": lambda: nn.make_causal_mask(jnp.ones((BATCH, LENGTH)), dtype=bool),
    "padding int8": lambda: padding_mask().astype(jnp.int8),
    "causal and padding": lambda: nn.combine_masks(
        nn.make_causal_mask(jnp.ones((BATCH, LENGTH))), padding_mask()
    ),
    "of rank two": lambda: jnp.tril(jnp.ones((LENGTH, LENGTH))),
}


def linen_layer(attention_fn: Any, **options: Any) -> nn.Module:
    return nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, **options)


def nnx_layer(attention_fn: Any, **options: Any) -> nnx.MultiHeadAttention:
    options = {"decode": False, **options}
    return nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=attention_fn, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize("mask", MASKS)
def test_linen_layer_and_its_gradients(implementation: str, mask: str) -> None:
    x, target = inputs(), inputs(seed=1)
    variables = linen_layer(nn.dot_product_attention).init(jax.random.key(2), x)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention_fn: Any, variables: Any, x: jax.Array) -> Any:
        def loss(variables: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = linen_layer(attention_fn).apply(variables, x, mask=MASKS[mask]())
            return jnp.sum(out * target), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

    ours = functools.partial(linen_attention, implementation=implementation)
    with Ran(implementation, "forward", "backward"):
        gradients, out = jax.block_until_ready(run(ours, variables, x))
    expected_gradients, expected = run(nn.dot_product_attention, variables, x)
    assert_close(out, expected, 2e-5)
    # All of them together: the gradient of the bias of keys is zero but for rounding.
    assert_close(ravel_pytree(gradients)[0], ravel_pytree(expected_gradients)[0], 1e-4)


@pytest.mark.parametrize("mask", ["none", "causal float32", "causal and padding"])
def test_nnx_layer_and_its_gradients(implementation: str, mask: str) -> None:
    x, target = inputs(), inputs(seed=1)

    @functools.partial(nnx.jit, static_argnums=0)
    def run(attention_fn: Any, x: jax.Array) -> Any:
        layer = nnx_layer(attention_fn, num_kv_heads=2)

        def loss(layer: nnx.MultiHeadAttention, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            full = MASKS[mask]()
            if full is not None:
                full = jnp.broadcast_to(full, (BATCH, 1, LENGTH, LENGTH))
            out = layer(x, mask=full)
            return jnp.sum(out * target), out

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    ours = functools.partial(nnx_attention, implementation=implementation)
    with Ran(implementation, "forward", "backward"):
        gradients, out = jax.block_until_ready(run(ours, x))
    expected_gradients, expected = run(nnx.dot_product_attention, x)
    assert_close(out, expected, 2e-5)
    # All of them together: the gradient of the bias of keys is zero but for rounding.
    assert_close(ravel_pytree(gradients)[0], ravel_pytree(expected_gradients)[0], 1e-4)


def test_nnx_causal_flag(implementation: str) -> None:
    x = inputs()
    ours = nnx_layer(functools.partial(nnx_attention, implementation=implementation))
    expected = nnx_layer(nnx.dot_product_attention)(x, is_causal=True)
    assert_close(ours(x, is_causal=True), expected, 2e-5)
    assert relative_error(ours(x), expected) > 1e-2


def test_linen_causal_bound_by_partial(implementation: str) -> None:
    x = inputs()
    ours = functools.partial(linen_attention, is_causal=True, implementation=implementation)
    variables = linen_layer(ours).init(jax.random.key(2), x)
    expected = linen_layer(nn.dot_product_attention).apply(
        variables, x, mask=MASKS["causal float32"]()
    )
    assert_close(linen_layer(ours).apply(variables, x), expected, 2e-5)


@pytest.mark.parametrize(
    ("batch", "mask_batch"),
    [((), "full"), ((3,), "ones"), ((2, 3), "last only"), ((2, 3), "ones"), ((2, 1, 2), "full")],
)
def test_any_number_of_batch_axes(
    implementation: str, batch: tuple[int, ...], mask_batch: str
) -> None:
    query, key, value = (inputs(*batch, 7, HEADS, 8, seed=seed) for seed in range(3))
    mask_shape = {"full": batch, "ones": (1,) * len(batch), "last only": batch[-1:]}[mask_batch]
    mask = inputs(*mask_shape, 1, 7, 7, seed=3) > -0.5
    mask |= jnp.eye(7, dtype=bool)
    bias = inputs(HEADS, 7, 7, seed=4)
    expected = nn.dot_product_attention(query, key, value, bias, mask)
    for attention in (linen_attention, nnx_attention):
        out = attention(query, key, value, bias, mask, implementation=implementation)
        assert out.shape == query.shape
        assert_close(out, expected, 2e-5)


def test_gradient_of_bias(implementation: str) -> None:
    query, key, value = (inputs(BATCH, LENGTH, HEADS, 8, seed=seed) for seed in range(3))
    bias = inputs(1, HEADS, LENGTH, LENGTH, seed=3)

    def loss(attention: Any, bias: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(query, key, value, bias)))

    ours = functools.partial(linen_attention, implementation=implementation)
    expected = jax.grad(functools.partial(loss, nn.dot_product_attention))(bias)
    assert_close(jax.grad(functools.partial(loss, ours))(bias), expected, 1e-4)


def test_linen_decodes_step_by_step(implementation: str) -> None:
    x = inputs()
    ours = functools.partial(linen_attention, implementation=implementation)
    layer = linen_layer(ours, decode=True)
    variables = layer.init(jax.random.key(2), x)
    cache, params = variables["cache"], {"params": variables["params"]}
    expected = linen_layer(nn.dot_product_attention).apply(
        params, x, mask=MASKS["causal float32"]()
    )
    step = jax.jit(lambda cache, x: layer.apply({**params, "cache": cache}, x, mutable=["cache"]))
    outputs = []
    with Ran(implementation, "forward"):
        for position in range(LENGTH):
            out, updated = step(cache, x[:, position : position + 1])
            cache = updated["cache"]
            outputs.append(out.block_until_ready())
    assert_close(jnp.concatenate(outputs, axis=1), expected, 2e-5)


def test_nnx_decodes_step_by_step(implementation: str) -> None:
    x = inputs()
    ours = functools.partial(nnx_attention, implementation=implementation)
    layer = nnx_layer(ours, num_kv_heads=2)
    expected = nnx_layer(nnx.dot_product_attention, num_kv_heads=2)(x, is_causal=True)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    outputs = [step(layer, x[:, position : position + 1]) for position in range(LENGTH)]
    assert_close(jnp.concatenate(outputs, axis=1), expected, 2e-5)


@pytest.mark.parametrize("attention", [linen_attention, nnx_attention])
def test_promotes_as_flax_does(implementation: str, attention: Any) -> None:
    query, key, value = (inputs(BATCH, LENGTH, HEADS, 8, seed=seed) for seed in range(3))
    attention = functools.partial(attention, implementation=implementation)
    assert attention(query.astype(jnp.bfloat16), key, value).dtype == jnp.float32
    half = attention(query, key, value, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert relative_error(half, nn.dot_product_attention(query, key, value)) < 1e-2


def test_layers_that_need_weights_are_refused() -> None:
    x = inputs()
    layer = linen_layer(linen_attention, dropout_rate=0.1, deterministic=False)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(ValueError, match=r"dropout_rate=0\.1 .* apply a Dropout layer"):
        layer.init(rngs, x)
    layer = nnx_layer(nnx_attention, dropout_rate=0.1, deterministic=False)
    with pytest.raises(ValueError, match=r"dropout_rate=0\.1 .* apply a Dropout layer"):
        layer(x)
    with pytest.raises(ValueError, match="sow_weights=True"):
        linen_layer(linen_attention).init(jax.random.key(0), x, sow_weights=True)
    with pytest.raises(ValueError, match="sow_weights=True"):
        nnx_layer(nnx_attention)(x, sow_weights=True)
    layer = linen_layer(linen_attention, qk_attn_weights_einsum_cls=lambda: jnp.einsum)
    with pytest.raises(ValueError, match="another einsum"):
        layer.init(jax.random.key(0), x)


def test_evaluation_with_a_dropout_rate_is_served() -> None:
    x = inputs()
    layer = linen_layer(
        functools.partial(linen_attention, implementation="xla"),
        dropout_rate=0.1,
        deterministic=True,
    )
    variables = layer.init(jax.random.key(0), x)
    expected = linen_layer(nn.dot_product_attention).apply(variables, x)
    assert_close(layer.apply(variables, x), expected, 2e-5)


def test_shapes_that_do_not_fit_are_refused_in_words() -> None:
    query, key = inputs(BATCH, LENGTH, HEADS, 8), inputs(3, LENGTH, HEADS, 8)
    with pytest.raises(ValueError, match=r"key must have shape .* batch axes of query"):
        linen_attention(query, key, key)
    with pytest.raises(ValueError, match="query must have shape"):
        linen_attention(query[0, 0], key, key)
    with pytest.raises(ValueError, match="mask must broadcast to"):
        nnx_attention(query, query, query, mask=jnp.ones((1, BATCH, 1, LENGTH, LENGTH)))


LONG = 150
ADAPTATION = Adaptation(budget=0.5, query_tile=32)


def adaptive_attention(implementation: str, adaptation: Adaptation | None) -> Any:
    """What the attention functions should compute, as an attention function itself."""

    def attend(query: Any, key: Any, value: Any, *, mask: Any = None, **_: Any) -> jax.Array:
        return tiled_attention(
            query,
            key,
            value,
            mask=None if mask is None else mask.astype(bool),
            is_causal=True,
            adaptation=adaptation,
            implementation=implementation,
        )

    return attend


def test_adaptive_linen_layer_and_its_gradients(implementation: str) -> None:
    x, target = inputs(BATCH, LONG, FEATURES), inputs(BATCH, LONG, FEATURES, seed=1)
    variables = linen_layer(nn.dot_product_attention).init(jax.random.key(2), x)
    real = jnp.arange(LONG)[None, :] < jnp.array([LONG, LONG - 40])[:, None]
    mask = nn.make_attention_mask(jnp.ones((BATCH, LONG)), real)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention_fn: Any, variables: Any, x: jax.Array) -> Any:
        def loss(variables: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = linen_layer(attention_fn).apply(variables, x, mask=mask)
            return jnp.sum(out * target), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

    ours = functools.partial(
        linen_attention, is_causal=True, implementation=implementation, adaptation=ADAPTATION
    )
    with Ran(implementation, "forward", "backward"):
        gradients, out = jax.block_until_ready(run(ours, variables, x))
    expected = adaptive_attention(implementation, ADAPTATION)
    expected_gradients, expected_out = run(expected, variables, x)
    assert_close(out, expected_out, 2e-5)
    assert_close(ravel_pytree(gradients)[0], ravel_pytree(expected_gradients)[0], 1e-4)
    exact = linen_layer(adaptive_attention("xla", None)).apply(variables, x, mask=mask)
    assert relative_error(out, exact) > 1e-3


def test_adaptive_nnx_layer_and_its_gradients(implementation: str) -> None:
    x, target = inputs(BATCH, LONG, FEATURES), inputs(BATCH, LONG, FEATURES, seed=1)

    @functools.partial(nnx.jit, static_argnums=0)
    def run(attention_fn: Any, x: jax.Array) -> Any:
        layer = nnx_layer(attention_fn, num_kv_heads=2)

        def loss(layer: nnx.MultiHeadAttention, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = layer(x, is_causal=True)
            return jnp.sum(out * target), out

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    ours = functools.partial(nnx_attention, implementation=implementation, adaptation=ADAPTATION)
    with Ran(implementation, "forward", "backward"):
        gradients, out = jax.block_until_ready(run(ours, x))
    expected_gradients, expected = run(adaptive_attention(implementation, ADAPTATION), x)
    assert_close(out, expected, 2e-5)
    assert_close(ravel_pytree(gradients)[0], ravel_pytree(expected_gradients)[0], 1e-4)
    exact = nnx_layer(adaptive_attention("xla", None), num_kv_heads=2)(x)
    assert relative_error(out, exact) > 1e-3


def test_causal_mask_leaves_what_causality_leaves() -> None:
    """A mask from Flax makes those granules exact that causality does."""
    query, key, value = (inputs(BATCH, LONG, HEADS, 8, seed=seed) for seed in range(3))
    everything = Adaptation(threshold=1e9, query_tile=32, levels=(0, 1))
    attend = jax.jit(
        functools.partial(linen_attention, adaptation=everything, implementation="xla"),
        static_argnames="is_causal",
    )
    mask = nn.make_causal_mask(jnp.ones((BATCH, LONG)))
    masked = attend(query, key, value, mask=mask)
    assert_close(masked, attend(query, key, value, is_causal=True), 2e-5)
    assert relative_error(masked, nn.dot_product_attention(query, key, value, mask=mask)) > 1e-3


@pytest.mark.parametrize("adaptation", [None, ADAPTATION])
def test_causal_attention_decodes_step_by_step(
    implementation: str, adaptation: Adaptation | None
) -> None:
    """A step sees what its mask shows, exactly, though it is one query of a causal call."""
    x = inputs(BATCH, 40, FEATURES)
    options = {"implementation": implementation, "adaptation": adaptation}
    ours = functools.partial(linen_attention, is_causal=True, **options)
    layer = linen_layer(ours, decode=True)
    variables = layer.init(jax.random.key(2), x)
    expected = linen_layer(nn.dot_product_attention).apply(
        {"params": variables["params"]}, x, mask=nn.make_causal_mask(jnp.ones((BATCH, 40)))
    )
    nnx_ours = nnx_layer(functools.partial(nnx_attention, **options))
    nnx_expected = nnx_layer(nnx.dot_product_attention)(x, is_causal=True)
    nnx_ours.init_cache(x.shape)

    @jax.jit
    def step(cache: Any, x: jax.Array) -> Any:
        return layer.apply({"params": variables["params"], "cache": cache}, x, mutable=["cache"])

    nnx_step = nnx.jit(lambda layer, x: layer(x, decode=True, is_causal=True))
    cache, outputs, nnx_outputs = variables["cache"], [], []
    with Ran(implementation, "forward"):
        for position in range(40):
            token = x[:, position : position + 1]
            out, updated = step(cache, token)
            cache = updated["cache"]
            outputs.append(out)
            nnx_outputs.append(nnx_step(nnx_ours, token).block_until_ready())
    assert_close(jnp.concatenate(outputs, axis=1), expected, 2e-5)
    assert_close(jnp.concatenate(nnx_outputs, axis=1), nnx_expected, 2e-5)


def test_few_queries_are_exact() -> None:
    key, value = (inputs(BATCH, 300, HEADS, 8, seed=seed) for seed in range(2))
    coarse = Adaptation(threshold=1e9)
    attend = jax.jit(functools.partial(nnx_attention, adaptation=coarse, implementation="xla"))
    for queries, adaptive in ((15, False), (16, True)):
        query = inputs(BATCH, queries, HEADS, 8, seed=2)
        error = relative_error(
            attend(query, key, value), nn.dot_product_attention(query, key, value)
        )
        assert (error > 1e-3) == adaptive


@pytest.mark.parametrize("attention", [linen_attention, nnx_attention])
def test_adaptations_that_cannot_be_served_are_refused(attention: Any) -> None:
    query = inputs(BATCH, LENGTH, HEADS, 8)
    with pytest.raises(ValueError, match=r"tolerance=0\.1 needs a state .* budget or a threshold"):
        attention(query, query, query, adaptation=Adaptation(tolerance=0.1))
    with pytest.raises(TypeError, match=r"adaptation: got 0\.5 .*expected .*Adaptation"):
        attention(query, query, query, adaptation=0.5)
