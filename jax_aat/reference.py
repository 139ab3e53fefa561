"""Dense attention in plain jax.numpy: the oracle that every implementation is compared with.

It holds the whole matrix of logits, takes any floating-point type and computes in it (16-bit types
in float32); under `jax.enable_x64` it is exact enough to judge float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.levels import (
    EXACT,
    GRANULE,
    MEAN,
    SUPER_MEAN,
    Grid,
    unpack_levels,
)
from jax_aat.problem import EMPTY_LOGSUMEXP, accumulation_dtype

TOLERANCE = {"float32": (2e-5, 1e-4), "float16": (1.5e-3, 5e-3), "bfloat16": (1e-2, 2e-2)}
"""Largest relative error against float64 by dtype: of results, of derivatives."""


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention by its definition.

    Arguments are those of `jax_aat.tiled_attention` in the layout BTNH, and `dtype`, which is
    computed in and rounded to after every step; None: float64 if `query` is float64, else float32.

    Returns:
      The output [B, T, N, H] and logsumexp [B, T, N], both in `dtype`.
    """
    logits, visible = _logits(
        query,
        key,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        dtype=dtype,
    )
    weights, lse = _softmax(jnp.where(visible, logits, -jnp.inf))
    return _weighted(weights, value), jnp.swapaxes(lse, 1, 2)


def dense_adaptive_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    coarse_key: jax.Array,
    coarse_value: jax.Array,
    levels: jax.Array,
    query_tile: int,
    super_tile: int,
    level_bias: jax.Array | None = None,
    query_seq_lengths: jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    **conditions: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of a levels map by its definition in `docs/architecture.md`.

    Args:
      query: As in `dense_attention`, like every argument that is not described here.
      key: As there.
      value: As there.
      bias: As there; a coarse row takes that of its first key.
      mask: As there; applies to single keys only.
      coarse_key: [B, R, K, H], mean rows of granules, then of super-tiles.
      coarse_value: [B, R, K, H].
      levels: [B, L, I, W] uint32, see `jax_aat.levels`.
      query_tile: Rows of a query tile.
      super_tile: Keys of a super-tile.
      level_bias: [B, T, N, 2], added to the logits of rows at level 1 and at level 2.
      query_seq_lengths: As there.
      scale: As there.
      logits_soft_cap: As there.
      **conditions: What else decides which single keys are visible, as there.

    Returns:
      The output [B, T, N, H], logsumexp [B, T, N] and shares [B, T, N, 2], the probability of all
      rows at level 1 and at level 2; in float64 if `query` is float64, else in float32.
    """
    common: dict[str, Any] = {
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "query_seq_lengths": query_seq_lengths,
    }
    (_, queries, heads, _), (keys, kv_heads) = query.shape, key.shape[1:3]
    grid = Grid(queries, keys, heads, kv_heads, query_tile, super_tile)
    level = unpack_levels(levels, grid.granules)
    # From tiles [B, L, I, granules] to query rows [B, N, T, granules].
    level = jnp.repeat(level, grid.tile_heads, axis=1)
    level = jnp.repeat(level, grid.positions, axis=2)[:, :, :queries]

    fine, visible = _logits(query, key, bias, mask, **common, **conditions)
    visible &= jnp.repeat(level == EXACT, GRANULE, axis=-1)[..., :keys]

    granule_counts = jnp.where(level == MEAN, grid.granule_sizes, 0)
    super_counts = jnp.where(level == SUPER_MEAN, grid.granule_sizes, 0)
    counts = jnp.concatenate([granule_counts, grid.by_super_tile(super_counts).sum(-1)], axis=-1)
    if bias is not None and bias.shape[-1] != 1:
        firsts = [np.arange(grid.granules) * GRANULE, np.arange(grid.super_tiles) * super_tile]
        bias = bias[..., np.concatenate(firsts)]
    coarse, in_length = _logits(query, coarse_key, bias, None, **common)
    coarse += jnp.log(jnp.maximum(counts, 1).astype(coarse.dtype))
    if level_bias is not None:
        sizes = [grid.granules, grid.super_tiles]
        by_row = jnp.repeat(level_bias, np.array(sizes), axis=-1, total_repeat_length=sum(sizes))
        coarse += jnp.swapaxes(by_row.astype(coarse.dtype), 1, 2)
    in_length &= counts > 0

    logits = jnp.concatenate(
        [jnp.where(visible, fine, -jnp.inf), jnp.where(in_length, coarse, -jnp.inf)], axis=-1
    )
    weights, lse = _softmax(logits)
    out = _weighted(weights, jnp.concatenate([value, coarse_value], axis=1))
    granule_end = keys + grid.granules
    shares = [weights[..., keys:granule_end].sum(-1), weights[..., granule_end:].sum(-1)]
    return out, jnp.swapaxes(lse, 1, 2), jnp.swapaxes(jnp.stack(shares, -1), 1, 2)


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected|| in float64; ||actual|| where nothing is expected."""
    x, reference = (np.asarray(a, np.float64) for a in (actual, expected))
    return float(np.linalg.norm(x - reference)) / (float(np.linalg.norm(reference)) or 1.0)


def _logits(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    logits_soft_cap: float | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Logits of every pair, and which query sees which key; both [B, N, T, S]."""
    dtype = accumulation_dtype(query.dtype) if dtype is None else dtype
    q, k = query.astype(dtype), key.astype(dtype)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    # A scalar of NumPy would be wider than 16 bits, and so would the product be.
    logits *= jnp.asarray(1 / np.sqrt(q.shape[-1]) if scale is None else scale, dtype)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits += bias.astype(dtype)

    t = jnp.arange(q.shape[1])[:, None]
    s = jnp.arange(k.shape[1])
    visible = jnp.ones(logits.shape, bool)
    if mask is not None:
        visible &= mask
    if is_causal:
        visible &= s <= t
    if local_window_size is not None:
        both = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
        visible &= (t - both[0] <= s) & (s <= t + both[1])
    if query_seq_lengths is not None:
        visible &= t < query_seq_lengths[:, None, None, None]
    if key_value_seq_lengths is not None:
        visible &= s < key_value_seq_lengths[:, None, None, None]
    if query_segment_ids is not None and key_value_segment_ids is not None:
        visible &= (query_segment_ids[:, :, None] == key_value_segment_ids[:, None, :])[:, None]
    return logits, visible


def _softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities along the last axis, where -inf is hidden, and the logsumexp of each row."""
    # jnp.max has no value for no keys; a row that sees nothing has no maximum to subtract.
    largest = logits.max(-1, keepdims=True, initial=-jnp.inf)
    shift = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    weights = jnp.exp(logits - shift)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return weights / total, jnp.where(empty, EMPTY_LOGSUMEXP, shift + jnp.log(total))[..., 0]


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sums of values [B, S, K, H] by weights [B, N, T, S]: [B, T, N, H]."""
    v = jnp.repeat(value.astype(weights.dtype), weights.shape[1] // value.shape[2], axis=2)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
