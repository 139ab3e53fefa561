"""The attentions that are compared: what each lets a query see for a fraction of the operations.

Every contender is a pair of functions: `parameters`, which turns a fraction of the operations of
exact causal attention into numbers (outside of what is compiled), and `attend`, which turns query
[T, N, H], key and value [T, K, H] and those numbers into the output and the fraction spent. Most of
them choose a `Selection`, which one dense engine computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import dense_engine
import jax
import jax.numpy as jnp
import numpy as np
from dense_engine import Coarse, Selection

Array = jax.Array

TILE = 32
"""Positions of the blocks of queries of most contenders here."""


@dataclass(frozen=True)
class Sizes:
    """What the cost of a contender depends on."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Contender:
    """An attention that spends a given fraction of the operations of exact attention.

    Attributes:
      name: In tables.
      parameters: Of sizes and a fraction: what `select` takes.
      attend: Of query, key, value and parameters: the output [T, N, H] and the operations it
        took, planning included, as a fraction of those of exact attention.
      static: Parameters are hashable and part of what is compiled.
      tile: Of sizes: how many neighbouring positions choose together; of those that choose nothing
        together, by how many they are compared with the others.
    """

    name: str
    parameters: Callable[[Sizes, float], Any]
    attend: Callable[[Array, Array, Array, Any], tuple[Array, Array]]
    static: bool = False
    tile: Callable[[Sizes], int] = lambda _: TILE


Select = Callable[[Array, Array, Array, Any], Selection]


def selecting(select: Select) -> Callable[[Array, Array, Array, Any], tuple[Array, Array]]:
    """Attention by the dense engine to what `select` chooses of query, key, value, parameters."""

    def attend(query: Array, key: Array, value: Array, parameters: Any) -> tuple[Array, Array]:
        return dense_engine.attend(query, key, value, select(query, key, value, parameters))

    return attend


def kept_blocks(sizes: Sizes, rows: float, query_block: int, key_block: int) -> np.ndarray:
    """How many blocks of keys each block of queries may see, its own included.

    All get the same number, but for those that have fewer before them; numbers between two whole
    ones alternate.

    Args:
      sizes: Sizes of the problem.
      rows: Visible pairs a head that may be computed.
      query_block: Queries of a block.
      key_block: Keys of a block; divides `query_block`.

    Returns:
      Blocks of keys, int32 [query blocks].
    """
    count, own = sizes.length // query_block, query_block // key_block
    before = np.arange(count) * own
    diagonal = query_block * (query_block + 1) / 2

    def chosen(each: float) -> np.ndarray:
        edges = np.floor(np.arange(count + 1) * each)
        return np.minimum(np.diff(edges), before)

    low, high = 0.0, float(before[-1])
    for _ in range(50):
        middle = (low + high) / 2
        spent = count * diagonal + chosen(middle).sum() * query_block * key_block
        low, high = (middle, high) if spent <= rows else (low, middle)
    return (chosen(low) + own).astype(np.int32)


def best_blocks(scores: Array, kept: Array) -> Array:
    """Keeps the blocks with the highest scores, and the queries' own.

    Args:
      scores: [N, query blocks, key blocks].
      kept: Blocks that each block of queries sees, own ones included, [query blocks].
    """
    _, query_blocks, key_blocks = scores.shape
    own = key_blocks // query_blocks
    block = jnp.arange(query_blocks)[:, None] * own
    before = jnp.arange(key_blocks) < block
    scores = jnp.where(before, scores, -jnp.inf)
    descending = -jnp.sort(-scores, axis=-1)
    last = jnp.clip(kept - own - 1, 0, key_blocks - 1)[None, :, None]
    threshold = jnp.take_along_axis(descending, jnp.broadcast_to(last, (*scores.shape[:2], 1)), -1)
    best = before & (scores >= threshold) & (kept > own)[:, None]
    diagonal = (jnp.arange(key_blocks) >= block) & (jnp.arange(key_blocks) < block + own)
    return best | diagonal


def block_means(x: Array, block: int) -> Array:
    """[T, heads, H] as means [T / block, heads, H], float32."""
    return x.astype(jnp.float32).reshape(-1, block, *x.shape[1:]).mean(1)


