"""The audit of a call: exact attention for a few random rows, and what follows of all of them.

One row of every stretch of 1 / `audit_rate` queries is drawn for each batch entry, the same for all
heads. What is estimated and how its interval is made stands in `docs/resolution.md`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_aat.levels import EXACT, Grid, unpack_levels
from jax_aat.problem import Operands, Options, Slot, counted
from jax_aat.pytrees import exportable
from jax_aat.rows import LOGITS_AT_ONCE, by_granule, softmax_weights
from jax_aat.tiles import PRECISION, finite

_DEGREES = (0.5, 0.6, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 30, 60, np.inf)
_STUDENT = (
    *(164.5577, 67.8444, 28.7464, 12.7062, 8.028, 6.0167, 4.3027, 3.5747, 3.1824),
    *(2.7764, 2.5706, 2.3646, 2.2281, 2.1314, 2.0423, 2.0003, 1.96),
)
"""97.5% quantiles of Student's t distribution with `_DEGREES` degrees of freedom."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "rows",
        "erring",
        "error",
        "error_squares",
        "largest_error",
        "norm",
        "held",
        "best",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Audit:
    """What audited rows say, by head; every attribute [..., N] float32.

    In a moving average (`blended`) `erring` says how lately a row erred; in `joined` heads it
    counts a row once for each of them.

    Attributes:
      rows: Number of audited rows.
      erring: Number of those whose error is more than rounding leaves.
      error: Estimated sum over all rows of ||out - exact out||^2.
      error_squares: Sum of the squares of what each audited row adds to `error`.
      largest_error: The most that an audited row adds to `error`.
      norm: Estimated sum over all rows of ||exact out||^2.
      held: Attention mass of the granules at level 0, summed over the audited rows.
      best: The same of the best sets of granules of the same sizes.
    """

    rows: jax.Array
    erring: jax.Array
    error: jax.Array
    error_squares: jax.Array
    largest_error: jax.Array
    norm: jax.Array
    held: jax.Array
    best: jax.Array

    @classmethod
    def empty(cls, heads: int) -> "Audit":
        """No row was audited yet."""
        # An array each: a buffer that two attributes share could not be donated.
        return cls(*(jnp.zeros(heads, jnp.float32) for _ in dataclasses.fields(cls)))

    @property
    def relative_error(self) -> jax.Array:
        """Estimate of ||out - exact out|| / ||exact out|| over all rows, [..., N]."""
        return jnp.sqrt(_ratio(self.error, self.norm, 0.0))

    @property
    def interval(self) -> jax.Array:
        """95% confidence interval of the relative error, [..., N, 2]."""
        found: jax.Array = _interval(self)
        return found

    @property
    def information_flow_quality(self) -> jax.Array:
        """IFQ: 1 - ||out - exact out||^2 / ||exact out||^2, [..., N]."""
        return 1 - _ratio(self.error, self.norm, 0.0)

    @property
    def adaptation_efficiency(self) -> jax.Array:
        """AE: mass held at level 0 over that of the best set of the same size, [..., N]."""
        return _ratio(self.held, self.best, 1.0)

    def joined(self, heads: int) -> "Audit":
        """The audit of every `heads` consecutive heads as one, [..., N / heads]."""
        parts: Audit = jax.tree.map(lambda x: x.reshape(*x.shape[:-1], -1, heads), self)
        total: Audit = jax.tree.map(lambda x: x.sum(-1), parts)
        # Heads share their rows; by Minkowski's inequality this is the most that the squares of
        # what a row adds for all heads can sum to.
        squares = jnp.sqrt(parts.error_squares).sum(-1) ** 2
        return dataclasses.replace(total, rows=parts.rows.max(-1), error_squares=squares)

    def blended(self, new: "Audit", weight: Any) -> "Audit":
        """Moving average: `weight` of `new`, broadcasts to [..., N], the rest of this."""
        blend: Audit = jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, self, new)
        return blend


exportable(Audit)

# In float32: by float64 tables calls with and without x64 would not be told apart (JAX 0.10).
_STUDENT_BY_INVERSE = tuple(
    x.astype(np.float32) for x in (1 / np.array(_DEGREES[::-1]), np.log(_STUDENT[::-1]))
)


