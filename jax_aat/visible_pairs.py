"""Counts pairs of a query and a key that see each other, and rows that tiles read for others."""

import jax
import jax.numpy as jnp

from jax_aat.boundary import Boundary, boundary
from jax_aat.levels import GRANULE, Grid
from jax_aat.problem import Operands, Options, Slot


def hidden_rows(operands: Operands, options: Options, grid: Grid) -> jax.Array:
    """Rows that tiles read, by batch entry, for pairs that do not see each other: [B] float32.

    They lie in granules that are exact whatever is chosen, because a part of them is hidden. As the
    FLOPs of exact attention are those of pairs that see each other, so are those of a budget.
    """
    bounds = boundary(operands, options, grid)
    shape = (operands[Slot.Q].shape[0], grid.lists, grid.tiles)
    read = jnp.where(bounds.seen & ~bounds.whole, GRANULE, 0).sum(-1).astype(jnp.float32)
    read = jnp.broadcast_to(read, shape).sum((1, 2))
    return jnp.maximum(read - visible_rows(operands, options, grid, bounds), 0)


def visible_rows(operands: Operands, options: Options, grid: Grid, bounds: Boundary) -> jax.Array:
    """Rows, by batch entry, for pairs that see each other in granules of which a part is hidden.

    Returns:
      [B] float32.
    """
    shape = (operands[Slot.Q].shape[0], grid.lists, grid.tiles)
    whole = jnp.where(bounds.seen & bounds.whole, grid.granule_sizes, 0).sum(-1)
    whole = jnp.broadcast_to(whole.astype(jnp.float32), shape) * existing_positions(
        grid, operands.get(Slot.Q_LENGTHS)
    )
    pairs = dense_flops(operands, options, grid) / (4 * operands[Slot.Q].shape[-1])
    return jnp.maximum(pairs / grid.query_tile - whole.sum((1, 2)), 0)


def existing_positions(grid: Grid, lengths: jax.Array | None = None) -> jax.Array:
    """Share of the positions of each tile that are queries, of `lengths` [B] if given.

    Returns:
      [B or 1, 1, I] float32.
    """
    position = jnp.arange(grid.tiles * grid.positions)
    limit = jnp.full(1, grid.queries) if lengths is None else lengths
    exists = position < jnp.minimum(limit[:, None], grid.queries)
    return exists.reshape(-1, 1, grid.tiles, grid.positions).astype(jnp.float32).mean(-1)


def dense_flops(operands: Operands, options: Options, grid: Grid) -> jax.Array:
    """FLOPs of exact attention over the pairs that see each other, by batch entry: [B] float32.

    Pairs are counted one by one for causality, window and lengths, and by granules besides where
    there are segments or a mask.
    """
    count = visible_keys(operands, options, grid).sum(-1) * grid.heads
    if Slot.MASK in operands or Slot.Q_SEGMENTS in operands:
        seen = boundary(operands, options, grid).seen
        rows = jnp.where(seen, grid.granule_sizes, 0).sum(-1).astype(jnp.float32)
        rows = rows * existing_positions(grid, operands.get(Slot.Q_LENGTHS))
        rows = jnp.broadcast_to(rows, (count.shape[0], grid.lists, grid.tiles)).sum((1, 2))
        count = jnp.minimum(count, rows * grid.query_tile)
    return 4.0 * operands[Slot.Q].shape[-1] * count


def visible_keys(operands: Operands, options: Options, grid: Grid) -> jax.Array:
    """Keys that causality, window and lengths let each query see, [B, T] float32."""
    position = jnp.arange(grid.queries, dtype=jnp.int32)[None]
    left, right = options.window
    if options.causal:
        right = min(0, right) if right >= 0 else 0
    stop = jnp.minimum(position + right + 1, grid.keys) if right >= 0 else grid.keys
    start = jnp.maximum(position - left, 0) if left >= 0 else 0
    batch = operands[Slot.Q].shape[0]
    if Slot.KV_LENGTHS in operands:
        stop = jnp.minimum(stop, operands[Slot.KV_LENGTHS][:, None])
    pairs = jnp.broadcast_to(jnp.maximum(stop - start, 0), (batch, grid.queries))
    if Slot.Q_LENGTHS in operands:
        pairs = jnp.where(position < operands[Slot.Q_LENGTHS][:, None], pairs, 0)
    return pairs.astype(jnp.float32)