def pooled_scores(query: Array, key: Array, query_block: int, key_block: int) -> Array:
    """Logits of the mean query of a block with the mean key of a block, [N, blocks, blocks]."""
    q, k = block_means(query, query_block), block_means(key, key_block)
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("ikgh,jkh->kgij", q, k) / math.sqrt(q.shape[-1])
    return scores.reshape(-1, *scores.shape[2:])


def pooled_operations(sizes: Sizes, query_block: int, key_block: int, products: int = 1) -> float:
    """Operations of scores between blocks, under causality, and of the means they are made of."""
    pairs = sizes.length**2 / (2 * query_block * key_block)
    means = sizes.length * (sizes.heads + sizes.kv_heads) * sizes.head_dim
    return 2.0 * products * sizes.heads * sizes.head_dim * pairs + means


def affordable_rows(sizes: Sizes, fraction: float, planning: float) -> float:
    """Visible pairs a head that a fraction of the operations leaves after planning."""
    dense = sizes.length * (sizes.length + 1) / 2
    return fraction * dense - planning / (4.0 * sizes.heads * sizes.head_dim)


def _exact(query: Array, key: Array, value: Array, parameters: Any) -> Selection:
    return Selection()


SINKS = 16


def _window_parameters(sizes: Sizes, fraction: float) -> np.ndarray:
    """The window whose keys, with the sinks, a causal query can afford on average."""
    position = np.arange(sizes.length)
    low, high = 1, sizes.length
    while high - low > 1:
        middle = (low + high) // 2
        seen = np.minimum(position + 1, middle) + np.clip(position + 1 - middle, 0, SINKS)
        fits = seen.sum() <= affordable_rows(sizes, fraction, 0.0)
        low, high = (middle, high) if fits else (low, middle)
    return np.int32(low)


def _window(query: Array, key: Array, value: Array, window: Array) -> Selection:
    """Sliding window and sinks (Xiao et al. 2023, arXiv:2309.17453)."""
    return Selection(window=window, sinks=SINKS)


def _kept(
    sizes: Sizes, fraction: float, *, query_block: int, key_block: int, products: int = 1
) -> tuple[np.ndarray, np.float32]:
    planning = pooled_operations(sizes, query_block, key_block, products)
    rows = affordable_rows(sizes, fraction, planning)
    return kept_blocks(sizes, rows, query_block, key_block), np.float32(planning)


BLOCK = 64


def _block_top_k(query: Array, key: Array, value: Array, parameters: Any) -> Selection:
    """Blocks of 64 keys by pooled score, as MInference (arXiv:2407.02490), MoBA (2502.13189)."""
    kept, planning = parameters
    return Selection(planning, best_blocks(pooled_scores(query, key, BLOCK, BLOCK), kept))


PAGE = 16


def _quest(query: Array, key: Array, value: Array, parameters: Any) -> Selection:
    """Pages of 16 keys by the upper bound that their box gives (Tang et al., arXiv:2406.10774).

    Quest serves one query at a time; here the mean of 64 queries chooses for them.
    """
    kept, planning = parameters
    pages = key.astype(jnp.float32).reshape(-1, PAGE, *key.shape[1:])
    q = block_means(query, BLOCK)
    q = q.reshape(q.shape[0], key.shape[1], -1, q.shape[-1])
    bound = jnp.einsum("ikgh,jkh->kgij", jnp.maximum(q, 0), pages.max(1))
    bound += jnp.einsum("ikgh,jkh->kgij", jnp.minimum(q, 0), pages.min(1))
    return Selection(planning, best_blocks(bound.reshape(-1, *bound.shape[2:]), kept))


MRA_BLOCK = TILE


def _mra_parameters(sizes: Sizes, fraction: float) -> tuple[np.ndarray, np.float32]:
    """As top-k, but a coarse block costs two products more than its score."""
    block = {"query_block": MRA_BLOCK, "key_block": MRA_BLOCK}
    kept, _ = _kept(sizes, fraction, **block, products=3)
    return kept, np.float32(pooled_operations(sizes, **block))  # the engine counts the two


