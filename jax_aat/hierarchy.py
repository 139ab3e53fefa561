"""Routing of long sequences: key tiles first, then the granules of the foremost of them.

A tile judges the granules of a share of the key tiles. What lies in the others is never exact; its
mass counts, as the mean and variance of their keys give it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_aat.boundary import Boundary
from jax_aat.levels import GRANULE, KEY_TILE, Grid
from jax_aat.problem import Operands, Options, Slot
from jax_aat.scores import (
    Elsewhere,
    Errors,
    log_sum,
    mean_queries,
    over_queries,
    predict,
    scores,
    softmax,
)
from jax_aat.summaries import Keys, Queries

JUDGED = 64
"""Key tiles of a long sequence of which a tile judges the granules; more where the budget asks for
more."""
JUDGED_WHOLE = 256
"""All of up to so many key tiles are judged: by choosing among these there is less to save than it
costs in quality (docs/router.md)."""


def judged_key_tiles(operands: Operands, grid: Grid, share: float) -> int:
    """How many key tiles a tile looks into; all of a short sequence or of one with bias or mask.

    Args:
      operands: Those of the call.
      grid: How the call is cut.
      share: Of the key tiles of a long sequence, at least.
    """
    if Slot.BIAS in operands or Slot.MASK in operands or grid.key_tiles <= JUDGED_WHOLE:
        return grid.key_tiles
    return min(grid.key_tiles, max(JUDGED, math.ceil(share * grid.key_tiles)))


def predict_foremost(
    queries: Queries,
    keys: Keys,
    split: Keys,
    boundary: Boundary,
    near: jax.Array,
    options: Options,
    grid: Grid,
    candidates: float,
    judged: int,
) -> tuple[Errors, jax.Array]:
    """`predict` where each tile looks into its `judged` foremost key tiles.

    Granules elsewhere have no error and no importance: they are not worth a row of their own.
    Arguments are those of `predict`, the keys split by `Keys.by_key_tile`, and which granules are
    near, whose key tiles are looked into where there are not too many that the boundary cuts.

    Returns:
      The errors, and which granules are looked into, [B, L, n, granules].
    """
    index, kept, outside = _foremost(queries, keys, boundary, near, options, grid, judged)
    batch, lists, tiles = index.shape[:3]
    size = KEY_TILE // GRANULE
    part = dataclasses.replace(
        grid,
        queries=grid.positions,
        keys=judged * KEY_TILE,
        heads=grid.tile_heads,
        kv_heads=1,
    )
    whole = Boundary(
        *(
            grid.by_key_tile(jnp.broadcast_to(x, (batch, lists, tiles, grid.granules)))
            for x in (boundary.seen, boundary.whole, boundary.super_whole, boundary.full)
        )
    )
    super_rows = np.repeat(np.arange(judged, dtype=np.int32), size)

    def of_tile(
        queries: Queries,
        keys: Keys,
        boundary: Boundary,
        index: jax.Array,
        outside: jax.Array,
    ) -> Errors:
        """One tile of one list: index [B, judged], all others without axes L, K and n."""

        def chosen(x: jax.Array) -> jax.Array:
            """[B or 1, key tiles, 8, ...] as [B, 1, judged * 8, ...]."""
            x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
            x = jnp.take_along_axis(x, index.reshape(batch, judged, *(1,) * (x.ndim - 2)), axis=1)
            return x.reshape(batch, 1, -1, *x.shape[3:])

        of_chosen = jax.tree.map(lambda x: chosen(x)[:, :, None], boundary)
        seen_elsewhere = boundary.seen.sum((1, 2))[:, None, None, None]
        seen_elsewhere -= of_chosen.seen.sum(-1, keepdims=True)
        found = predict(
            jax.tree.map(lambda x: x[:, None, None], queries),
            keys.gathered(chosen),
            of_chosen,
            {},
            options,
            part,
            jnp.zeros(1, jnp.int32),
            candidates,
            Elsewhere(
                outside[:, None, None], seen_elsewhere, grid.granules - part.granules, super_rows
            ),
        )
        at = jnp.arange(batch)[:, None]

        def placed(x: jax.Array) -> jax.Array:
            """[B, 1, 1, judged * 8] as [B, granules]."""
            full = jnp.zeros((batch, grid.key_tiles, size))
            full = full.at[at, index].set(x.reshape(batch, judged, -1))
            return full.reshape(batch, -1)[:, : grid.granules]

        return Errors(**{name: placed(x) for name, x in vars(found).items()})

    of_list = jax.vmap(of_tile, in_axes=(1, None, 1, 1, 1), out_axes=1)
    of_lists = jax.vmap(of_list, in_axes=1, out_axes=1)
    found: Errors = of_lists(queries, split, whole, index, outside)
    return found, jnp.repeat(kept, size, axis=-1)[..., : grid.granules]


def _foremost(
    queries: Queries,
    keys: Keys,
    boundary: Boundary,
    near: jax.Array,
    options: Options,
    grid: Grid,
    judged: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The key tiles that tiles look into, and the mass of the others.

    Returns:
      Indices [B, L, n, judged] in ascending order, whether a key tile is among them [B, L, n, key
      tiles], and the logarithm of the mass that each sub-query gives to what is seen elsewhere,
      [B, L, n, A].
    """
    mean, square, weight = mean_queries(queries)
    logit, slope = scores(mean, keys.key_tile_mean, grid, options)
    spread = scores(square, keys.key_tile_variance, grid)[0]
    log_mass = logit + spread * slope / 2 + keys.key_tile_log_count[:, None, None, None]
    seen = grid.by_key_tile(boundary.seen).any(-1)
    exact = grid.by_key_tile(boundary.seen & (~boundary.whole | near)).any(-1)
    log_mass = jnp.where(seen[..., None, :], log_mass, -jnp.inf)
    importance = over_queries(jnp.square(softmax(log_mass)), weight)
    importance = jnp.where(exact, 2.0, jnp.where(seen, importance, -1.0))
    index = jnp.sort(lax.top_k(importance, judged)[1], axis=-1)
    kept = jnp.zeros(importance.shape, bool)
    where = tuple(jnp.ogrid[tuple(slice(size) for size in index.shape)])[:-1]
    kept = kept.at[(*where, index)].set(True)
    return index, kept, log_sum(jnp.where(kept[..., None, :], -jnp.inf, log_mass))
