"""Adaptive attention as `jax_aat` itself computes it: by Vulkan where a GPU serves it, else XLA."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from contenders import Contender, Sizes
from router_emulation import GRANULE

import jax_aat


def levels_of(plan: Any, granules: int) -> jax.Array:
    """The levels of a plan of one batch entry, [lists, tiles, granules]: two bits each."""
    fields = plan.levels[0][..., None] >> (2 * jnp.arange(GRANULE, dtype=jnp.uint32))
    return (fields & 3).reshape(*plan.levels.shape[1:3], -1)[..., :granules].astype(jnp.int32)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, fraction: float, **settings: int
) -> tuple[jax.Array, jax.Array]:
    """The library's own attention of [T, N, H], and the fraction that it reports."""
    adaptation = jax_aat.Adaptation(budget=fraction, audit_rate=0.0, **settings)
    out, report = jax_aat.tiled_attention(
        query, key, value, is_causal=True, adaptation=adaptation, return_report=True
    )
    return out, report.relative_flops.mean()


def _fraction(sizes: Sizes, fraction: float) -> float:
    return fraction


def _tile(sizes: Sizes, **settings: int) -> int:
    """Positions of a query tile."""
    adaptation = jax_aat.Adaptation(budget=0.5, **settings)
    return adaptation.grid(*[sizes.length] * 2, sizes.heads, sizes.kv_heads).positions


def _library(name: str, **settings: int) -> Contender:
    attend, tile = partial(_attend, **settings), partial(_tile, **settings)
    return Contender(name, _fraction, attend, static=True, tile=tile)


LIBRARY = _library("jax_aat")
SETTINGS = [
    _library("jax_aat, tiles of 256", query_tile=256),
    _library("jax_aat, one stage", stages=1),
    _library("jax_aat, two stages", stages=2),
    _library("jax_aat, one stage, tiles of 256", stages=1, query_tile=256),
]
"""The library's attention by other settings than those it chooses."""


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, fraction: float
) -> tuple[jax.Array, None]:
    """The library's own attention of [B, T, N, H]."""
    adaptation = jax_aat.Adaptation(budget=fraction)
    return jax_aat.tiled_attention(query, key, value, is_causal=True, adaptation=adaptation), None
