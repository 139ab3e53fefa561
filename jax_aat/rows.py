"""Single query rows of one batch entry, at any positions: what they see, how they attend to it.

Operands are those of a call without their batch axis.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jax_aat.levels import GRANULE, Grid
from jax_aat.problem import Options, Slot, accumulation_dtype
from jax_aat.tiles import PRECISION

LOGITS_AT_ONCE = 2**24
"""Logits of chosen rows that are held at a time."""


def visibility(
    operands: Mapping[Slot, jax.Array], options: Options, grid: Grid, positions: jax.Array
) -> jax.Array:
    """Which keys rows at `positions` [R] see, [1 or N, R, S] bool."""
    t, s = positions[:, None], jnp.arange(grid.keys)
    left, right = options.window
    visible = jnp.ones((1, len(positions), grid.keys), bool)
    if options.causal:
        visible &= s <= t
    if left >= 0:
        visible &= s >= t - left
    if right >= 0:
        visible &= s <= t + right
    if Slot.Q_LENGTHS in operands:
        visible &= t < operands[Slot.Q_LENGTHS]
    if Slot.KV_LENGTHS in operands:
        visible &= s < operands[Slot.KV_LENGTHS]
    if Slot.Q_SEGMENTS in operands:
        visible &= operands[Slot.Q_SEGMENTS][positions][:, None] == operands[Slot.KV_SEGMENTS]
    if Slot.MASK in operands:
        visible &= take(operands[Slot.MASK], positions)
    return visible


def softmax_weights(
    operands: Mapping[Slot, jax.Array], options: Options, grid: Grid, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Exact probabilities of rows over the largest of each, [N, R, S], and which keys they see.

    Returns:
      The weights, of which the largest of a row is 1, all 0 where it sees no key, and [1 or N, R,
      S] bool.
    """
    dtype = accumulation_dtype(operands[Slot.Q].dtype)
    precision = PRECISION.get(operands[Slot.Q].dtype, lax.Precision.HIGHEST)
    q, k = (operands[slot].astype(dtype) for slot in (Slot.Q, Slot.K))
    # By a power of 2, which rounds nothing, and the rest after the product: 16-bit operands are
    # then products of what matrix units take as it is.
    mantissa, exponent = math.frexp(abs(options.scale))
    rest = 2 * mantissa
    q = q[positions] * math.copysign(2.0 ** (exponent - 1), options.scale)
    q = jnp.moveaxis(q, 0, 1).reshape(grid.kv_heads, -1, q.shape[-1])
    logits = jnp.einsum("kmh,skh->kms", q, k, precision=precision)
    logits = logits.reshape(grid.heads, len(positions), grid.keys)
    if options.soft_cap or Slot.BIAS in operands:
        logits, rest = logits * rest, 1.0
    if options.soft_cap:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    if Slot.BIAS in operands:
        logits += take(operands[Slot.BIAS], positions).astype(dtype)

    visible = visibility(operands, options, grid, positions)
    largest = jnp.where(visible, logits, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf)
    # Scaled after the subtraction: contracted with it, a product that is not rounded would meet
    # one that is, and of large logits the difference may be anything.
    below = (logits - jnp.where(largest == -jnp.inf, 0, largest)) * rest
    below = jnp.where(visible, jnp.minimum(below, 0), -jnp.inf)  # 0 times infinity is NaN
    return jnp.exp(below), visible


def take(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows at positions [R] of a bias or mask [N or 1, T or 1, S or 1]."""
    return x if x.shape[-2] == 1 else x[:, positions]


def by_granule(x: jax.Array, granules: int) -> jax.Array:
    """Splits the last axis into [granules, 16], padded with 0."""
    missing = granules * GRANULE - x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return padded.reshape(*x.shape[:-1], granules, GRANULE)
