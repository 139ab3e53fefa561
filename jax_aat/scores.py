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
from jax import lax

from jax_aat.boundary import Boundary
from jax_aat.levels import GRANULE, SUPER_TILE, Grid
from jax_aat.problem import Operands, Options, Slot
from jax_aat.pyramid import Blocks

SUB_QUERY = 16
"""Positions of a sub-query in stage 1."""
FINE = 4
"""Positions of a sub-query in stage 2, and keys of a part of a granule."""
_LARGEST_VARIANCE = 2.0


@dataclasses.dataclass(frozen=True)
class Queries:
    """Sub-queries; A of 16 positions a tile, each of F finer ones.

    Attributes:
      mean: Of queries times scale, [I, B, L, A, F, H].
      square: Mean square of each component, likewise.
      weight: Share of the positions that are queries, [I, B, L, A, F].
    """

    mean: jax.Array
    square: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, operands: Operands, options: Options, grid: Grid) -> "Queries":
        """Sub-queries of all tiles."""
        q = operands[Slot.Q].astype(jnp.float32) * options.scale
        batch, _, _, head_dim = q.shape
        size = min(SUB_QUERY, grid.positions)
        fine = min(FINE, size)
        whole = grid.tiles * grid.positions
        q = jnp.pad(q, ((0, 0), (0, whole - grid.queries), (0, 0), (0, 0)))
        position = jnp.arange(whole)
        valid = (position < grid.queries)[None]
        if Slot.Q_LENGTHS in operands:
            valid &= position < operands[Slot.Q_LENGTHS][:, None]
        valid = jnp.broadcast_to(valid, (batch, whole))
        q = jnp.where(valid[..., None, None], q, 0)
        cut = (batch, grid.tiles, grid.positions // size, size // fine, fine)
        count = valid.reshape(cut).sum(-1).astype(jnp.float32)[..., None, None]
        parts = q.reshape(*cut, grid.lists, grid.tile_heads, head_dim)
        mean, square = (
            cls._ordered(x.sum(4) / jnp.maximum(count, 1)[..., None])
            for x in (parts, jnp.square(parts))
        )
        weight = jnp.broadcast_to(count / fine, (*cut[:-1], grid.lists, grid.tile_heads))
        return cls(mean, square, cls._ordered(weight[..., None])[..., 0])

    @staticmethod
    def _ordered(x: jax.Array) -> jax.Array:
        """[B, I, blocks, F, L, G, H] as [I, B, L, blocks * G, F, H]."""
        x = jnp.transpose(x, (1, 0, 4, 2, 5, 3, 6))
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    def at(self, tiles: jax.Array) -> "Queries":
        """Those of some tiles, with the batch axis first: [B, L, n, A, F, ...]."""
        return Queries(
            *(jnp.moveaxis(x[tiles], 0, 2) for x in (self.mean, self.square, self.weight))
        )


@dataclasses.dataclass(frozen=True)
class Keys:
    """Statistics of keys and values, [B, K, granules, ...], float32.

    Attributes:
      mean: Of the keys of a granule.
      variance: Of each component.
      fine_mean: Of each 4 keys, [B, K, granules, 4, H].
      fine_variance: Likewise.
      log_count: Logarithm of the number of keys, [B or 1, granules].
      fine_log_count: Of each 4 keys, [B or 1, granules, 4]; -inf where there are none.
      super_mean: Mean of the keys of super-tiles, [B, K, super-tiles, H].
      scatter: Mean squared distance of values from their granule's mean, over their mean square.
      apart: Squared distance of a granule's mean value from its super-tile's, over the same.
      size: Mean squared value of a granule, over the same.
    """

    mean: jax.Array
    variance: jax.Array
    fine_mean: jax.Array
    fine_variance: jax.Array
    log_count: jax.Array
    fine_log_count: jax.Array
    super_mean: jax.Array
    scatter: jax.Array
    apart: jax.Array
    size: jax.Array

    @classmethod
    def of(cls, operands: Operands, grid: Grid) -> "Keys":
        """Statistics of all keys and values."""
        lengths = operands.get(Slot.KV_LENGTHS)
        k, v = (operands[slot].astype(jnp.float32) for slot in (Slot.K, Slot.V))
        granules, fine = Blocks.of(k, GRANULE, lengths), Blocks.of(k, FINE, lengths)
        values, super_values = Blocks.of(v, GRANULE, lengths), Blocks.of(v, SUPER_TILE, lengths)

        def by_head(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 2, 1)

        def in_granules(x: jax.Array) -> jax.Array:
            parts = GRANULE // FINE
            missing = grid.granules * parts - x.shape[1]
            x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
            return x.reshape(x.shape[0], grid.granules, parts, *x.shape[2:])

        square = values.variance.sum(-1) + jnp.square(values.mean).sum(-1)
        count = granules.count[..., None]
        total = (square * count).sum(1, keepdims=True) / jnp.maximum(count.sum(1, keepdims=True), 1)
        unit = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        apart = jnp.square(values.mean - super_values.mean[:, grid.super_tile_of]).sum(-1)
        return cls(
            mean=by_head(granules.mean),
            variance=by_head(granules.variance),
            fine_mean=jnp.moveaxis(in_granules(fine.mean), 3, 1),
            fine_variance=jnp.moveaxis(in_granules(fine.variance), 3, 1),
            log_count=jnp.log(jnp.maximum(granules.count, 1)),
            fine_log_count=jnp.log(in_granules(fine.count)),
            super_mean=by_head(Blocks.of(k, SUPER_TILE, lengths).mean),
            scatter=by_head(values.variance.sum(-1) / unit),
            apart=by_head(apart / unit),
            size=by_head(square / unit),
        )


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


def predict(
    queries: Queries,
    keys: Keys,
    boundary: Boundary,
    operands: Operands,
    options: Options,
    grid: Grid,
    tiles: jax.Array,
    candidates: float,
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
    """
    share = jnp.maximum(queries.weight.sum(-1, keepdims=True), 1e-6)
    part = (queries.weight / share)[..., None]
    # One sum of both: XLA's CPU backend (JAX 0.10.2) crashes under vmap on two that it fuses.
    mean, square = (jnp.stack([queries.mean, queries.square]) * part).sum(-2)
    weight = share[..., 0]
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)  # [B, L, n, A]

    logit, slope = _capped(_scores(mean, keys.mean, grid), options)
    variance = _scores(square, keys.variance, grid) * slope
    log_mass = logit + variance / 2 + keys.log_count[:, None, None, None]
    bias = _bias(operands, grid, tiles)
    if bias is not None:
        log_mass += bias
    log_mass = jnp.where(boundary.seen[..., None, :], log_mass, -jnp.inf)
    squares = jnp.square(_softmax(log_mass))
    importance = _over_queries(squares, weight)
    if candidates:
        seen = boundary.seen.sum(-1, keepdims=True)
        most = math.ceil(candidates * grid.granules)
        candidate = lax.top_k(jnp.where(boundary.seen, importance, -1.0), most)[1]
        # Those that a tile has fewer of point past the last granule.
        candidate = jnp.where(
            jnp.arange(most) < jnp.ceil(candidates * seen), candidate, grid.granules
        )
        squares = _refined(queries, keys, log_mass, bias, candidate, options, grid)
        importance = _over_queries(squares, weight)

    to_super = _scores(mean, keys.super_mean, grid)
    to_super = _capped(to_super, options)[0][..., grid.super_tile_of]
    spread = variance + jnp.square(logit - to_super)
    by_list = (x[:, :, None] for x in (keys.scatter, keys.apart, keys.size))
    scatter, apart, size = (jnp.repeat(x, grid.lists_per_kv_head, axis=1) for x in by_list)
    return Errors(
        _over_queries(squares * _relative_variance(variance), weight) * scatter,
        _over_queries(squares * _relative_variance(spread), weight) * (scatter + apart),
        importance * size,
        importance,
    )


def _refined(
    queries: Queries,
    keys: Keys,
    log_mass: jax.Array,
    bias: jax.Array | None,
    candidate: jax.Array,
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
    fine = _log_sum(fine)  # [B, L, n, A, F, C]
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
    rest = _log_sum(jnp.where(is_candidate[..., None, :], -jnp.inf, log_mass))
    total = jnp.logaddexp(rest[..., None], _log_sum(fine))  # [B, L, n, A, F]
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


def _scores(queries: jax.Array, keys: jax.Array, grid: Grid) -> jax.Array:
    """Products of [B, L, n, A, H] with [B, K, rows, H]: [B, L, n, A, rows]."""
    shape = queries.shape
    grouped = queries.reshape(shape[0], grid.kv_heads, grid.lists_per_kv_head, *shape[2:])
    scores = _product("bklnah,bkgh->bklnag", grouped, keys)
    return scores.reshape(*shape[:-1], keys.shape[2])


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


def _over_queries(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of [B, L, n, A, granules] over sub-queries."""
    return jnp.einsum("blnag,blna->blng", x, weight, precision=lax.Precision.HIGHEST)


def _relative_variance(z: jax.Array) -> jax.Array:
    """That of exp(x) where x has variance z; bounded, as the model fails for large z."""
    return jnp.expm1(jnp.minimum(z, _LARGEST_VARIANCE))


def _softmax(x: jax.Array) -> jax.Array:
    """Softmax along the last axis; 0 where all is -inf."""
    total = _log_sum(x)
    return jnp.exp(x - jnp.where(total == -jnp.inf, 0, total)[..., None])


def _log_sum(x: jax.Array) -> jax.Array:
    """Logarithm of the sum of exp along the last axis."""
    largest = x.max(-1)
    shift = jnp.where(largest == -jnp.inf, 0, largest)
    return shift + jnp.log(jnp.exp(x - shift[..., None]).sum(-1))


def subqueries(grid: Grid) -> tuple[int, int]:
    """Sub-queries of a tile in stage 1 and in stage 2."""
    size = min(SUB_QUERY, grid.positions)
    coarse = math.ceil(grid.positions / size) * grid.tile_heads
    return coarse, coarse * (size // min(FINE, size))
