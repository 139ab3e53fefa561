"""A byte-level causal language model in Flax, into whose layers any attention can be put."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Attention = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""Query [B, T, N, H], key and value [B, T, K, H] to the output [B, T, N, H] and anything else."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model.

    Attributes:
      layers: Blocks.
      width: Features of a position.
      hidden: Features of the gated layer.
      heads: Query heads.
      kv_heads: Key/value heads.
      head_dim: Features of a head.
      rope_base: Base of the frequencies of RoPE.
      unrotated_every: Each so manieth layer has no position encoding, so that it may match content
        at any distance (Yang et al. 2025, arXiv:2501.18795); 0: all layers have RoPE.
      convolution: Positions that a causal depthwise convolution before each attention spans, which
        tells a position what stands just before it (Allen-Zhu 2025, "Canon layers"); 0: none.
      scaled_from: Position from which on logits grow with the logarithm of the query's position, so
        that one key stands out from ever more (Nakanishi 2025, arXiv:2501.19399); 0: they do not.
    """

    layers: int = 8
    width: int = 512
    hidden: int = 1024
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    rope_base: float = 500_000.0
    unrotated_every: int = 0
    convolution: int = 0
    scaled_from: int = 0


def rotate(x: jax.Array, base: float, turn: jax.Array | float = 1.0) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of x [B, T, heads, head_dim].

    All angles are multiplied by `turn`: 0 leaves x as it is.
    """
    half = x.shape[-1] // 2
    frequencies = turn * base ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Convolution(nn.Module):
    """Adds to every position a weighted sum of the last few, each feature with its own weights."""

    span: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, width] to [B, T, width]."""
        length = x.shape[1]
        weights = self.param("weights", nn.initializers.normal(0.3), (self.span, x.shape[-1]))
        padded = jnp.pad(x, ((0, 0), (self.span - 1, 0), (0, 0)))
        parts = [padded[:, i : i + length] * weights[i].astype(x.dtype) for i in range(self.span)]
        return x + sum(parts)


class Block(nn.Module):
    """Attention and a gated layer, each normalised before and added to its input."""

    shape: Shape
    dtype: Any
    attention: Attention

    @nn.compact
    def __call__(self, x: jax.Array, turn: jax.Array | float) -> tuple[jax.Array, Any]:
        """Maps [B, T, width] to [B, T, width] and what the attention returned besides."""
        shape = self.shape
        project = partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
        normed = nn.RMSNorm(dtype=self.dtype)(x)
        if shape.convolution:
            normed = Convolution(shape.convolution, name="convolution")(normed)
        query = project((shape.heads, shape.head_dim), name="query")(normed)
        key = project((shape.kv_heads, shape.head_dim), name="key")(normed)
        value = project((shape.kv_heads, shape.head_dim), name="value")(normed)
        if shape.scaled_from:
            position = jnp.arange(1, x.shape[1] + 1)[:, None, None]
            scale = jnp.log(position) / jnp.log(shape.scaled_from)
            query = (query * jnp.maximum(scale, 1)).astype(self.dtype)
        attended, besides = self.attention(
            rotate(query, shape.rope_base, turn), rotate(key, shape.rope_base, turn), value
        )
        x += project(shape.width, axis=(-2, -1), name="out")(attended)
        normed = nn.RMSNorm(dtype=self.dtype)(x)
        gate = nn.silu(project(shape.hidden, name="gate")(normed))
        x += project(shape.width, name="down")(gate * project(shape.hidden, name="up")(normed))
        return x, besides


class LanguageModel(nn.Module):
    """Blocks between an embedding of bytes and the logits of the next byte.

    The layers are one scanned block: their parameters, and what their attention returns besides,
    have a leading axis of layers.
    """

    shape: Shape
    dtype: Any
    attention: Attention

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """Maps bytes [B, T] to logits [B, T, 256], float32, and what attention returned."""
        shape = self.shape
        x = nn.Embed(256, shape.width, dtype=self.dtype)(tokens)
        every = shape.unrotated_every or shape.layers + 1
        turn = (jnp.arange(1, shape.layers + 1) % every != 0).astype(jnp.float32)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True})
        x, besides = stack(shape, self.dtype, self.attention, name="blocks")(x, turn)
        normed = nn.RMSNorm(dtype=self.dtype)(x)
        return nn.Dense(256, dtype=self.dtype)(normed).astype(jnp.float32), besides


def losses(
    shape: Shape, dtype: Any, attention: Attention, params: Any, windows: jax.Array
) -> tuple[jax.Array, Any]:
    """Cross-entropy, in nats, of every byte but the first of windows [B, T + 1].

    Returns:
      Losses [B, T], float32, and what attention returned besides in every layer.
    """
    tokens = windows.astype(jnp.int32)
    logits, besides = LanguageModel(shape, dtype, attention).apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), besides


def default_dtype() -> Any:
    """What to compute in: bfloat16 on an accelerator, float32 on a processor."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def exact_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
    """Exact causal attention by what is fastest here; returns nothing besides."""
    by_cudnn = jax.default_backend() == "gpu" and query.dtype != jnp.float32
    out = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation="cudnn" if by_cudnn else "xla"
    )
    return out, None
