"""The exact granules of a plan as square blocks, the unit of other block-sparse kernels.

A plan makes granules of 16 keys exact for tiles of, say, 32 positions times 4 heads. A kernel whose
unit is a block of 128 positions of one head and 128 keys must compute every block in which any tile
has an exact granule, and all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from passes import Array

from jax_aat import TilePlan
from jax_aat.levels import EXACT, GRANULE, Grid, unpack_levels
from jax_aat.problem import count_pairs


@dataclass(frozen=True)
class Blocks:
    """Blocks that hold what a plan makes exact.

    Attributes:
      full: Those of which every pair sees each other, [B, L, blocks of queries, blocks of keys].
      cut: Those through which the causal diagonal goes, likewise.
      size: Positions, and keys, of a block.
      heads_of_list: Query heads that share a list, consecutive ones.
      relative_flops: Pairs in the blocks that see each other over all that do.
      times_the_plan: Pairs in the blocks over those that the plan's exact granules hold for their
        tiles, hidden ones included in both.
    """

    full: Array
    cut: Array
    size: int
    heads_of_list: int
    relative_flops: float
    times_the_plan: float


def blocks_of(plan: TilePlan, size: int) -> Blocks:
    """Covers the exact granules of a plan.

    Raises:
      ValueError: Tiles or granules do not fit into blocks of this size, or the call has a window
        or is causal with another number of queries than keys.
    """
    grid = plan.grid
    if size % GRANULE or (size % grid.positions and grid.positions % size):
        raise ValueError(f"tiles of {grid.positions} positions do not fit blocks of {size}")
    if plan.window != (-1, -1) or (plan.causal and grid.queries != grid.keys):
        raise ValueError("windows, and causal calls of unequal lengths, are not made into blocks")
    used = np.asarray(_used(plan.levels, grid, size))
    if plan.causal:  # a tile of more positions than a block has granules that only some of it sees
        used = used & np.tri(*used.shape[2:], dtype=bool)
    diagonal = np.eye(*used.shape[2:], dtype=bool) & plan.causal
    full, cut = used & ~diagonal, used & diagonal
    queries, keys = (_sizes(n, size) for n in (grid.queries, grid.keys))
    on_diagonal = np.diagonal(cut, axis1=2, axis2=3)
    visible = queries @ full.sum((0, 1)) @ keys
    visible += (on_diagonal * (queries[: on_diagonal.shape[-1]] ** 2 + queries) / 2).sum()
    everything = count_pairs(grid.queries, grid.keys, plan.causal) * float(np.prod(used.shape[:2]))
    of_plan = float(plan.list_headers[..., 2].astype(jnp.float32).sum())
    of_plan *= GRANULE * grid.positions
    return Blocks(
        full, cut, size, grid.tile_heads, visible / everything, used.sum() * size**2 / of_plan
    )


@partial(jax.jit, static_argnames=("grid", "size"))
def _used(levels: jax.Array, grid: Grid, size: int) -> jax.Array:
    """Which blocks have an exact granule, [B, L, blocks of queries, blocks of keys]."""
    granules, tiles = size // GRANULE, max(1, size // grid.positions)
    rows, columns = -(-grid.queries // size), -(-grid.keys // size)

    def one(words: jax.Array) -> jax.Array:
        exact = unpack_levels(words, grid.granules) == EXACT
        padding = ((0, -grid.tiles % tiles), (0, -grid.granules % granules))
        exact = jnp.pad(exact, padding)
        found = exact.reshape(-1, tiles, exact.shape[1] // granules, granules).any((1, 3))
        return jnp.repeat(found, max(1, grid.positions // size), axis=0)[:rows, :columns]

    # A list at a time: with a field a granule the levels are sixteen times as large.
    found = jax.lax.map(one, levels.reshape(-1, *levels.shape[2:]))
    return found.reshape(*levels.shape[:2], rows, columns)


def _sizes(length: int, size: int) -> Array:
    """Positions of each block; the last one may be ragged."""
    return np.minimum(size, length - np.arange(0, length, size)).astype(float)