def _mra(query: Array, key: Array, value: Array, parameters: Any) -> Selection:
    """Two resolutions (Zeng et al. 2022, MRA-2, arXiv:2207.10284), made causal.

    The blocks of 32 x 32 with the highest pooled scores are exact; every other one has one weight,
    that of its pooled score, and the mean of its values.
    """
    kept, planning = parameters
    scores = pooled_scores(query, key, MRA_BLOCK, MRA_BLOCK)
    keep = best_blocks(scores, kept)
    blocks = jnp.arange(scores.shape[1])
    coarse = ~keep & (blocks < blocks[:, None])
    bias = jnp.where(coarse, scores + math.log(MRA_BLOCK), -jnp.inf)
    return Selection(planning, keep, coarse=(Coarse(block_means(value, MRA_BLOCK), bias),))


CELLS = (16, 64, 256, 1024)
PYRAMID_TILE = TILE


def cells_within(length: int) -> list[int]:
    """The sizes of cells that a length has room for."""
    return [cell for cell in CELLS if cell <= length]


def _cells_used(length: int, reach: Any, where: Any) -> list[Any]:
    """For each size of cell, whether a tile of queries uses it: [tiles, cells].

    A cell is used if it is `reach` times its size away and the cell around it is not; index 0 says
    which granules of 16 are exact. `where` is `numpy` or `jax.numpy`.
    """
    start = where.arange(length // PYRAMID_TILE)[:, None] * PYRAMID_TILE
    far = []
    for cell in cells_within(length):
        end = (where.arange(length // cell) + 1) * cell
        far.append(start - end >= reach * cell)
    around = [where.repeat(outer, 4, axis=1) for outer in far[1:]]
    used = [cell & ~outer for cell, outer in zip(far[:-1], around, strict=True)]
    return [~far[0], *used, far[-1]]


def _pyramid_parameters(sizes: Sizes, fraction: float) -> np.float32:
    rows = affordable_rows(sizes, fraction, 0.0)
    diagonal = sizes.length * (PYRAMID_TILE - 1) / 2  # keys of a tile's own that are hidden
    start = np.arange(sizes.length // PYRAMID_TILE)[:, None] * PYRAMID_TILE
    own = start + PYRAMID_TILE > np.arange(sizes.length // CELLS[0]) * CELLS[0]
    low, high = 0.0, sizes.length / CELLS[0]
    for _ in range(30):
        middle = (low + high) / 2
        exact, *coarse = _cells_used(sizes.length, middle, np)
        counted = CELLS[0] * (exact & own).sum() + sum(used.sum() for used in coarse)
        fits = PYRAMID_TILE * counted - diagonal <= rows
        low, high = (middle, high) if fits else (low, middle)
    return np.float32(low)


def _pyramid(query: Array, key: Array, value: Array, reach: Array) -> Selection:
    """Cells whose size grows with their distance, as the fast multipole method has them."""
    exact, *used = _cells_used(query.shape[0], reach, jnp)
    coarse = []
    for cell, mask in zip(cells_within(query.shape[0]), used, strict=True):
        bias = jnp.where(mask, math.log(cell), -jnp.inf)
        bias = jnp.broadcast_to(bias, (query.shape[1], *bias.shape))
        keys = block_means(key, cell).astype(key.dtype)
        coarse.append(Coarse(block_means(value, cell), bias, keys))
    means = 2.0 * len(coarse) * key.size
    keep = jnp.broadcast_to(exact, (query.shape[1], *exact.shape))
    return Selection(means, keep, coarse=tuple(coarse))


EXACT = Contender("exact", lambda sizes, fraction: (), selecting(_exact))
BASELINES = [
    Contender("window + sinks", _window_parameters, selecting(_window)),
    Contender(
        "block top-k",
        partial(_kept, query_block=BLOCK, key_block=BLOCK),
        selecting(_block_top_k),
        tile=lambda _: BLOCK,
    ),
    Contender(
        "Quest",
        partial(_kept, query_block=BLOCK, key_block=PAGE, products=2),
        selecting(_quest),
        tile=lambda _: BLOCK,
    ),
    Contender("MRA", _mra_parameters, selecting(_mra)),
    Contender("fixed pyramid", _pyramid_parameters, selecting(_pyramid)),
]
