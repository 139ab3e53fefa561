"""The router's cascade: how much squared error each coarse level of each granule is to cost.

A sub-query stands for 16 positions of one head, by the mean and the mean square of its queries. In
stage 1 it scores every granule by the mean and variance of its keys; in stage 2 sub-queries of 4
positions score the foremost granules again, by means and variances of 4 keys each. Under a
log-normal model of the keys inside a granule (exp of a logit x with variance z has relative
variance expm1(z)) the squares of the probabilities give the errors.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_aat.boundary import Boundary
from jax_aat.levels import GRANULE, Grid
from jax_aat.problem import Operands, Options, Slot
from jax_aat.summaries import SUB_QUERY, Keys, Queries

_LARGEST_VARIANCE = 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Errors:
    """What the router predicts of granules, each [B, L, n, granules] float32.

    Attributes:
      mean: Squared error of level 1 in units of the mean squared norm of a value.
      super_mean: That of level 2.
      skipped: That of leaving the granule out.
      importance: Mean squared probability.
    """

    mean: jax.Array
    super_mean: jax.Array
    skipped: jax.Array
    importance: jax.Array


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """What tiles see besides the granules that are judged, and where these lie.

    Attributes:
      log_mass: Logarithm of the mass of those others, [B, L, n, A].
      seen: How many of them a tile sees, [B, L, n, 1].
      granules: How many there are.
      super_rows: Row of `Keys.super_mean` of each granule that is judged.
    """

    log_mass: jax.Array
    seen: jax.Array
    granules: int
    super_rows: np.ndarray[tuple[int], np.dtype[np.int32]]


def predict(
    queries: Queries,
    keys: Keys,
    boundary: Boundary,
    operands: Operands,
    options: Options,
    grid: Grid,
    tiles: jax.Array,
    candidates: float,
    elsewhere: Elsewhere | None = None,
) -> Errors:
    """Predicts errors for some tiles.

    Args:
      queries: Those of these tiles, see `Queries.at`.
      keys: All.
      boundary: That of these tiles.
      operands: Those of the call, for its bias.
      options: Those of the call.
      grid: How the call is cut.
      tiles: Indices of the tiles, [n].
      candidates: Share of the granules that a tile sees that stage 2 looks at; 0: there is none.
      elsewhere: What they see besides these keys; None: nothing.
    """
    mean, square, weight = mean_queries(queries)
    if elsewhere is None:
        none, nothing = jnp.full(weight.shape, -jnp.inf), jnp.zeros((), jnp.int32)
        elsewhere = Elsewhere(none, nothing, 0, grid.super_tile_of)
    outside = elsewhere.log_mass
    logit, slope = scores(mean, keys.mean, grid, options)
    variance = scores(square, keys.variance, grid)[0] * slope
    log_mass = logit + variance / 2 + keys.log_count[:, None, None, None]
    bias = _bias(operands, grid, tiles)
    if bias is not None:
        log_mass += bias
    log_mass = jnp.where(boundary.seen[..., None, :], log_mass, -jnp.inf)
    squares = jnp.square(softmax(log_mass, outside))
    importance = over_queries(squares, weight)
    if candidates:
        seen = boundary.seen.sum(-1, keepdims=True)
        most = math.ceil(candidates * (grid.granules + elsewhere.granules))
        most = min(most, grid.granules)
        candidate = lax.top_k(jnp.where(boundary.seen, importance, -1.0), most)[1]
        # Those that a tile has fewer of point past the last granule.
        wanted = jnp.minimum(jnp.ceil(candidates * (seen + elsewhere.seen)), seen)
        candidate = jnp.where(jnp.arange(most) < wanted, candidate, grid.granules)
        squares = _refined(queries, keys, log_mass, bias, candidate, outside, options, grid)
        importance = over_queries(squares, weight)

    to_super = scores(mean, keys.super_mean, grid, options)[0][..., elsewhere.super_rows]
    spread = variance + jnp.square(logit - to_super)
    by_list = (x[:, :, None] for x in (keys.scatter, keys.apart, keys.size))
    scatter, apart, size = (jnp.repeat(x, grid.lists_per_kv_head, axis=1) for x in by_list)
    return Errors(
        over_queries(squares * _relative_variance(variance), weight) * scatter,
        over_queries(squares * _relative_variance(spread), weight) * (scatter + apart),
        importance * size,
        importance,
    )


def _refined(
    queries: Queries,
    keys: Keys,
    log_mass: jax.Array,
    bias: jax.Array | None,
    candidate: jax.Array,
    outside: jax.Array,
    options: Options,
    grid: Grid,
) -> jax.Array:
    """Squared probabilities after stage 2, meaned over finer sub-queries: [B, L, n, A, granules].

    Granules that are no candidates keep their mass of stage 1.
    """
    kv_head = (jnp.arange(grid.lists) // grid.lists_per_kv_head)[None, :, None, None]
    batch = jnp.arange(candidate.shape[0])[:, None, None, None]

    def chosen(x: jax.Array) -> jax.Array:
        return x.at[batch, kv_head, candidate].get(mode="clip")  # [B, L, n, C, 4, H]

    logit = _product("blnafh,blncph->blnafcp", queries.mean, chosen(keys.fine_mean))
    logit, slope = _capped(logit, options)
    spread = _product("blnafh,blncph->blnafcp", queries.square, chosen(keys.fine_variance))
    count = (
        jnp.broadcast_to(keys.fine_log_count, (candidate.shape[0], *keys.fine_log_count.shape[1:]))
        .at[batch, candidate]
        .get(mode="clip")
    )
    fine = logit + spread * slope / 2 + count[:, :, :, None, None]
    fine = log_sum(fine)  # [B, L, n, A, F, C]
    place = candidate[:, :, :, None]
    old = jnp.take_along_axis(log_mass, place, axis=-1, mode="fill", fill_value=-jnp.inf)
    if bias is not None:
        shape = (*log_mass.shape[:-1], bias.shape[-1])
        at = jnp.minimum(place, bias.shape[-1] - 1)
        fine += jnp.take_along_axis(jnp.broadcast_to(bias, shape), at, axis=-1)[..., None, :]
    fine = jnp.where((old == -jnp.inf)[..., None, :], -jnp.inf, fine)

    index = tuple(jnp.ogrid[tuple(slice(size) for size in candidate.shape)])[:-1]
    is_candidate = jnp.zeros((*candidate.shape[:-1], grid.granules), bool)
    is_candidate = is_candidate.at[(*index, candidate)].set(True, mode="drop")
    rest = log_sum(jnp.where(is_candidate[..., None, :], -jnp.inf, log_mass))
    rest = jnp.logaddexp(rest, outside)
    total = jnp.logaddexp(rest[..., None], log_sum(fine))  # [B, L, n, A, F]
    # A finer sub-query without queries is 0 times everything: its parent's weight has left it out.
    part = queries.weight / jnp.maximum(queries.weight.sum(-1, keepdims=True), 1e-6)
    total = jnp.where(total == -jnp.inf, 0, total)
    # The mean over finer sub-queries of exp(2 (x - total)), where x is the same for all of them.
    lowest = total.min(-1, keepdims=True)
    shift = (
        lowest
        - jnp.log(jnp.maximum((part * jnp.exp(2 * (lowest - total))).sum(-1, keepdims=True), 1e-30))
        / 2
    )
    squares = jnp.exp(2 * (log_mass - shift))
    refined = (part[..., None] * jnp.exp(2 * (fine - total[..., None]))).sum(-2)
    heads = jnp.arange(log_mass.shape[3])[None, None, None, :, None]
    where = (*(x[..., None] for x in index), heads, place)
    return squares.at[where].set(refined, mode="drop")


def mean_queries(queries: Queries) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and mean square [B, L, n, A, H] of stage 1, and its weights in a tile [B, L, n, A]."""
    weight = queries.weight.sum(-1)
    part = (queries.weight / jnp.maximum(weight[..., None], 1e-6))[..., None]
    # One sum of both: XLA's CPU backend (JAX 0.10.2) crashes under vmap on two that it fuses.
    mean, square = (jnp.stack([queries.mean, queries.square]) * part).sum(-2)
    return mean, square, weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)


