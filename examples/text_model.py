"""A small transformer language model over bytes, in Flax, whose attention is `tiled_attention`."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_aat import Adaptation, ResolutionState, tiled_attention


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of x [B, T, heads, head_dim]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which ``heads // kv_heads`` query heads share a key/value head.

    With an adaptation the collection ``resolution`` holds the state of its attention, and the
    report of a call is sown into the collection ``reports``.
    """

    heads: int
    kv_heads: int
    dtype: Any
    implementation: str | None
    adaptation: Adaptation | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, width] to [B, T, width]."""
        width = x.shape[-1]
        project = functools.partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
        query = project((self.heads, width // self.heads), name="query")(x)
        key = project((self.kv_heads, width // self.heads), name="key")(x)
        value = project((self.kv_heads, width // self.heads), name="value")(x)
        attend = functools.partial(
            tiled_attention, is_causal=True, implementation=self.implementation
        )
        arrays = rotate(query), rotate(key), value
        if self.adaptation is None:
            attended = attend(*arrays)
        else:
            state = self.variable(
                "resolution", "state", ResolutionState.init, query, key, self.adaptation
            )
            attended, following, report = attend(
                *arrays, adaptation=self.adaptation, state=state.value, return_report=True
            )
            if self.is_mutable_collection("resolution") and not self.is_initializing():
                state.value = following
            self.sow("reports", "report", report)
        return project(width, axis=(-2, -1), name="out")(attended)


class LanguageModel(nn.Module):
    """Pre-normalised transformer blocks between an embedding of bytes and their logits."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    dtype: Any
    implementation: str | None
    adaptation: Adaptation | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps bytes [B, T] to the logits [B, T, 256], float32, of the byte that follows each."""
        x = nn.Embed(256, self.width, dtype=self.dtype)(tokens)
        for _ in range(self.layers):
            x += Attention(
                self.heads, self.kv_heads, self.dtype, self.implementation, self.adaptation
            )(nn.RMSNorm(dtype=self.dtype)(x))
            hidden = nn.Dense(4 * self.width, dtype=self.dtype)(nn.RMSNorm(dtype=self.dtype)(x))
            x += nn.Dense(self.width, dtype=self.dtype)(nn.gelu(hidden))
        return nn.Dense(256, dtype=jnp.float32)(nn.RMSNorm(dtype=jnp.float32)(x))
