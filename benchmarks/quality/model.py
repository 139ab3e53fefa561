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
    """Sizes of the model."""

    layers: int = 8
    width: int = 512
    hidden: int = 1024
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    rope_base: float = 500_000.0


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of x [B, T, heads, head_dim]."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Block(nn.Module):
    """Attention and a gated layer, each normalised before and added to its input."""

    shape: Shape
    dtype: Any
    attention: Attention

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, Any]:
        """Maps [B, T, width] to [B, T, width] and what the attention returned besides."""
        shape = self.shape
        project = partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
        normed = nn.RMSNorm(dtype=self.dtype)(x)
        query = project((shape.heads, shape.head_dim), name="query")(normed)
        key = project((shape.kv_heads, shape.head_dim), name="key")(normed)
        value = project((shape.kv_heads, shape.head_dim), name="value")(normed)
        attended, besides = self.attention(
            rotate(query, shape.rope_base), rotate(key, shape.rope_base), value
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
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=shape.layers
        )
        x, besides = stack(shape, self.dtype, self.attention, name="blocks")(x, None)
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
    on_gpu = jax.default_backend() == "gpu"
    out = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation="cudnn" if on_gpu else "xla"
    )
    return out, None