# Compiled as a whole even outside jit, where reports are read.
@jax.jit
def _interval(audit: Audit) -> jax.Array:
    n, total = audit.rows, audit.error
    variance = (audit.error_squares - _ratio(total**2, n, 0.0)) * _ratio(n, n - 1, 0.0)
    # A few rows may hold most of the error: four more like the largest may have been missed, and
    # no more rows say something about the rest than those that add a like part.
    deviation = jnp.sqrt(jnp.maximum(variance, 0) + 4 * audit.largest_error**2)
    even = _ratio(total**2, audit.error_squares, n)
    degrees = jnp.clip(jnp.minimum(even / 2 - 1, n - 1), 0.5)
    student = jnp.exp(jnp.interp(1 / degrees, *_STUDENT_BY_INVERSE))
    width = jnp.minimum(student * _ratio(deviation, total, 0.0), 80) / 2
    factors = jnp.exp(jnp.stack([-width, width], -1))
    seen = audit.relative_error[..., None] * factors
    # Where no audited row has an error but that of rounding, at most 3 / n of all have one, at this
    # level.
    unseen = jnp.maximum(jnp.sqrt(jnp.minimum(_ratio(3.0, n, 0.0), 1)), seen[..., 1])
    unseen = jnp.stack([jnp.zeros_like(unseen), unseen], -1)
    return jnp.where(audit.erring[..., None] > 0, seen, unseen)


def choose_rows(
    seed: jax.Array | int, step: jax.Array | int, batch: int, queries: int, rate: float
) -> tuple[jax.Array, np.ndarray[Any, Any]]:
    """Draws the rows to audit: one of every stretch of 1 / `rate`, by counter.

    Returns:
      Positions [batch, R] int32 in ascending order, and how many rows each stands for, [R].
    """
    stretch = max(1, round(1 / rate))
    starts = np.arange(0, queries, stretch)
    lengths = np.minimum(stretch, queries - starts)
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    draws = jax.random.randint(key, (batch, len(starts)), 0, lengths[None])
    return draws + jnp.asarray(starts, draws.dtype), lengths


