"""Adaptive attention of `jax_aat`: its plans under the dense engine, and its own attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from contenders import Contender, Sizes
from dense_engine import Selection
from ours import of_levels
from router_emulation import GRANULE, Routing, planning_operations

import jax_aat


def levels_of(plan: Any, granules: int) -> jax.Array:
    """The levels of a plan of one batch entry, [lists, tiles, granules]: two bits each."""
    fields = plan.levels[0][..., None] >> (2 * jnp.arange(GRANULE, dtype=jnp.uint32))
    return (fields & 3).reshape(*plan.levels.shape[1:3], -1)[..., :granules].astype(jnp.int32)


def _select(query: jax.Array, key: jax.Array, value: jax.Array, fraction: float) -> Selection:
    """The levels that the library chooses; rows, state and their operations are those of `ours`."""
    adaptation = jax_aat.Adaptation(budget=fraction)
    operands = (x[None] for x in (query, key, value))
    plan = jax_aat.plan_tiles(*operands, adaptation, is_causal=True)
    planning = planning_operations(query.shape, key.shape[1], fraction, Routing())
    levels = levels_of(plan, query.shape[0] // GRANULE)
    return of_levels(query, key, value, levels, planning)


def _fraction(sizes: Sizes, fraction: float) -> float:
    return fraction


LIBRARY = Contender("jax_aat", _fraction, _select, static=True)
"""Its query tiles must be 32 positions: four query heads a key/value head."""


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, fraction: float
) -> tuple[jax.Array, None]:
    """The library's own attention of [B, T, N, H], by Vulkan where a GPU serves it, else by XLA."""
    adaptation = jax_aat.Adaptation(budget=fraction)
    return jax_aat.tiled_attention(query, key, value, is_causal=True, adaptation=adaptation), None
