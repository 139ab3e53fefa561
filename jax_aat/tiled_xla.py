"""The tiled algorithm in jax.numpy, `implementation='xla'`: forward, tangent and backward pass.

A pass is a fold over a work list: the pairs of a tile of queries and a block of keys that see each
other at all. It holds one tile of logits at a time, so that its memory is linear in the number of
queries and keys. The formulas stand in `docs/architecture.md`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_aat.problem import EMPTY_LOGSUMEXP, Operands, Options, Slot
from jax_aat.tiles import Accumulators, Tiles

TILE = (256, 512)
"""Queries of a tile, keys of a block."""


def forward(
    operands: Operands, options: Options, tile: tuple[int, int] = TILE
) -> tuple[jax.Array, jax.Array]:
    """Attention by online softmax (Milakov and Gimelshein 2018; Dao 2023, algorithm 1).

    Returns:
      out [*batch, T, N, H] in the dtype of q, logsumexp [*batch, T, N].
    """
    tiles = Tiles.cut(operands, options, tile)
    rows = tiles.row_shape
    start = {
        "max": tiles.filled(rows, -jnp.inf),
        "sum": tiles.filled(rows, 0),
        "out": tiles.filled((*rows, tiles.extents.head_dim), 0),
    }

    def step(carry: Accumulators, i: Any, j: Any) -> Accumulators:
        old = {name: tiles.rows_of(x, i) for name, x in carry.items()}
        logits = tiles.logits(i, j)[0]
        largest = jnp.maximum(old["max"], logits.max(-1))
        # A row that has seen nothing yet has no maximum to subtract.
        shift = jnp.where(largest == -jnp.inf, 0, largest)
        weights = jnp.exp(logits - shift[..., None])
        decay = jnp.exp(old["max"] - shift)
        new = {
            "max": largest,
            "sum": old["sum"] * decay + weights.sum(-1),
            "out": old["out"] * decay[..., None]
            + tiles.product("kgts,skh->kgth", weights, tiles.take(Slot.V, i, j)),
        }
        return {name: tiles.with_rows(carry[name], i, x) for name, x in new.items()}

    end = tiles.fold(step, start)
    empty = end["sum"] == 0
    total = jnp.where(empty, 1, end["sum"])
    lse = jnp.where(empty, EMPTY_LOGSUMEXP, end["max"] + jnp.log(total))
    return tiles.result(Slot.OUT, end["out"] / total[..., None]), tiles.result(Slot.LSE, lse)


def tangent(
    operands: Operands, options: Options, tile: tuple[int, int] = TILE
) -> tuple[jax.Array, jax.Array]:
    """Derivative of the forward pass along the tangents among `operands`.

    Returns:
      Tangents of out and of logsumexp, shaped as these.
    """
    tiles = Tiles.cut(operands, options, tile)
    rows = tiles.row_shape
    moves_logits = any(slot in operands for slot in (Slot.DQ, Slot.DK, Slot.DBIAS))
    start = {
        Slot.DLSE: tiles.filled(rows, 0),
        Slot.DOUT: tiles.filled((*rows, tiles.extents.head_dim), 0),
    }

    def step(carry: Accumulators, i: Any, j: Any) -> Accumulators:
        logits, slope = tiles.logits(i, j)
        weights = jnp.exp(logits - tiles.take(Slot.LSE, i, j)[..., None])
        new = {slot: tiles.rows_of(x, i) for slot, x in carry.items()}
        if moves_logits:
            moved = weights * tiles.logits_tangent(slope, i, j)
            new[Slot.DLSE] += moved.sum(-1)
            new[Slot.DOUT] += tiles.product("kgts,skh->kgth", moved, tiles.take(Slot.V, i, j))
        if Slot.DV in operands:
            dv = tiles.take(Slot.DV, i, j)
            new[Slot.DOUT] += tiles.product("kgts,skh->kgth", weights, dv)
        return {slot: tiles.with_rows(carry[slot], i, x) for slot, x in new.items()}

    end = tiles.fold(step, start)
    out = tiles.grouped_rows(Slot.OUT)
    dout = end[Slot.DOUT] - end[Slot.DLSE][..., None] * out
    return tiles.result(Slot.DOUT, dout), tiles.result(Slot.DLSE, end[Slot.DLSE])


def backward(
    operands: Operands,
    options: Options,
    results: Sequence[Slot],
    dbias_shape: tuple[int, ...] | None = None,
    tile: tuple[int, int] = TILE,
) -> tuple[jax.Array, ...]:
    """Transpose of the tangent pass: gradients from the cotangents among `operands`.

    Args:
      operands: Those of the forward pass, its results, and the cotangents that are not zero.
      options: Those of the forward pass.
      results: Which of DQ, DK, DV, DBIAS are wanted.
      dbias_shape: Shape of DBIAS; summed over the axes where it is 1.
      tile: Queries of a tile, keys of a block.

    Returns:
      The wanted gradients with all batch axes, in the dtypes of their operands.
    """
    tiles = Tiles.cut(operands, options, tile)
    sizes = tiles.extents
    shapes = {
        Slot.DQ: (*tiles.row_shape, sizes.head_dim),
        Slot.DK: tiles.padded_shape(Slot.DK, sizes.shape(Slot.DK)),
        Slot.DV: tiles.padded_shape(Slot.DV, sizes.shape(Slot.DV)),
    }
    if dbias_shape is not None:
        shapes[Slot.DBIAS] = tiles.padded_shape(Slot.DBIAS, dbias_shape)
    start = {slot: tiles.filled(shapes[slot], 0) for slot in results}
    delta = tiles.filled(tiles.row_shape, 0)
    if Slot.DOUT in operands:
        delta += (tiles.grouped_rows(Slot.DOUT) * tiles.grouped_rows(Slot.OUT)).sum(-1)
    if Slot.DLSE in operands:
        delta -= tiles.grouped_rows(Slot.DLSE)

    def step(carry: Accumulators, i: Any, j: Any) -> Accumulators:
        logits, slope = tiles.logits(i, j)
        weights = jnp.exp(logits - tiles.take(Slot.LSE, i, j)[..., None])
        new = dict(carry)
        pull = -tiles.rows_of(delta, i)[..., None]
        if Slot.DOUT in operands:
            dout = tiles.take(Slot.DOUT, i, j)
            pull += tiles.product("tkgh,skh->kgts", dout, tiles.take(Slot.V, i, j))
            if Slot.DV in new:
                dv = tiles.product("kgts,tkgh->skh", weights, dout)
                new[Slot.DV] = tiles.add(Slot.DV, carry[Slot.DV], i, j, dv)
        dlogits = weights * pull
        if Slot.DBIAS in new:
            dbias = tiles.ungrouped(dlogits)
            new[Slot.DBIAS] = tiles.add(Slot.DBIAS, carry[Slot.DBIAS], i, j, dbias)
        dscores = dlogits * slope * options.scale
        if Slot.DQ in new:
            dq = tiles.product("kgts,skh->kgth", dscores, tiles.take(Slot.K, i, j))
            new[Slot.DQ] = tiles.with_rows(carry[Slot.DQ], i, tiles.rows_of(carry[Slot.DQ], i) + dq)
        if Slot.DK in new:
            dk = tiles.product("kgts,tkgh->skh", dscores, tiles.take(Slot.Q, i, j))
            new[Slot.DK] = tiles.add(Slot.DK, carry[Slot.DK], i, j, dk)
        return new

    end = tiles.fold(step, start)
    return tuple(tiles.result(slot, end[slot]) for slot in results)
