"""Adaptive attention as a contender: levels from the router's emulation, rows and state densely."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Contender, Sizes, selecting
from dense_engine import Coarse, Selection, dense_operations
from model import Shape, default_dtype, exact_attention, losses
from router_emulation import (
    EXACT,
    GRANULE,
    MEAN,
    SUPER,
    SUPER_TILE,
    Routing,
    choose_levels,
    lambda_of_budget,
    moments,
    operations,
    predict,
)

Array = jax.Array

ALPHA, BETA = 0.6, 0.5
"""Strength of the state's correction of values and of masses."""
_LARGEST_BIAS = 3.0


def of_levels(
    query: Array, key: Array, value: Array, levels: Array, planning: Any, block: int = SUPER_TILE
) -> Selection:
    """What attention sees under a map of levels.

    Args:
      query: [T, N, H], not scaled.
      key: [T, K, H].
      value: As key.
      levels: [K, tiles, granules].
      planning: Operations of all but the rows that attention reads.
      block: Keys of a super-tile; a shorter sequence is one.
    """
    length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    every = partial(jnp.repeat, repeats=heads // kv_heads, axis=0)
    block = min(block, length)
    per_super = block // GRANULE
    at_super = levels.reshape(kv_heads, levels.shape[1], -1, per_super) == SUPER
    mean_bias = jnp.where(levels == MEAN, math.log(GRANULE), -jnp.inf)
    super_bias = jnp.log(GRANULE * at_super.sum(-1).astype(jnp.float32))
    (key_mean, _), (value_mean, _) = moments(key, GRANULE), moments(value, GRANULE)
    super_key, _ = moments(key, block)
    super_value, _ = moments(value, block)
    row_bias, tilt = state_correction(query / math.sqrt(head_dim), key, value, block)
    return Selection(
        planning,
        every(levels == EXACT),
        coarse=(
            Coarse(value_mean, every(mean_bias), key_mean.astype(key.dtype)),
            Coarse(super_value, every(super_bias), super_key.astype(key.dtype)),
        ),
        row_bias=row_bias,
        tilt=tilt,
    )


def state_correction(query: Array, key: Array, value: Array, block: int) -> tuple[Array, Array]:
    """What the state of the earlier super-tiles adds to coarse rows.

    Args:
      query: [T, N, H], scaled.
      key: [T, K, H].
      value: As key.
      block: Keys of a super-tile.

    Returns:
      Additions to the logits of the rows of levels 1 and 2, [T, N, 2], and to the output a unit of
      their shares, [T, N, 2, H].
    """
    length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    _, granule_variance = moments(key, GRANULE)
    granule_variance = granule_variance.reshape(-1, block // GRANULE, kv_heads, head_dim).mean(1)
    key_mean, variance = moments(key, block)
    value_mean, _ = moments(value, block)
    k = key.astype(jnp.float32).reshape(-1, block, kv_heads, head_dim) - key_mean[:, None]
    v = value.astype(jnp.float32).reshape(-1, block, kv_heads, head_dim) - value_mean[:, None]
    covariance = jnp.einsum("jskv,jskh->jkvh", v, k) / block
    small, large, covariance = map(_mean_of_earlier, (granule_variance, variance, covariance))
    ratio = small.sum(-1) / jnp.maximum(large.sum(-1), 1e-20)  # [super-tiles, K]

    q = query.astype(jnp.float32).reshape(-1, block, kv_heads, heads // kv_heads, head_dim)
    bias = [jnp.einsum("jtkgh,jkh->jtkg", q**2, x) * BETA / 2 for x in (small, large)]
    t = ALPHA * jnp.einsum("jtkgh,jkvh->jtkgv", q, covariance)
    tilt = jnp.stack([ratio[:, None, :, None, None] * t, t], axis=-2)
    row_bias = jnp.minimum(jnp.stack(bias, axis=-1), _LARGEST_BIAS)
    return row_bias.reshape(length, heads, 2), tilt.reshape(length, heads, 2, head_dim)


def _mean_of_earlier(x: Array) -> Array:
    """Mean over the super-tiles before each; zero for the first."""
    before = jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum(x[:-1], axis=0)])
    count = jnp.maximum(jnp.arange(x.shape[0]), 1)
    return before / count.reshape(-1, *[1] * (x.ndim - 1))


def by_budget(
    query: Array, key: Array, value: Array, fraction: Array, *, routing: Routing
) -> Selection:
    """One lambda for all heads and tiles of a layer, so that it spends a fraction."""
    prediction = predict(
        *map(jax.lax.stop_gradient, (_scaled(query), key, value)), fraction, routing
    )
    length, heads, head_dim = query.shape
    allowed = fraction * dense_operations(heads, length, head_dim)
    levels = choose_levels(prediction, lambda_of_budget(prediction, allowed, query.shape))
    return of_levels(query, key, value, levels, prediction.operations, routing.super_tile)


def by_threshold(
    query: Array, key: Array, value: Array, parameters: Any, *, routing: Routing
) -> Selection:
    """A lambda given from outside, the same in every layer: layers that need more spend more."""
    fraction, log_lambda = parameters
    prediction = predict(
        *map(jax.lax.stop_gradient, (_scaled(query), key, value)), fraction, routing
    )
    levels = choose_levels(prediction, log_lambda)
    return of_levels(query, key, value, levels, prediction.operations, routing.super_tile)


def calibrate(
    shape: Shape, params: Any, window: np.ndarray, fraction: float, routing: Routing
) -> np.float32:
    """The log lambda with which all layers together spend a fraction on a text [T + 1].

    The levels of many lambdas are counted along the layers of exact attention.
    """
    candidates = np.linspace(-30.0, 5.0, 71, dtype=np.float32)

    def layer(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        prediction = predict(_scaled(q[0]), k[0], v[0], jnp.float32(fraction), routing)

        def spent(log_lambda: Array) -> Array:
            levels = choose_levels(prediction, log_lambda)
            length, heads, head_dim = q.shape[1:]
            dense = dense_operations(heads, length, head_dim)
            return operations(prediction, levels, q.shape[1:]) / dense

        return exact_attention(q, k, v)[0], jax.lax.map(spent, jnp.asarray(candidates))

    count = jax.jit(lambda p, w: losses(shape, default_dtype(), layer, p, w)[1])
    spent = np.asarray(count(params, window[None])).mean(0)
    return np.float32(np.interp(-fraction, -spent, candidates))


def _scaled(query: Array) -> Array:
    return query.astype(jnp.float32) / math.sqrt(query.shape[-1])


def _fraction(sizes: Sizes, fraction: float) -> np.float32:
    return np.float32(fraction)


def _not_calibrated(sizes: Sizes, fraction: float) -> tuple[np.float32, np.float32]:
    return np.float32(fraction), np.float32(0)


def contender(name: str, routing: Routing) -> Contender:
    """Adaptive attention with a budget for every layer."""
    attend = selecting(partial(by_budget, routing=routing))
    return Contender(name, _fraction, attend, tile=lambda _: routing.tile)


def shared(name: str, routing: Routing) -> Contender:
    """Adaptive attention with one lambda for all layers, which `calibrate` finds."""
    attend = selecting(partial(by_threshold, routing=routing))
    return Contender(name, _not_calibrated, attend, tile=lambda _: routing.tile)


OURS = contender("emulation", Routing())
FREE = Routing(free=True, tile=16, super_tile=256)
"""With the sizes that the library takes up to 4,096 keys."""
BOUND = replace(FREE, foresight=True, floor=0.0, near=0.0)
"""Nothing is forced, as that would take nearly all of a small budget."""
SHARED = {
    "emulation, shared lambda": Routing(),
    "emulation, foresight for nothing, shared lambda": BOUND,
}
"""Routings with one lambda for all layers."""
VARIANTS = [
    *(shared(name, routing) for name, routing in SHARED.items()),
    contender("emulation, levels 0 and 1", Routing(highest=MEAN)),
    contender("emulation, one stage", Routing(refine=0.0)),
    contender("emulation, not near", Routing(near=0.0)),
    contender("emulation, pairs of queries", Routing(fine_queries=2)),
    contender("emulation, every query", Routing(fine_queries=1, refine=1.25)),
    contender("emulation, foresight", Routing(foresight=True)),
    contender("emulation, for nothing, tiles of 16", FREE),
    contender("emulation, foresight for nothing", replace(BOUND, tile=32)),
    contender("emulation, foresight for nothing, tiles of 16", BOUND),
]
"""Other choices than the library's; those with foresight or for nothing are bounds."""