def scores(
    queries: jax.Array, keys: jax.Array, grid: Grid, capped: Options | None = None
) -> tuple[jax.Array, jax.Array | float]:
    """Products of [B, L, n, A, H] with [B, K, rows, H]: [B, L, n, A, rows].

    Args:
      queries: Means of queries, or of their squares.
      keys: Means of keys, or their variances.
      grid: How the call is cut.
      capped: Options whose soft cap bends the products.

    Returns:
      The products, and the square of the slope of the soft cap.
    """
    shape = queries.shape
    grouped = queries.reshape(shape[0], grid.kv_heads, grid.lists_per_kv_head, *shape[2:])
    products = _product("bklnah,bkgh->bklnag", grouped, keys)
    products = products.reshape(*shape[:-1], keys.shape[2])
    return (products, 1.0) if capped is None else _capped(products, capped)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


def _capped(logit: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | float]:
    """Logits after the soft cap, and the square of its slope, by which variances shrink."""
    if not options.soft_cap:
        return logit, 1.0
    bent = jnp.tanh(logit / options.soft_cap)
    return options.soft_cap * bent, jnp.square(1 - jnp.square(bent))


def _bias(operands: Operands, grid: Grid, tiles: jax.Array) -> jax.Array | None:
    """Mean bias of sub-query and granule, broadcasts to [B, L, n, A, granules]."""
    if Slot.BIAS not in operands:
        return None
    bias = operands[Slot.BIAS].astype(jnp.float32)
    size = min(SUB_QUERY, grid.positions)
    blocks = grid.positions // size
    if bias.shape[-1] != 1:
        bias = _meaned(bias, 3, GRANULE)
    if bias.shape[2] != 1:
        bias = _meaned(bias, 2, size)
        missing = grid.tiles * blocks - bias.shape[2]
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, missing), (0, 0)))
        bias = bias.reshape(*bias.shape[:2], grid.tiles, blocks, -1)[:, :, tiles]
    else:
        bias = bias[:, :, :, None]
    if bias.shape[1] == 1:
        bias = bias[:, :, None]
    else:
        bias = bias.reshape(bias.shape[0], grid.lists, grid.tile_heads, *bias.shape[2:])
    # [B, L, G, n, blocks, granules] to [B, L, n, blocks * G, granules].
    bias = jnp.moveaxis(bias, 2, 4)
    shape = (*bias.shape[:3], blocks, grid.tile_heads, bias.shape[-1])
    return jnp.broadcast_to(bias, shape).reshape(*shape[:3], -1, shape[-1])


def _meaned(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Means of every `size` neighbours; of what is left at the end."""
    count = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, padding, mode="edge")
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]).mean(axis + 1)


def over_queries(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of [B, L, n, A, granules] over sub-queries."""
    return jnp.einsum("blnag,blna->blng", x, weight, precision=lax.Precision.HIGHEST)


def _relative_variance(z: jax.Array) -> jax.Array:
    """That of exp(x) where x has variance z; bounded, as the model fails for large z."""
    return jnp.expm1(jnp.minimum(z, _LARGEST_VARIANCE))


def softmax(x: jax.Array, outside: jax.Array | None = None) -> jax.Array:
    """Softmax along the last axis and a logit `outside` of it; 0 where all is -inf."""
    total = log_sum(x)
    if outside is not None:
        total = jnp.logaddexp(total, outside)
    return jnp.exp(x - jnp.where(total == -jnp.inf, 0, total)[..., None])


def log_sum(x: jax.Array) -> jax.Array:
    """Logarithm of the sum of exp along the last axis."""
    largest = x.max(-1)
    shift = jnp.where(largest == -jnp.inf, 0, largest)
    return shift + jnp.log(jnp.exp(x - shift[..., None]).sum(-1))
