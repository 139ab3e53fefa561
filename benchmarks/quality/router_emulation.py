"""The router of adaptive attention written a second time, densely, straight from its definition.

It decides which granule of 16 keys a tile of queries sees exactly (level 0), as its mean row
(level 1), inside the mean row of its super-tile (level 2) or not at all (level 3: the future). It
shares no code with `jax_aat`: it checks that library's plans and, being dense, evaluates their
quality fast on any device. Queries [T, N, H] are scaled already, keys and values are [T, K, H],
attention is causal; a tile is a run of positions of the query heads of a key/value head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array

GRANULE, SUPER_TILE, SUB_QUERY, FINE = 16, 1024, 16, 4
EXACT, MEAN, SUPER, HIDDEN = range(4)
COSTS = (GRANULE, 1.0, 0.0)
"""Rows that a query reads of a granule at levels 0, 1 and 2."""
_LARGEST_VARIANCE = 2.0
_TILES_AT_ONCE = 16
_SMALLEST, _LARGEST = -60.0, 20.0
"""Bounds of log lambda."""


@dataclass(frozen=True)
class Routing:
    """Choices of the router.

    Attributes:
      highest: Highest level in use, 1 or 2.
      refine: Stage 2 looks at this many times the budget of the granules; 0: no second stage.
      floor: This share of the budget, the most important granules of every tile, is exact.
      near: This share of the budget, the granules nearest before a tile, is exact.
      fine_queries: So many queries stage 2 knows by their mean.
      foresight: Judge everything by the logits of every query and key. What that costs is not
        counted: it says how much any way to judge could gain.
      free: Count only the rows that are read: planning, means and the state cost nothing. It says
        how much cheaper ways to do that could gain.
      tile: Positions whose queries choose together, a multiple of `SUB_QUERY`.
      super_tile: Keys of a super-tile; a shorter sequence is one.
    """

    highest: int = 2
    refine: float = 2.0
    floor: float = 0.25
    near: float = 0.125
    fine_queries: int = FINE
    foresight: bool = False
    free: bool = False
    tile: int = 32
    super_tile: int = SUPER_TILE


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "super_mean", "coarse", "super_coarse", "forced", "operations"],
    meta_fields=["per_super"],
)
@dataclass(frozen=True)
class Prediction:
    """What the router knows of every tile and granule.

    Attributes:
      mean: Predicted squared error of level 1, [K, tiles, granules].
      super_mean: Likewise of level 2.
      coarse: Level 1 is allowed: all queries of the tile see all keys, [tiles, granules].
      super_coarse: Level 2 is allowed: they see all keys of the super-tile, as its mean row
        holds all of them.
      forced: Exact whatever lambda says, [K, tiles, granules].
      operations: Floating-point operations of the prediction and of the state's correction.
      per_super: Granules of a super-tile.
    """

    mean: Array
    super_mean: Array
    coarse: Array
    super_coarse: Array
    forced: Array
    operations: Array
    per_super: int


def moments(x: Array, block: int) -> tuple[Array, Array]:
    """Mean and variance of the rows of every block, [blocks, heads, H], float32."""
    blocks = x.astype(jnp.float32).reshape(-1, block, *x.shape[1:])
    mean = blocks.mean(1)
    return mean, ((blocks - mean[:, None]) ** 2).mean(1)


def predict(
    query: Array, key: Array, value: Array, fraction: Array, routing: Routing
) -> Prediction:
    """Predicts what every level of every granule would cost in accuracy."""
    length, heads, head_dim = query.shape
    tiles, granules, kv_heads = length // routing.tile, length // GRANULE, key.shape[1]
    block = min(routing.super_tile, length)
    per_super = block // GRANULE
    fine_queries, fine_keys = (1, 1) if routing.foresight else (routing.fine_queries, FINE)
    key_mean, key_variance = moments(key, GRANULE)
    fine_mean, fine_variance = moments(key, fine_keys)
    value_mean, value_variance = moments(value, GRANULE)
    scatter = value_variance.sum(-1).T  # [K, granules]
    super_key, _ = moments(key, block)
    super_value, _ = moments(value, block)
    apart = ((value_mean - jnp.repeat(super_value, per_super, 0)) ** 2).sum(-1).T
    size = (value.astype(jnp.float32) ** 2).sum(-1).mean(0)[:, None]  # [K, 1]

    # Positions of a tile as sub-queries of 16, these as finer ones.
    parts, fines = routing.tile // SUB_QUERY, SUB_QUERY // fine_queries
    query = query.astype(jnp.float32)
    shape = (tiles, parts, fines, fine_queries, kv_heads, heads // kv_heads, head_dim)
    fine_first, fine_second = query.reshape(shape).mean(3), (query**2).reshape(shape).mean(3)
    ends = jnp.arange(length).reshape(tiles, parts, fines, fine_queries)[..., -1]
    starts = jnp.arange(granules) * GRANULE

    def of_tile(tile: Array) -> tuple[Array, ...]:
        first, second = fine_first[tile], fine_second[tile]  # [parts, fines, K, G, H]
        hidden = jnp.where(starts <= ends[tile][..., None], 0.0, -jnp.inf)  # [parts, fines, j]
        visible = hidden[-1, -1] == 0
        seen = visible.sum()
        m, s = first.mean(1), second.mean(1)
        variance = jnp.einsum("pkgh,jkh->kpgj", s, key_variance)
        x = jnp.einsum("pkgh,jkh->kpgj", m, key_mean) + variance / 2
        p = jax.nn.softmax(x + hidden[:, -1][:, None], axis=-1)
        importance = (p**2).mean((1, 2))
        x = jnp.broadcast_to(x[:, :, None], (kv_heads, parts, fines, *x.shape[2:]))
        if routing.refine or routing.foresight:
            count = seen if routing.foresight else jnp.ceil(routing.refine * fraction * seen)
            refined = _best(importance, count)
            finer = jnp.einsum("pfkgh,jkh->kpfgj", first, fine_mean)
            finer += jnp.einsum("pfkgh,jkh->kpfgj", second, fine_variance) / 2
            finer = finer.reshape(*x.shape, GRANULE // fine_keys)
            finer = jax.nn.logsumexp(finer, axis=-1) - math.log(GRANULE // fine_keys)
            x = jnp.where(refined[:, None, None, None], finer, x)
        p = jax.nn.softmax(x + hidden[:, :, None], axis=-1)
        square = (p**2).mean(2)  # [K, parts, G, j]
        importance = square.mean((1, 2))
        to_super = jnp.einsum("pkgh,jkh->kpgj", m, super_key)
        offset = jnp.einsum("pkgh,jkh->kpgj", m, key_mean) - jnp.repeat(to_super, per_super, -1)
        mean = (square * jnp.expm1(jnp.minimum(variance, _LARGEST_VARIANCE))).mean((1, 2))
        spread = jnp.minimum(variance + offset**2, _LARGEST_VARIANCE)
        super_mean = (square * jnp.expm1(spread)).mean((1, 2))
        forced = _best(importance, jnp.ceil(routing.floor * fraction * seen))
        before = jnp.ceil(routing.near * fraction * seen)
        forced = (forced | (starts >= tile * routing.tile - before * GRANULE)) & visible
        return mean * scatter / size, super_mean * (scatter + apart) / size, forced

    mean, super_mean, forced = (
        x.swapaxes(0, 1)
        for x in jax.lax.map(of_tile, jnp.arange(tiles), batch_size=min(_TILES_AT_ONCE, tiles))
    )
    begins = jnp.arange(tiles)[:, None] * routing.tile
    index = jnp.arange(granules)
    coarse = (index + 1) * GRANULE <= begins
    super_coarse = (index // per_super + 1) * per_super * GRANULE <= begins
    return Prediction(
        mean,
        super_mean,
        coarse,
        super_coarse & (routing.highest >= SUPER),
        forced,
        jnp.asarray(planning_operations(query.shape, kv_heads, fraction, routing)),
        per_super,
    )


def choose_levels(prediction: Prediction, log_lambda: Array) -> Array:
    """The level of least predicted error + lambda * cost, ties to exact: [K, tiles, granules]."""
    price = jnp.exp(log_lambda)
    exact = price * COSTS[EXACT]
    mean = jnp.where(prediction.coarse, prediction.mean + price * COSTS[MEAN], jnp.inf)
    super_mean = jnp.where(prediction.super_coarse, prediction.super_mean, jnp.inf)
    levels = jnp.where(mean <= super_mean, MEAN, SUPER)
    levels = jnp.where((exact <= jnp.minimum(mean, super_mean)) | prediction.forced, EXACT, levels)
    tiles, granules = prediction.coarse.shape
    ends = (jnp.arange(tiles)[:, None] + 1) * (granules * GRANULE // tiles)
    future = jnp.arange(granules) * GRANULE >= ends
    return jnp.where(future, HIDDEN, levels)


def rows_read(levels: Array, per_super: int) -> Array:
    """Rows that one query of a tile reads, summed over tiles and heads of keys and values."""
    blocks = levels.reshape(*levels.shape[:2], -1, per_super)
    exact = (levels == EXACT).sum().astype(jnp.float32) * GRANULE
    return exact + (levels == MEAN).sum() + (blocks == SUPER).any(-1).sum()


def operations(prediction: Prediction, levels: Array, query_shape: tuple[int, ...]) -> Array:
    """Floating-point operations of attention under a map of levels, prediction included."""
    length, heads, head_dim = query_shape
    group, tile = heads // levels.shape[0], length // levels.shape[1]
    hidden = heads * length * (tile - 1) / 2  # keys of a tile's own granules that are not seen
    rows = tile * group * rows_read(levels, prediction.per_super)
    return 4 * head_dim * (rows - hidden) + prediction.operations


def lambda_of_budget(prediction: Prediction, allowed: Array, query_shape: tuple[int, ...]) -> Array:
    """The least log lambda of all heads and tiles whose levels keep to a number of operations."""

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        fits = operations(prediction, choose_levels(prediction, middle), query_shape) <= allowed
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    return jax.lax.fori_loop(0, 30, halve, (jnp.float32(_SMALLEST), jnp.float32(_LARGEST)))[1]


def _best(scores: Array, count: Array) -> Array:
    """Whether a score is among the `count` highest of the last axis."""
    descending = -jnp.sort(-scores, axis=-1)
    last = jnp.clip(count.astype(int) - 1, 0, scores.shape[-1] - 1)
    return (scores >= descending[..., last][..., None]) & (count > 0)


def planning_operations(
    query_shape: tuple[int, ...], kv_heads: int, fraction: Array | float, routing: Routing
) -> Array | float:
    """Operations of summaries, of both stages and of the state."""
    if routing.free:
        return 0.0
    length, heads, head_dim = query_shape
    group, tiles = heads // kv_heads, length // routing.tile
    pairs = kv_heads * tiles * (length / 2) / GRANULE  # of a tile and a granule that it sees
    coarse = pairs * (routing.tile // SUB_QUERY) * group * 2
    supers = pairs * GRANULE / min(routing.super_tile, length) * (routing.tile // SUB_QUERY) * group
    refined = pairs * routing.refine * fraction
    fine = refined * (routing.tile // routing.fine_queries) * group * (GRANULE // FINE) * 2
    means = 8.0 * length * (heads + 2 * kv_heads) * head_dim
    state = 2.0 * length * head_dim * (kv_heads * head_dim + heads * (head_dim + 2))
    return 2 * head_dim * (coarse + supers + fine) + means + state
