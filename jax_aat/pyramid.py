"""Statistics of granules and super-tiles: coarse rows, what the router judges by, the state.

Everything is computed in float32 (float64 for float64 operands) from the keys before the key/value
length and is differentiable; the router stops its gradients itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.levels import GRANULE
from jax_aat.problem import Operands, Options, Slot, accumulation_dtype

ALPHA = 0.6
"""Share of the first-order correction of coarse values that is applied."""
BETA = 0.5
"""Share of the second-order correction of the mass of coarse rows that is applied."""
LARGEST_BIAS = 3.0
"""Bound of that correction, a natural logarithm."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Keys, values or both, cut into blocks; the last one is padded with rows that do not count.

    Attributes:
      rows: [B, blocks, size, K, H].
      valid: Whether a row counts, broadcasts to [B, blocks, size].
    """

    rows: jax.Array
    valid: jax.Array

    @classmethod
    def of(cls, x: jax.Array, size: int, lengths: jax.Array | None) -> "Blocks":
        """Cuts [B, S, K, H]; of batch entry b the first lengths[b] rows count, or all."""
        keys = x.shape[1]
        blocks = -(-keys // size)
        x = x.astype(accumulation_dtype(x.dtype))
        x = jnp.pad(x, ((0, 0), (0, blocks * size - keys), (0, 0), (0, 0)))
        position = np.arange(blocks * size).reshape(1, blocks, size)
        valid = jnp.asarray(position < keys)
        if lengths is not None:
            valid &= position < lengths[:, None, None]
        rows = x.reshape(x.shape[0], blocks, size, *x.shape[2:])
        # Padding may hold anything, NaN included.
        return cls(jnp.where(valid[..., None, None], rows, 0), valid)

    @functools.cached_property
    def count(self) -> jax.Array:
        """Rows of a block that count, [B or 1, blocks], float."""
        return self.valid.sum(-1).astype(self.rows.dtype)

    @functools.cached_property
    def mean(self) -> jax.Array:
        """[B, blocks, K, H]; 0 for a block without rows."""
        return self.rows.sum(2) / jnp.maximum(self.count, 1)[..., None, None]

    @functools.cached_property
    def centred(self) -> jax.Array:
        """Rows less their mean, [B, blocks, size, K, H]."""
        return jnp.where(self.valid[..., None, None], self.rows - self.mean[:, :, None], 0)

    @functools.cached_property
    def variance(self) -> jax.Array:
        """[B, blocks, K, H], of each component."""
        total = jnp.square(self.centred).sum(2)
        return total / jnp.maximum(self.count, 1)[..., None, None]


def coarse_rows(operands: Operands, super_tile: int) -> tuple[jax.Array, jax.Array]:
    """Mean rows of granules, then of super-tiles, of keys and of values: [B, R, K, H] each."""
    lengths = operands.get(Slot.KV_LENGTHS)

    def means(x: jax.Array) -> jax.Array:
        parts = [Blocks.of(x, size, lengths).mean for size in (GRANULE, super_tile)]
        return jnp.concatenate(parts, axis=1).astype(x.dtype)

    return means(operands[Slot.K]), means(operands[Slot.V])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["level_bias", "tilt", "ratio"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Correction:
    """What the state says of coarse rows, for every query.

    Attributes:
      level_bias: Logarithm of the mass that a mean row lacks, [B, T, N, 2]; natural.
      tilt: What is to be added to the value of a row at level 2, [B, T, N, H].
      ratio: What part of it goes to one at level 1, [B, T, N].
    """

    level_bias: jax.Array
    tilt: jax.Array
    ratio: jax.Array

    def applied(self, out: jax.Array, shares: jax.Array) -> jax.Array:
        """The output with the values of coarse rows tilted."""
        return (out.astype(self.tilt.dtype) + self._added(shares)).astype(out.dtype)

    def removed(self, out: jax.Array, shares: jax.Array) -> jax.Array:
        """The output before that."""
        return (out.astype(self.tilt.dtype) - self._added(shares)).astype(out.dtype)

    def _added(self, shares: jax.Array) -> jax.Array:
        weight = self.ratio * shares[..., 0] + shares[..., 1]
        return weight[..., None] * self.tilt


def correction(operands: Operands, options: Options) -> Correction:
    """First-order correction of coarse values, second-order one of their mass.

    The state of a query is the mean, over the super-tiles before its own (causal) or over all, of
    Cov(v, k) within a super-tile and of the variances of k within super-tiles and within granules.
    """
    q = operands[Slot.Q]
    q = q.astype(accumulation_dtype(q.dtype)) * options.scale
    lengths = operands.get(Slot.KV_LENGTHS)
    keys = Blocks.of(operands[Slot.K], options.super_tile, lengths)
    values = Blocks.of(operands[Slot.V], options.super_tile, lengths)
    weight = keys.count
    covariance = jnp.einsum("bjskv,bjskh->bjkvh", values.centred, keys.centred)
    covariance = _running(covariance, weight)
    large = _running(keys.variance * weight[..., None, None], weight)
    granules = Blocks.of(operands[Slot.K], GRANULE, lengths)
    scatter = jnp.square(granules.centred).sum(2)
    missing = weight.shape[1] * options.super_tile // GRANULE - scatter.shape[1]
    scatter = jnp.pad(scatter, ((0, 0), (0, missing), (0, 0), (0, 0)))
    scatter = scatter.reshape(scatter.shape[0], weight.shape[1], -1, *scatter.shape[2:]).sum(2)
    small = _running(scatter, weight)
    traces = large.sum(-1)
    ratio = jnp.where(traces > 0, small.sum(-1) / jnp.where(traces > 0, traces, 1), 0)

    # Queries by the state that they see: [B, parts, size, K, G, H].
    batch, queries, heads, head_dim = q.shape
    size = options.super_tile if options.causal else queries
    parts = -(-queries // size)
    kv_heads = keys.rows.shape[3]
    padded = jnp.pad(q, ((0, 0), (0, parts * size - queries), (0, 0), (0, 0)))
    grouped = padded.reshape(batch, parts, size, kv_heads, -1, head_dim)
    last = weight.shape[1]
    seen = np.minimum(np.arange(parts), last) if options.causal else np.array([last])

    def by_query(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (batch, parts * size, *x.shape[2:]))
        return x[:, :queries]

    tilt = ALPHA * jnp.einsum("bjtkgh,bjkvh->bjtkgv", grouped, covariance[:, seen])
    biases = [
        jnp.einsum("bjtkgh,bjkh->bjtkg", jnp.square(grouped), x[:, seen]) for x in (small, large)
    ]
    level_bias = jnp.minimum(jnp.stack(biases, -1) * (BETA / 2), LARGEST_BIAS)
    spread = jnp.broadcast_to(ratio[:, seen, None, :, None], level_bias.shape[:-1])
    return Correction(
        by_query(level_bias.reshape(batch, -1, heads, 2)),
        by_query(tilt.reshape(batch, -1, heads, head_dim)),
        by_query(spread.reshape(batch, -1, heads)),
    )


def _running(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Means over the super-tiles before each and, last, over all: [B, super-tiles + 1, ...]."""
    total = jnp.cumsum(total, axis=1)
    weight = jnp.maximum(jnp.cumsum(weight, axis=1), 1)
    mean = total / weight.reshape(*weight.shape, *(1,) * (total.ndim - 2))
    return jnp.concatenate([jnp.zeros_like(mean[:, :1]), mean], axis=1)