def audit(
    operands: Operands,
    options: Options,
    out: jax.Array,
    levels: jax.Array,
    grid: Grid,
    positions: jax.Array,
    weights: Any,
) -> Audit:
    """Compares rows of a call with exact attention; no gradient flows through it.

    Args:
      operands: Those of the call, with one batch axis.
      options: Those of the call.
      out: What the call returns, [B, T, N, H].
      levels: Levels of granules, [B or 1, L, I, W] uint32.
      grid: How the plan cuts the call.
      positions: Which rows, [B, R] int32.
      weights: How many rows each stands for, [R].
    """
    batch, heads = out.shape[0], grid.heads
    operands = {s: x for s, x in operands.items() if s in _INPUTS} | {Slot.OUT: out}
    # Where a value that is seen is not finite, neither is the output.
    operands[Slot.V] = finite(operands[Slot.V])
    operands, levels = lax.stop_gradient((operands, levels))
    names = (*operands, None)
    # What all batch entries share is not copied.
    axes = [None if x.shape[0] == 1 != batch else 0 for x in (*operands.values(), levels)]
    values = [
        x[0] if axis is None else x
        for x, axis in zip((*operands.values(), levels), axes, strict=True)
    ]

    def entry(positions: jax.Array, *values: jax.Array) -> dict[str, jax.Array]:
        named: Any = dict(zip(names, values, strict=True))
        return _compare(named, options, named.pop(None), grid, positions)

    def chunk(positions: jax.Array) -> dict[str, jax.Array]:
        return jax.vmap(entry, in_axes=(0, *axes))(positions, *values)

    count = positions.shape[1]
    size = max(1, min(count, LOGITS_AT_ONCE // max(1, counted(batch) * heads * grid.keys)))
    chunks = -(-count // size)
    padded = jnp.pad(positions, [(0, 0), (0, chunks * size - count)])
    by_chunk = lax.map(chunk, jnp.moveaxis(padded.reshape(batch, chunks, size), 1, 0))
    # [chunks, B, size, N] to [B, R, N].
    compared = {
        name: jnp.moveaxis(x, 0, 1).reshape(batch, chunks * size, heads)[:, :count]
        for name, x in by_chunk.items()
    }
    rounding = max(_LEAST_ROUNDING, _ROUNDING * float(jnp.finfo(out.dtype).eps) / 2)
    weight = jnp.asarray(weights, jnp.float32)[:, None]
    error = weight * compared["error"]
    norms = (operands[Slot.OUT].astype(jnp.float32) ** 2).sum((0, 1, 3))
    # The norm of what was computed is known of all rows: only how it differs is estimated.
    norm = norms + (weight * (compared["exact_norm"] - compared["norm"])).sum((0, 1))
    return Audit(
        rows=jnp.full(heads, batch * count, jnp.float32),
        # NaN errs, too.
        erring=(~(compared["error"] <= rounding**2 * compared["exact_norm"])).sum(
            (0, 1), jnp.float32
        ),
        error=error.sum((0, 1)),
        error_squares=(error**2).sum((0, 1)),
        largest_error=error.max((0, 1), initial=0),
        norm=jnp.maximum(norm, _LEAST_NORM * norms),
        held=compared["held"].sum((0, 1)),
        best=compared["best"].sum((0, 1)),
    )


_INPUTS = (*(Slot(i) for i in range(9)),)
_ROUNDING, _LEAST_ROUNDING = 4, 1e-5
"""Relative errors of a row that may come from rounding alone: in roundings of the output's dtype,
to which kernels round weights, too, and at least what long sums in float32 leave."""
_LEAST_NORM = 0.1
"""Estimates of the norm do not fall below this part of the norm of what was computed."""


def _compare(
    operands: dict[Slot, jax.Array],
    options: Options,
    levels: jax.Array,
    grid: Grid,
    positions: jax.Array,
) -> dict[str, jax.Array]:
    """What one batch entry's rows at `positions` [R] tell, each [R, N]."""
    weights, seen = softmax_weights(operands, options, grid, positions)
    precision = PRECISION.get(operands[Slot.Q].dtype, lax.Precision.HIGHEST)
    # Behind a barrier, as compilers add up all weights once more for the sum of these.
    mass = lax.optimization_barrier(by_granule(weights, grid.granules).sum(-1))
    share = 1 / jnp.maximum(mass.sum(-1, keepdims=True), 1e-30)
    mass *= share
    v = operands[Slot.V].astype(weights.dtype)
    grouped = weights.reshape(grid.kv_heads, -1, grid.keys)
    exact = jnp.einsum("kms,skh->kmh", grouped, v, precision=precision)
    exact = jnp.moveaxis(exact.reshape(*weights.shape[:2], -1) * share, 0, 1)
    out = operands[Slot.OUT][positions].astype(weights.dtype)

    level = unpack_levels(levels[:, positions // grid.positions], grid.granules)
    fine = jnp.repeat(level == EXACT, grid.tile_heads, axis=0)
    fine &= by_granule(seen, grid.granules).any(-1)
    by_row = {
        "held": jnp.where(fine, mass, 0).sum(-1).T,
        "best": _sum_of_largest(mass, fine.sum(-1)).T,
        "error": ((out - exact) ** 2).sum(-1),
        "exact_norm": (exact**2).sum(-1),
        "norm": (out**2).sum(-1),
    }
    return {name: x.astype(jnp.float32) for name, x in by_row.items()}


def _sum_of_largest(x: jax.Array, count: jax.Array) -> jax.Array:
    """Sum of the `count` [...] largest of numbers from 0 to 1, [..., n], in float32.

    Bits of such numbers are ordered as they are, so that the smallest of those that count is found
    bit by bit, three at a time: GPUs sort rows of thousands of numbers far slower.
    """
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    least = jnp.zeros(count.shape, jnp.int32)
    steps = jnp.arange(1, 8, dtype=jnp.int32)
    for shift in range(27, -1, -3):
        tried = least[..., None] + (steps << shift)
        reached = (bits[..., None, :] >= tried[..., None]).sum(-1) >= count[..., None]
        least += reached.sum(-1, dtype=jnp.int32) << shift
    above = bits > least[..., None]
    ties = (count - above.sum(-1)) * lax.bitcast_convert_type(least, jnp.float32)
    return jnp.where(above, x, 0).sum(-1) + ties


def _ratio(x: Any, y: Any, otherwise: Any) -> jax.Array:
    """The quotient, and `otherwise` where y is 0 or less; NaN stays NaN."""
    none = y <= 0
    return jnp.where(none, otherwise, x / jnp.where(none, 1, y))
