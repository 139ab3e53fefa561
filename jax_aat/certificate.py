"""A certified bound on the error of attention in which some groups of keys were not read exactly.

For a query row, keys are either exact or in a group (a granule) of which only statistics are known.
From these follow an interval of the group's mass, by Bennett's inequality, and the distance of its
weighted values from their mean; from all groups a bound on the distance of any vector from the
true output. `docs/certificate.md` derives the formulas.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_SERIES_BELOW = 0.25
_NEGLIGIBLE = 1e-3


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("count", "key_mean", "key_low", "key_high", "key_deviation", "key_radius"),
        *("key_spread", "value_mean", "value_radius", "value_spread"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """What is known of groups of keys; G groups along the axis that keys lay along.

    Attributes:
      count: [..., G]: number of valid keys.
      key_mean: [..., G, H].
      key_low: [..., G, H]: smallest component of key minus mean, at most 0.
      key_high: [..., G, H]: largest component of key minus mean, at least 0.
      key_deviation: [..., G, H]: standard deviation of each component.
      key_radius: [..., G]: largest distance of a key from the mean.
      key_spread: [..., G]: largest standard deviation in any direction.
      value_mean: [..., G, H].
      value_radius: [..., G]: largest distance of a value from the mean.
      value_spread: [..., G]: largest standard deviation in any direction.
    """

    count: jax.Array
    key_mean: jax.Array
    key_low: jax.Array
    key_high: jax.Array
    key_deviation: jax.Array
    key_radius: jax.Array
    key_spread: jax.Array
    value_mean: jax.Array
    value_radius: jax.Array
    value_spread: jax.Array


def group_statistics(
    key: jax.Array, value: jax.Array, valid: jax.Array | None = None, size: int = 16
) -> GroupStatistics:
    """Statistics of groups of `size` consecutive keys, in float32 (float64 for float64 keys).

    Args:
      key: [..., S, H].
      value: [..., S, H].
      valid: [..., S] bool, which keys count; None: all.
      size: Keys of a group; the last group may have fewer.
    """
    dtype = jnp.promote_types(key.dtype, jnp.float32)
    keys = key.shape[-2]
    valid = jnp.ones(key.shape[:-1], bool) if valid is None else valid
    padding = -keys % size
    valid = jnp.broadcast_to(valid, key.shape[:-1])
    valid = jnp.pad(valid, [(0, 0)] * (valid.ndim - 1) + [(0, padding)])
    valid = valid.reshape(*valid.shape[:-1], -1, size)[..., None]
    count = valid.sum((-2, -1))

    def centred(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.pad(x.astype(dtype), [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
        x = jnp.where(valid, x.reshape(*x.shape[:-2], -1, size, x.shape[-1]), 0)
        mean = x.sum(-2) / jnp.maximum(count, 1)[..., None]
        return mean, jnp.where(valid, x - mean[..., None, :], 0)

    def spread(x: jax.Array) -> jax.Array:
        # The covariance and this smaller matrix share their eigenvalues; the largest is at most
        # the 32nd root of the sum of their 32nd powers, which exceeds it by 9% at most.
        product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        gram = product("...sh,...uh->...su", x, x)
        trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        gram /= jnp.where(trace > 0, trace, 1)
        for _ in range(4):
            gram = product("...st,...tu->...su", gram, gram)
        largest = (gram**2).sum((-2, -1)) ** (1 / 32) * trace[..., 0, 0] / jnp.maximum(count, 1)
        return jnp.sqrt(largest) * (1 + _slack(dtype))

    key_mean, k = centred(key)
    value_mean, v = centred(value)
    return GroupStatistics(
        count=count,
        key_mean=key_mean,
        # A mean that is rounded may lie outside of what it is the mean of.
        key_low=k.min(-2, initial=0),
        key_high=k.max(-2, initial=0),
        key_deviation=jnp.sqrt((k**2).sum(-2) / jnp.maximum(count, 1)[..., None]),
        key_radius=jnp.linalg.norm(k, axis=-1).max(-1),
        key_spread=spread(k),
        value_mean=value_mean,
        value_radius=jnp.linalg.norm(v, axis=-1).max(-1),
        value_spread=spread(v),
    )


def certified_bound(
    query: jax.Array,
    out: jax.Array,
    exact_out: jax.Array,
    exact_logsumexp: jax.Array,
    groups: GroupStatistics,
    inexact: jax.Array,
    *,
    bias: jax.Array | float = 0.0,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Bound on the distance ||out - attention over all keys|| of every row.

    Args:
      query: [..., R, H], times the scale of the logits.
      out: [..., R, H]: what is judged, however it was computed.
      exact_out: [..., R, H]: attention over the row's exact keys alone; ignored where there are
        none.
      exact_logsumexp: [..., R]: logsumexp over these; at most -0.7 times the largest float32 where
        there are none.
      groups: Statistics of groups [..., G].
      inexact: [..., R, G] bool: the row sees this whole group, and it is not among the exact keys.
      bias: What is added to the logits of a group, broadcasts to [..., R, G].
      soft_cap: As in `jax_aat.problem.Options`.

    Returns:
      [..., R]. A row without inexact groups is compared with `exact_out`.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    q, o, o_exact = (x.astype(dtype) for x in (query, out, exact_out))
    has_exact = exact_logsumexp > -0.6 * jnp.finfo(jnp.float32).max
    z_exact = jnp.where(has_exact, exact_logsumexp, -jnp.inf).astype(dtype)
    o_exact = jnp.where(has_exact[..., None], o_exact, 0)
    inexact &= (groups.count > 0)[..., None, :]

    mean, least, growth, moment = _mass_interval(q, groups, soft_cap)
    longest = jnp.linalg.norm(groups.key_mean, axis=-1) + groups.key_radius
    rounding = jnp.linalg.norm(q, axis=-1)[..., None] * longest[..., None, :] + jnp.abs(bias)
    rounding += jnp.where(has_exact, jnp.abs(exact_logsumexp), 0).astype(dtype)[..., None]
    rounding *= _slack(dtype)
    least, growth, moment = least - rounding, growth + rounding, moment + rounding
    log_mass = jnp.where(inexact, mean + jnp.log(jnp.maximum(groups.count, 1))[..., None, :], 0)
    log_mass = jnp.where(inexact, log_mass + bias, -jnp.inf)
    # Everything relative to the largest mass that a row can have.
    top = jnp.maximum(z_exact, (log_mass + growth).max(-1, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)
    z = jnp.exp(z_exact - top)
    low = jnp.exp(log_mass + least - top[..., None])
    high = jnp.exp(log_mass + growth - top[..., None])
    # sqrt(E e^2d - 1) may overflow where its product with a mass does not.
    drift = jnp.minimum(
        jnp.exp(log_mass - top[..., None] + moment) * groups.value_spread[..., None, :],
        high * groups.value_radius[..., None, :],
    )
    drift = jnp.where(inexact, drift, 0)

    middle, half = (high + low) / 2, (high - low) / 2
    distance = _distances(o, groups.value_mean)
    residue = z[..., None] * (o_exact - o) + _product(middle, groups.value_mean)
    residue -= middle.sum(-1)[..., None] * o
    numerator = jnp.linalg.norm(residue, axis=-1) + (half * distance + drift).sum(-1)
    scattered = _divide(numerator, z + low.sum(-1), jnp.inf)

    enclosed = _enclosed(o, o_exact, z, low, high, groups, inexact)
    magnitude = jnp.linalg.norm(o, axis=-1) + jnp.linalg.norm(o_exact, axis=-1)
    largest = jnp.linalg.norm(groups.value_mean, axis=-1) + groups.value_radius
    magnitude += largest.max(-1, initial=0)[..., None]
    # The weights of exact keys are as uncertain as their logits, whatever these weights are.
    uncertain = _slack(dtype) + rounding.max(-1, initial=0)
    bound: jax.Array = jnp.minimum(scattered, enclosed) + uncertain * magnitude
    return bound


def _mass_interval(
    q: jax.Array, groups: GroupStatistics, soft_cap: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logit of the mean key and what a group's mean weight relative to it lies between.

    Returns:
      The logit; logarithms of the least and the largest mean of e^d, d a logit minus that of the
      mean; logarithm of the largest standard deviation of e^d. All [..., R, G].
    """
    product = functools.partial(jnp.einsum, "...rh,...gh->...rg", precision=lax.Precision.HIGHEST)
    norm = jnp.linalg.norm(q, axis=-1)[..., None]
    up, down = jnp.maximum(q, 0), jnp.maximum(-q, 0)
    mean = product(q, groups.key_mean)
    deviation = jnp.minimum(
        norm * groups.key_spread[..., None, :], product(jnp.abs(q), groups.key_deviation)
    )
    others = jnp.sqrt(jnp.maximum(groups.count - 1, 0)).astype(q.dtype)[..., None, :]
    radius = jnp.minimum(norm * groups.key_radius[..., None, :], others * deviation)
    above = jnp.minimum(radius, product(up, groups.key_high) - product(down, groups.key_low))
    if soft_cap:
        below = jnp.minimum(radius, product(down, groups.key_high) - product(up, groups.key_low))
        capped = soft_cap * jnp.tanh(mean / soft_cap)
        least = soft_cap * jnp.tanh((mean - below) / soft_cap) - capped
        most = soft_cap * jnp.tanh((mean + above) / soft_cap) - capped
        # e^d lies between e^least and e^most: Popoviciu's bound on its standard deviation.
        return capped, least, most, jnp.log(jnp.expm1(jnp.maximum(most - least, 0)) / 2) + least
    variance = jnp.minimum(deviation, others * above) ** 2
    growth = jnp.logaddexp(0, _log_bennett(above, variance))
    return mean, jnp.zeros_like(mean), growth, _log_bennett(2 * above, 4 * variance) / 2


