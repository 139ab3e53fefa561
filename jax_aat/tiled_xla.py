"""The tiled algorithm in jax.numpy, `implementation='xla'`: forward, tangent and backward pass.

A pass is a fold over a work list: the pairs of a tile of queries and a block of keys that see each
other at all, or those that a plan chose. It holds one tile of logits at a time, so that its memory
is linear in the number of queries and keys. The formulas stand in `docs/architecture.md`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_aat.listed_tiles import ListedTiles
from jax_aat.problem import (
    EMPTY_LOGSUMEXP,
    TANGENT_OF,
    Operands,
    Options,
    Slot,
    forward_results,
)
from jax_aat.tiles import Accumulators, TiledCall, Tiles, finite

TILE = (256, 512)
"""Queries of a tile, keys of a block."""


def forward(
    operands: Operands,
    options: Options,
    tile: tuple[int, int] = TILE,
    differentiable: bool = False,
) -> tuple[jax.Array, ...]:
    """Attention by online softmax (Milakov and Gimelshein 2018; Dao 2023, algorithm 1).

    Returns:
      out [*batch, T, N, H] in the dtype of q, logsumexp [*batch, T, N] and, with a plan, shares
      [*batch, T, N, 2].
    """
    tiles = _cut(operands, options, tile, differentiable)
    rows = {"max": ((), -jnp.inf), "sum": ((), 0), "out": ((tiles.extents.head_dim,), 0)}
    if Slot.LEVELS in operands:
        rows["shares"] = ((2,), 0)

    def step(old: Accumulators, keys: Accumulators, i: Any, j: Any) -> Any:
        logits = tiles.logits(i, j)[0]
        largest = jnp.maximum(old["max"], logits.max(-1))
        # A row that has seen nothing yet has no maximum to subtract.
        shift = jnp.where(largest == -jnp.inf, 0, largest)
        weights, _ = _weights(logits, shift)
        decay = jnp.exp(old["max"] - shift)
        new = {
            "max": largest,
            "sum": old["sum"] * decay + weights.sum(-1),
            "out": old["out"] * decay[..., None]
            + tiles.weighted("kgts,skh->kgth", weights, tiles.take(Slot.V, i, j)),
        }
        if "shares" in old:
            new["shares"] = old["shares"] * decay[..., None]
        if tiles.is_coarse(j):
            new["shares"] += tiles.by_level(weights, j)
        return new, keys

    end, _ = tiles.fold(step, rows)
    empty = end["sum"] == 0
    total = jnp.where(empty, 1, end["sum"])
    lse = jnp.where(empty, EMPTY_LOGSUMEXP, end["max"] + jnp.log(total))
    results = {Slot.OUT: end["out"] / total[..., None], Slot.LSE: lse}
    if "shares" in end:
        results[Slot.SHARES] = end["shares"] / total[..., None]
    return tuple(tiles.result(slot, x) for slot, x in results.items())


def tangent(
    operands: Operands,
    options: Options,
    tile: tuple[int, int] = TILE,
    differentiable: bool = False,
) -> tuple[jax.Array, ...]:
    """Derivative of the forward pass along the tangents among `operands`.

    Returns:
      Tangents of the results of the forward pass, shaped as these.
    """
    tiles = _cut(operands, options, tile, differentiable)
    moves_logits = any(
        slot in operands
        for slot in (Slot.DQ, Slot.DK, Slot.DBIAS, Slot.DCOARSE_K, Slot.DLEVEL_BIAS)
    )
    rows: dict[Any, Any] = {Slot.DLSE: ((), 0), Slot.DOUT: ((tiles.extents.head_dim,), 0)}
    if Slot.LEVELS in operands:
        rows[Slot.DSHARES] = ((2,), 0)

    def step(old: Accumulators, keys: Accumulators, i: Any, j: Any) -> Any:
        logits, slope = tiles.logits(i, j)
        weights, seen = _weights(logits, tiles.take(Slot.LSE, i, j))
        new = dict(old)
        if moves_logits:
            moved = jnp.where(seen, weights * tiles.logits_tangent(slope, i, j), 0)
            new[Slot.DLSE] += moved.sum(-1)
            # Where v is not finite, neither is the output, which is subtracted at the end.
            v = finite(tiles.take(Slot.V, i, j))
            new[Slot.DOUT] += tiles.product("kgts,skh->kgth", moved, v)
            if tiles.is_coarse(j):
                new[Slot.DSHARES] += tiles.by_level(moved, j)
        if tiles.key_slot(Slot.DV, j) in operands:
            dv = tiles.take(Slot.DV, i, j)
            new[Slot.DOUT] += tiles.weighted("kgts,skh->kgth", weights, dv)
        return new, keys

    end, _ = tiles.fold(step, rows)
    mean = end[Slot.DLSE]
    results = {Slot.DLSE: mean}
    for slot in forward_results(operands):
        if slot is not Slot.LSE:
            shift = mean[..., None] * tiles.grouped_rows(slot)
            results[TANGENT_OF[slot]] = end[TANGENT_OF[slot]] - shift
    return tuple(
        tiles.result(TANGENT_OF[slot], results[TANGENT_OF[slot]])
        for slot in forward_results(operands)
    )


def backward(
    operands: Operands,
    options: Options,
    results: Sequence[Slot],
    dbias_shape: tuple[int, ...] | None = None,
    tile: tuple[int, int] = TILE,
    differentiable: bool = False,
) -> tuple[jax.Array, ...]:
    """Transpose of the tangent pass: gradients from the cotangents among `operands`.

    Args:
      operands: Those of the forward pass, its results, and the cotangents that are not zero.
      options: Those of the forward pass.
      results: Which of DQ, DK, DV, DBIAS, DCOARSE_K, DCOARSE_V, DLEVEL_BIAS are wanted.
      dbias_shape: Shape of DBIAS; summed over the axes where it is 1.
      tile: Queries of a tile, keys of a block; a plan brings its own.
      differentiable: Whether this pass is to be differentiated itself.

    Returns:
      The wanted gradients with all batch axes, in the dtypes of their operands.
    """
    tiles = _cut(operands, options, tile, differentiable)
    sizes = tiles.extents
    rows: dict[Any, Any] = {Slot.DQ: ((sizes.head_dim,), 0), Slot.DLEVEL_BIAS: ((2,), 0)}
    along_keys = {
        slot: dbias_shape if slot is Slot.DBIAS and dbias_shape else sizes.shape(slot)
        for slot in results
        if slot not in rows
    }
    delta = tiles.filled(tiles.row_shape, 0)
    for slot in (Slot.OUT, Slot.SHARES):
        if TANGENT_OF[slot] in operands:
            delta += (tiles.grouped_rows(TANGENT_OF[slot]) * tiles.grouped_rows(slot)).sum(-1)
    if Slot.DLSE in operands:
        delta -= tiles.grouped_rows(Slot.DLSE)

    def step(old: Accumulators, old_keys: Accumulators, i: Any, j: Any) -> Any:
        logits, slope = tiles.logits(i, j)
        weights, seen = _weights(logits, tiles.take(Slot.LSE, i, j))
        new, keys = dict(old), dict(old_keys)
        key_slot, value_slot = tiles.key_slot(Slot.DK, j), tiles.key_slot(Slot.DV, j)
        pull = -tiles.rows_of(delta, i)[..., None]
        if Slot.DOUT in operands:
            dout = tiles.take(Slot.DOUT, i, j)
            pull += tiles.product("tkgh,skh->kgts", dout, tiles.take(Slot.V, i, j))
            if value_slot in keys:
                dv = tiles.weighted("kgts,tkgh->skh", weights, dout)
                keys[value_slot] = tiles.add(value_slot, keys[value_slot], i, j, dv)
        if tiles.is_coarse(j) and Slot.DSHARES in operands:
            pull += tiles.take(Slot.DSHARES, i, j)
        dlogits = jnp.where(seen, weights * pull, 0)
        if Slot.DBIAS in keys:
            keys[Slot.DBIAS] = tiles.add(Slot.DBIAS, keys[Slot.DBIAS], i, j, dlogits)
        if Slot.DLEVEL_BIAS in old and tiles.is_coarse(j):
            new[Slot.DLEVEL_BIAS] += tiles.by_level(dlogits, j)
        dscores = dlogits * slope * options.scale
        if Slot.DQ in old:
            k = finite(tiles.take(Slot.K, i, j))
            new[Slot.DQ] += tiles.product("kgts,skh->kgth", dscores, k)
        if key_slot in keys:
            q = finite(tiles.take(Slot.Q, i, j))
            dk = tiles.product("kgts,tkgh->skh", dscores, q)
            keys[key_slot] = tiles.add(key_slot, keys[key_slot], i, j, dk)
        return new, keys

    ends = tiles.fold(step, {slot: x for slot, x in rows.items() if slot in results}, along_keys)
    end = ends[0] | ends[1]
    return tuple(tiles.result(slot, end[slot]) for slot in results)


def _weights(logits: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(logits - shift), at most 1 and exactly 0 where hidden; and which are seen.

    `shift` is the largest logit of a row, or the logarithm of the sum of all.
    """
    seen = logits != -jnp.inf
    exponent = logits - shift[..., None]
    # What rounding leaves above 0, of large logits, is cut off; derivatives do not see it.
    exponent -= lax.stop_gradient(jnp.maximum(exponent, 0))
    return jnp.where(seen, jnp.exp(exponent), 0), seen


def _cut(
    operands: Operands, options: Options, tile: tuple[int, int], differentiable: bool
) -> TiledCall:
    if Slot.LEVELS in operands:
        return ListedTiles.of(operands, options, differentiable)
    return Tiles.cut(operands, options, tile)
