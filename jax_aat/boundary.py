"""What the boundary conditions of a call let each tile of queries see of each granule.

Conditions are causality, window, lengths, segments and mask. A mean row may stand for keys only
where every query of the tile sees all of them, and where the bias of none differs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.levels import (
    EXACT,
    GRANULE,
    HIDDEN,
    MEAN,
    SUPER_MEAN,
    Grid,
)
from jax_aat.problem import Operands, Options, Slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boundary:
    """What tiles see; each attribute bool, broadcasts to [*batch, L, tiles, granules].

    Attributes:
      seen: Whether a row may see a key of the granule; a few may be listed though none does.
      whole: Whether every row sees every key, and all have one bias.
      super_whole: Whether that holds for the granule's super-tile, as far as its keys count.
      full: Whether every row sees every key, rows past the query length included.
    """

    seen: jax.Array
    whole: jax.Array
    super_whole: jax.Array
    full: jax.Array

    def applied(self, level: jax.Array, drops: bool = False) -> jax.Array:
        """Levels where these allow them, else the nearest finer one.

        Args:
          level: Of every granule.
          drops: Whether granules that are seen may be hidden; else these become exact.
        """
        level = jnp.where((level == SUPER_MEAN) & ~self.super_whole, MEAN, level)
        allowed = self.whole if drops else self.whole & (level != HIDDEN)
        level = jnp.where(allowed, level, EXACT)
        return jnp.where(self.seen, level, HIDDEN).astype(jnp.uint32)


def boundary(operands: Operands, options: Options, grid: Grid, tiles: Any = None) -> Boundary:
    """Classifies the granules of some tiles.

    Args:
      operands: Those of the call; the batch axes stay as they are.
      options: Those of the call.
      grid: How the call is cut.
      tiles: Indices of the tiles, [n]; None: all.
    """
    tiles = jnp.arange(grid.tiles) if tiles is None else tiles
    first = (tiles * grid.positions)[:, None]
    last = jnp.minimum(first + grid.positions, grid.queries) - 1
    start = np.arange(grid.granules) * GRANULE
    stop = np.minimum(start + GRANULE, grid.keys) - 1
    super_start = grid.super_tile_of * grid.super_tile
    super_stop: Any = np.minimum(super_start + grid.super_tile, grid.keys) - 1
    everything = jnp.ones((1, tiles.shape[0], grid.granules), bool)

    valid_last: Any = last
    seen = full = whole = super_whole = everything
    if Slot.Q_LENGTHS in operands:
        length = operands[Slot.Q_LENGTHS][..., None, None, None]
        seen &= first < length
        full &= last < length
        valid_last = jnp.minimum(last, length - 1)
    if Slot.KV_LENGTHS in operands:
        length = operands[Slot.KV_LENGTHS][..., None, None, None]
        seen &= start < length
        whole &= stop < length
        super_stop = jnp.minimum(super_stop, length - 1)

    left, right = options.window
    if options.causal:
        right = min(0, right) if right >= 0 else 0
    if right >= 0:
        seen &= start <= valid_last + right
        whole &= stop <= first + right
        super_whole &= super_stop <= first + right
    if left >= 0:
        seen &= stop >= first - left
        full &= start >= last - left
        whole &= start >= valid_last - left
        super_whole &= super_start >= valid_last - left

    if Slot.Q_SEGMENTS in operands:
        low, high = (
            x[..., None, tiles, None] for x in _extremes(operands[Slot.Q_SEGMENTS], grid.positions)
        )
        segments = operands[Slot.KV_SEGMENTS]
        key_low, key_high = (x[..., None, None, :] for x in _extremes(segments, GRANULE))
        wide_low, wide_high = (
            x[..., None, None, grid.super_tile_of] for x in _extremes(segments, grid.super_tile)
        )
        seen &= (low <= key_high) & (key_low <= high)
        whole &= (low == high) & (key_low == low) & (key_high == low)
        super_whole &= (wide_low == low) & (wide_high == low)
    for slot in (Slot.MASK, Slot.BIAS):
        if slot in operands:
            some, every, super_every = _map(slot, operands[slot], grid, tiles)
            seen &= some
            whole &= every
            super_whole &= super_every
            full &= False
    return Boundary(seen, whole, super_whole & whole, full & whole)


def _extremes(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest of every `size` neighbours along the last axis."""
    parts = _parts(x, -1, size)
    return parts.min(-1), parts.max(-1)


def _map(
    slot: Slot, x: jax.Array, grid: Grid, tiles: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(some, every, every of the super-tile) of a mask, or of where a bias is constant."""
    if x.shape[-3] != 1:
        x = x.reshape(*x.shape[:-3], grid.lists, grid.tile_heads, *x.shape[-2:])
    else:
        x = x[..., None, :, :]
    if x.shape[-2] != 1:
        x = jnp.take(_parts(x, -2, grid.positions), tiles, axis=-3)
    else:
        x = x[..., None, :]
    # [*batch, L, G, tiles, P, S], of which axes may be 1.
    low, high = (x, x) if x.shape[-1] == 1 else _extremes(x, GRANULE)
    wide_low, wide_high = low, high
    if x.shape[-1] != 1:
        granules = grid.super_tile_granules
        wide_low = _extremes(low, granules)[0][..., grid.super_tile_of]
        wide_high = _extremes(high, granules)[1][..., grid.super_tile_of]
    rows = (-4, -2)
    if slot is Slot.BIAS:
        return (
            jnp.ones_like(low, bool).any(rows),
            (low == high).all(rows),
            (wide_low == wide_high).all(rows),
        )
    return high.any(rows), low.all(rows), wide_low.all(rows)


def _parts(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into parts of `size`; the last one repeats the last element."""
    axis %= x.ndim
    count = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - x.shape[axis])
    padded = jnp.pad(x, padding, mode="edge")
    return padded.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