def _log_bennett(most: jax.Array, variance: jax.Array) -> jax.Array:
    """Logarithm of a bound on E e^X - 1 for E X = 0, X <= most and Var X <= variance.

    Bennett 1962; (8.6) of Hoeffding 1963 is the looser form that is used where the other one would
    be a small difference of large numbers.
    """
    small = most < _SERIES_BELOW
    r = jnp.where(small, 1, most)
    ratio = variance / r**2
    log_mean = jnp.logaddexp(-ratio * r, jnp.log(ratio) + r) - jnp.log1p(ratio)
    bennett = log_mean + jnp.log(-jnp.expm1(-log_mean))
    # e^r - 1 - r, over r^2; the last coefficient is larger than that of the series, for its tail.
    excess = jnp.where(r > 50, r, jnp.log(jnp.expm1(jnp.minimum(r, 50)) - r)) - 2 * jnp.log(r)
    series = jnp.log(1 / 2 + most * (1 / 6 + most * (1 / 24 + most / 100)))
    looser = jnp.log(variance) + jnp.where(small, series, excess)
    return jnp.where(small | (ratio < _NEGLIGIBLE), looser, bennett)


def _distances(o: jax.Array, centres: jax.Array) -> jax.Array:
    """Distances [..., R, G] of rows from centres [..., G, H], rounded upwards."""
    product = jnp.einsum("...rh,...gh->...rg", o, centres, precision=lax.Precision.HIGHEST)
    squares = (o**2).sum(-1)[..., None] + (centres**2).sum(-1)[..., None, :]
    return jnp.sqrt(jnp.maximum(squares - 2 * product, 0) + _slack(o.dtype) * squares)


def _enclosed(
    o: jax.Array,
    o_exact: jax.Array,
    z: jax.Array,
    low: jax.Array,
    high: jax.Array,
    groups: GroupStatistics,
    inexact: jax.Array,
) -> jax.Array:
    """Bound from the share of all groups together and a ball that holds all their values.

    The true output is (1 - w) o_exact + w (a point of the ball), w in an interval, and the distance
    from that is convex in w.
    """
    total_low, total_high = low.sum(-1), high.sum(-1)
    centre = _divide(_product(high, groups.value_mean), total_high[..., None], 0)
    reach = _distances(centre, groups.value_mean) + groups.value_radius[..., None, :]
    radius = jnp.where(inexact, reach, 0).max(-1, initial=0)
    bounds = []
    for total in (total_low, total_high):
        share = _divide(total, z + total, 0)
        nearest = (1 - share)[..., None] * o_exact + share[..., None] * centre
        bounds.append(jnp.linalg.norm(nearest - o, axis=-1) + share * radius)
    return jnp.maximum(*bounds)


def _product(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[..., R, G] times [..., G, H]."""
    return jnp.einsum("...rg,...gh->...rh", weights, values, precision=lax.Precision.HIGHEST)


def _divide(x: jax.Array, y: jax.Array, otherwise: float) -> jax.Array:
    """The quotient, and `otherwise` where y is 0 or has lost digits to underflow."""
    safe = y > jnp.finfo(y.dtype).tiny / _slack(y.dtype)
    return jnp.where(safe, x / jnp.where(safe, y, 1), otherwise)


def _slack(dtype: Any) -> float:
    """What rounding may have taken from a bound, relative to its terms."""
    return 32 * float(jnp.finfo(dtype).eps)
