"""The router: chooses the level of every granule of every tile by one price of a row, lambda.

The level of a granule is the one of least predicted error + lambda * rows read. A granule stops
being exact where lambda passes one break-even price, and stops having a row of its own where it
passes another; both are kept as the upper half of their float32, so that the search for the lambda
that spends a budget is exact and gives the same bits everywhere.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, use_abstract_mesh

from jax_aat._compat import vary_like
from jax_aat.adaptation import Adaptation, grid_of
from jax_aat.boundary import boundary
from jax_aat.hierarchy import judged_key_tiles, predict_foremost
from jax_aat.levels import (
    EXACT,
    GRANULE,
    HIDDEN,
    KEY_TILE,
    MEAN,
    SUPER_MEAN,
    Grid,
    pack_levels,
    settled,
    unpack_levels,
    without_means,
)
from jax_aat.lists import Capacity
from jax_aat.problem import Operands, Options, Slot, counted
from jax_aat.scores import predict
from jax_aat.summaries import FINE, Keys, Queries, subqueries
from jax_aat.visible_pairs import dense_flops, hidden_rows, visible_keys

CANDIDATES = 2.0
"""Stage 2 looks at this many times the budget of the granules, tiles of a long sequence look into
as many key tiles."""
FLOOR = 0.25
"""This share of the budget of the granules, the most important ones of a tile, is exact."""
NEAR = 0.5
"""Besides these, in causal and masked calls, this share of their number: the nearest before a
tile."""
NOMINAL = 0.125
"""What counts as budget in these where none is given."""
_LEAST_CANDIDATES = 0.0625
_STATE_SHARE = 0.25
"""The state may take this share of the budget."""
MARGIN = 1.2
"""A level changes only where it would at a price this much less or more as well."""
_CHUNK = 2**22
"""Elements that the largest array of a chunk of tiles may have."""
_COPIES = 2**25
"""The same where summaries are copied for each tile, so that there are not too many chunks."""
_PART = 1024
"""Rows are counted by so many, and the rest of them."""
_KEPT = 0x6F00
"""The upper half of 2^95, a price that no error reaches."""
_INFINITE = 0x7F80
"""The upper half of an infinite float32."""


def route(
    operands: Operands,
    options: Options,
    grid: Grid,
    adaptation: Adaptation,
    log_lambda: jax.Array | None = None,
    previous: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses levels.

    Args:
      operands: Those of the call, with one batch axis [B].
      options: Those of the call.
      grid: How the call is cut.
      adaptation: What to aim at.
      log_lambda: With a tolerance, the price to use, broadcasts to [B, L]; natural logarithm.
      previous: Levels of the last call, [B, L, I, W]; without a budget, which it could exceed, they
        change only where a price `MARGIN` times less or more would change them too.

    Returns:
      Levels [B, L, I, W] uint32 and the natural logarithm of lambda, [B, L] float32.
    """
    operands = {
        slot: lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for slot, x in operands.items()
    }
    shape = (operands[Slot.Q].shape[0], grid.lists)
    whole = boundary(operands, options, grid)
    if is_exact(adaptation):
        level = jnp.full((*shape, grid.tiles, grid.granules), EXACT)
        return pack_levels(whole.applied(level)), jnp.full(shape, -jnp.inf, jnp.float32)
    prices = break_even(operands, options, grid, adaptation)
    goal = goal_of(operands, options, grid, adaptation, log_lambda, previous)
    levels, price = levels_at(prices, operands | goal, options, grid, adaptation)
    return levels, jnp.log(price)


def goal_of(
    operands: Operands,
    options: Options,
    grid: Grid,
    adaptation: Adaptation,
    log_lambda: jax.Array | None,
    previous: jax.Array | None,
) -> Operands:
    """What decides, together with prices, on levels; arguments as those of `route`.

    Returns:
      With a budget SPARE_ROWS, else LAMBDA and, where there are some, PREVIOUS_LEVELS.
    """
    if adaptation.budget is not None:
        return {Slot.SPARE_ROWS: _spare_rows_of_call(operands, options, grid, adaptation)}
    if adaptation.threshold is not None:
        price = jnp.float32(adaptation.threshold)
    elif log_lambda is None:
        raise ValueError("tolerance: got no state, expected one that holds lambda")
    else:
        price = jnp.exp(jnp.asarray(log_lambda, jnp.float32))
    shape = (operands[Slot.Q].shape[0], grid.lists)
    goal = {Slot.LAMBDA: jnp.broadcast_to(price, shape)}
    if previous is None:
        return goal
    if MEAN not in adaptation.levels:
        # A state of other levels knows means, which lie between those in use.
        previous = without_means(previous)
    return goal | {Slot.PREVIOUS_LEVELS: previous}


def levels_at(
    prices: jax.Array, operands: Operands, options: Options, grid: Grid, adaptation: Adaptation
) -> tuple[jax.Array, jax.Array]:
    """Levels by prices.

    Args:
      prices: As `break_even` gives them.
      operands: Those of the call, with one batch axis [B], and what `goal_of` gives.
      options: Those of the call.
      grid: How the call is cut.
      adaptation: Which levels are in use.

    Returns:
      Levels [B, L, I, W] uint32, and lambda as it was used, [B, L] float32.
    """
    leaves_exact, leaves_mean = prices >> 16, prices & 0xFFFF
    if Slot.SPARE_ROWS in operands:
        price = _price_of(operands[Slot.SPARE_ROWS], leaves_exact, leaves_mean)[:, None]
        price = jnp.broadcast_to(price, prices.shape[:2])
        value = lax.bitcast_convert_type(price << 16, jnp.float32)
    else:
        value = used(operands[Slot.LAMBDA])
        price = _upper_half(value)
    coarse = MEAN if MEAN in adaptation.levels else HIDDEN

    def level_at(price: jax.Array) -> jax.Array:
        at = price[..., None, None]
        level = jnp.where(leaves_exact >= at, EXACT, coarse)
        if SUPER_MEAN in adaptation.levels:
            level = jnp.where((level == MEAN) & (leaves_mean < at), SUPER_MEAN, level)
        return level

    level = level_at(price)
    if Slot.PREVIOUS_LEVELS in operands:
        finer, coarser = (level_at(_upper_half(value * x)) for x in (1 / MARGIN, MARGIN))
        previous = unpack_levels(operands[Slot.PREVIOUS_LEVELS], grid.granules)
        level = settled(finer, level, coarser, previous)
    whole = boundary(operands, options, grid)
    return pack_levels(whole.applied(level, drops=coarse == HIDDEN)), value


def break_even(
    operands: Operands, options: Options, grid: Grid, adaptation: Adaptation
) -> jax.Array:
    """Prices at which granules stop being exact, and stop having their own row.

    Returns:
      The upper half of the first in the upper half, that of the second in the lower half of uint32
      [B, L, I, granules]; 0 where nothing is seen.
    """
    queries, keys = Queries.of(operands, options, grid), Keys.of(operands, grid)
    candidates = candidate_share(adaptation, options, grid)
    most = math.ceil(floor_share(adaptation) * grid.granules)
    judged = judged_key_tiles(operands, grid, judged_share(adaptation))
    split = keys.by_key_tile(grid) if judged < grid.key_tiles else None

    def of_tiles(tiles: jax.Array) -> jax.Array:
        bounds = boundary(operands, options, grid, tiles)
        of_these = queries.at(tiles)
        seen = bounds.seen.sum(-1, keepdims=True)
        near = _near(tiles, seen, operands, options, grid, adaptation)
        if split is not None:
            errors, looked_into = predict_foremost(
                of_these, keys, split, bounds, near, options, grid, candidates, judged
            )
            near &= looked_into
        else:
            errors = predict(of_these, keys, bounds, operands, options, grid, tiles, candidates)
        if MEAN not in adaptation.levels:
            exact, mean = errors.skipped / GRANULE, jnp.zeros_like(errors.skipped)
        else:
            exact, mean = errors.mean / (GRANULE - 1), jnp.full_like(errors.mean, jnp.inf)
        if SUPER_MEAN in adaptation.levels:
            least = jnp.minimum(exact, errors.super_mean / GRANULE)
            exact = jnp.where(bounds.super_whole, least, exact)
            mean = errors.super_mean - errors.mean
        # The most important granules are exact, and the nearest.
        count = jnp.ceil(floor_share(adaptation) * seen).astype(jnp.int32)
        best = lax.top_k(jnp.where(bounds.seen, errors.importance, -1.0), most)[0]
        count = jnp.broadcast_to(count, (*best.shape[:-1], 1))
        least_best = jnp.take_along_axis(best, jnp.clip(count - 1, 0, most - 1), axis=-1)
        # At any that errors explain; beyond, where a budget leaves no room, in their order.
        kept = (errors.importance >= least_best) | near
        exact = _finite_price(exact)
        exact = jnp.where(kept, _KEPT + (exact >> 3), exact)
        exact = jnp.where(bounds.whole, exact, _INFINITE)
        if SUPER_MEAN in adaptation.levels:
            mean = jnp.where(bounds.super_whole, _finite_price(mean), _INFINITE)
        else:
            mean = _upper_half(mean)

        prices = exact << 16 | mean
        return jnp.moveaxis(jnp.where(bounds.seen, prices, 0), 2, 0)

    shape = (counted(operands[Slot.Q].shape[0]), grid.lists, subqueries(grid)[0])
    # Stage 2 has 4 finer sub-queries for each one, and 4 parts of each granule.
    a_tile, chunk = math.ceil(math.prod(shape) * grid.granules * max(1, 16 * candidates)), _CHUNK
    if judged < grid.key_tiles:
        # Summaries are copied for each tile.
        granule = operands[Slot.Q].shape[-1] * (2 + 2 * GRANULE // FINE)
        a_tile = math.prod(shape[:2]) * judged * KEY_TILE // GRANULE * granule
        chunk = _COPIES
    size = max(1, min(grid.tiles, chunk // a_tile))
    chunks = -(-grid.tiles // size)
    tiles = jnp.minimum(jnp.arange(chunks * size), grid.tiles - 1).reshape(chunks, size)
    found = lax.map(of_tiles, tiles)
    joined = found.reshape(-1, *found.shape[2:])[: grid.tiles]
    return jnp.moveaxis(joined, 0, 2)


def candidate_share(adaptation: Adaptation, options: Options, grid: Grid) -> float:
    """Share of the granules that a tile sees that stage 2 looks at."""
    stages = adaptation.stages_for(grid.keys, options.causal)
    return 0.0 if stages == 1 else judged_share(adaptation)


def judged_share(adaptation: Adaptation) -> float:
    """Share of the key tiles of a long sequence that a tile looks into, at least."""
    return min(1.0, max(CANDIDATES * (adaptation.budget or NOMINAL), _LEAST_CANDIDATES))


def floor_share(adaptation: Adaptation) -> float:
    """Share of the granules that a tile sees that is exact."""
    return FLOOR * (adaptation.budget or NOMINAL)


def _near(
    tiles: jax.Array,
    seen: jax.Array,
    operands: Operands,
    options: Options,
    grid: Grid,
    adaptation: Adaptation,
) -> jax.Array:
    """Which granules a tile keeps exact because they lie just before it, [..., n, granules].

    Means say the least of neighbours: RoPE turns some features by a radian a position. A mask may
    be a causal one.
    """
    if not options.causal and Slot.MASK not in operands:
        return jnp.zeros((tiles.shape[0], grid.granules), bool)
    before = jnp.ceil(NEAR * floor_share(adaptation) * seen).astype(jnp.int32)
    first = tiles[:, None] * grid.positions
    own, last = first // GRANULE, (first + grid.positions - 1) // GRANULE
    granule = jnp.arange(grid.granules)
    return (granule >= own - before) & (granule <= last)


def used(price: jax.Array) -> jax.Array:
    """A price as it is used, which is by its upper half; what is below 0 counts as 0."""
    return lax.bitcast_convert_type(_upper_half(price) << 16, jnp.float32)


def _price_of(spare: jax.Array, leaves_exact: jax.Array, leaves_mean: jax.Array) -> jax.Array:
    """The least price, as upper half, at which all tiles read at most `spare` rows: [B]."""
    # Counted without rounding, in two parts that cannot overflow.
    limit = jnp.maximum(jnp.floor(spare), -1)
    limit_high = jnp.floor(limit / _PART)
    limit_low = (limit - limit_high * _PART).astype(jnp.uint32)
    limit_high = jnp.clip(limit_high, -1, 2**30).astype(jnp.int32)

    def fits(price: jax.Array) -> jax.Array:
        at = price[:, None, None, None]
        exact, listed = leaves_exact >= at, leaves_mean >= at
        read = jnp.where(exact, GRANULE, jnp.where(listed, 1, 0)).sum(-1, dtype=jnp.uint32)
        high, low = (x.sum((1, 2), dtype=jnp.uint32) for x in (read // _PART, read % _PART))
        high, low = (high + low // _PART).astype(jnp.int32), low % _PART
        return (high < limit_high) | ((high == limit_high) & (low <= limit_low))

    def halved(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        fit = fits(middle)
        return jnp.where(fit, low, middle), jnp.where(fit, middle, high)

    shape = spare.shape
    known = (spare, leaves_exact, leaves_mean)
    low, high = (vary_like(jnp.full(shape, x, jnp.uint32), known) for x in (0, _INFINITE))
    _, price = lax.fori_loop(0, 15, halved, (low, high))
    return jnp.asarray(price)


def _upper_half(x: jax.Array) -> jax.Array:
    """The upper half of float32 numbers, of which those below 0 count as 0: uint32, ordered."""
    bits = lax.bitcast_convert_type(jnp.maximum(x, 0).astype(jnp.float32), jnp.uint32)
    return jnp.right_shift(bits, 16)


def _finite_price(x: jax.Array) -> jax.Array:
    """The upper half of a price; of any that is not finite the largest that is.

    So nothing but the boundary makes a tile read more than a budget allows.
    """
    return jnp.minimum(_upper_half(x), _INFINITE - 1)


def _spare_rows_of_call(
    operands: Operands, options: Options, grid: Grid, adaptation: Adaptation
) -> jax.Array:
    """`_spare_rows`, while the call is traced where shapes alone decide."""
    if not _shapes_decide(operands):
        return _spare_rows(operands, options, grid, adaptation)
    head_dim = operands[Slot.Q].shape[-1]
    rows = _rows_by_shape(head_dim, operands[Slot.Q].dtype, options, grid, adaptation)
    return jnp.full(operands[Slot.Q].shape[:1], rows[0], jnp.float32)


def list_capacity(operands: Operands, options: Options, grid: Grid, adaptation: Adaptation) -> int:
    """Entries that each list of a batch entry needs on average, if they follow each other.

    There is room for all that causality and window let tiles see and, with a budget that shapes
    alone decide, for no more granules than it lets them read. What shaders cannot count they
    refuse.
    """
    capacity = Capacity.of(grid, options.causal, options.window)
    entries = capacity.entries
    if adaptation.budget is not None and _shapes_decide(operands):
        head_dim, dtype = operands[Slot.Q].shape[-1], operands[Slot.Q].dtype
        spare, exact, read = _rows_by_shape(head_dim, dtype, options, grid, adaptation)
        granules = max(spare - (GRANULE - 1) * exact, read) / grid.lists
        entries -= capacity.granules - min(capacity.granules, math.ceil(granules))
    return min(entries, 2**32 - 1)


def _shapes_decide(operands: Operands) -> bool:
    """Whether what a budget lets tiles read depends on shapes alone."""
    return operands.keys() - {Slot.SPARE_ROWS} == {Slot.Q, Slot.K, Slot.V}


@functools.cache
def _rows_by_shape(
    head_dim: int, dtype: Any, options: Options, grid: Grid, adaptation: Adaptation
) -> tuple[float, int, int]:
    """`_spare_rows`, and how many granules are exact, and are read at all, at any price."""
    queries = jax.ShapeDtypeStruct((1, grid.queries, grid.heads, head_dim), dtype)
    keys = jax.ShapeDtypeStruct((1, grid.keys, grid.kv_heads, head_dim), dtype)
    shapes: Any = {Slot.Q: queries, Slot.K: keys, Slot.V: keys}
    # Whatever mesh the caller has set, this belongs to none. Compiled, it runs while the caller is
    # traced: as one program, where `jax.ensure_compile_time_eval` would compile each operation.
    with jax.disable_jit(False), use_abstract_mesh(AbstractMesh((), ())):

        @jax.jit
        def rows() -> tuple[jax.Array, ...]:
            bounds = boundary(shapes, options, grid)
            exact = read = ~bounds.whole
            if MEAN in adaptation.levels:
                read |= ~bounds.super_whole if SUPER_MEAN in adaptation.levels else True
            by_tile = ((bounds.seen & x).sum(-1) for x in (exact, read))
            return _spare_rows(shapes, options, grid, adaptation)[0], *by_tile

        spare, *by_tile = rows.lower().compile()()
        # All tiles together may read more than 32 bits count.
        shape = (grid.lists, grid.tiles)
        exact, read = (np.broadcast_to(x, (1, *shape)).sum(dtype=np.int64) for x in by_tile)
        return float(spare), int(exact), int(read)


def _spare_rows(
    operands: Operands, options: Options, grid: Grid, adaptation: Adaptation
) -> jax.Array:
    """Rows that the tiles of a batch entry may read by the budget, planning deducted: [B]."""
    assert adaptation.budget is not None
    dense = dense_flops(operands, options, grid)
    planned = planning_flops(operands, options, grid, adaptation)
    a_row = 4 * operands[Slot.Q].shape[-1] * grid.query_tile
    spare = jnp.maximum(adaptation.budget * dense - planned, 0) / a_row
    spare += hidden_rows(operands, options, grid)
    if SUPER_MEAN in adaptation.levels:
        # Every tile may read a row of each super-tile that it sees.
        seen = boundary(operands, options, grid).seen
        seen = jnp.broadcast_to(seen, (*spare.shape, grid.lists, *seen.shape[-2:]))
        spare -= grid.by_super_tile(seen).any(-1).sum((1, 2, 3)).astype(jnp.float32)
    return spare


def is_exact(adaptation: Adaptation) -> bool:
    """Whether everything is to be exact, so that there is nothing to choose."""
    return adaptation.budget == 1 or adaptation.threshold == 0


def state_flops(operands: Operands, grid: Grid) -> float:
    """FLOPs of the state and of the correction by it, of one batch entry."""
    head_dim = operands[Slot.Q].shape[-1]
    queries, keys = grid.heads * grid.queries, grid.kv_heads * grid.keys
    return 2.0 * head_dim * head_dim * (queries + keys) + 4.0 * head_dim * queries


def has_state(operands: Operands, options: Options, adaptation: Adaptation) -> bool:
    """Whether coarse rows are corrected by the state.

    The state is a mean over all keys before a super-tile, so it would tell of keys that a window, a
    mask or segments hide. It is linear in the length: for short sequences it would take too much of
    the budget.
    """
    if Slot.MASK in operands or Slot.Q_SEGMENTS in operands or options.window != (-1, -1):
        return False
    if SUPER_MEAN not in adaptation.levels or is_exact(adaptation):
        return False
    grid = grid_of(operands, adaptation)
    pairs = grid.queries * grid.keys
    if options.causal:
        shorter = min(grid.queries, grid.keys)
        pairs = shorter * (shorter + 1) // 2 + (grid.queries - shorter) * grid.keys
    a_pair = 4 * operands[Slot.Q].shape[-1] * grid.heads
    allowed = _STATE_SHARE * (adaptation.budget or NOMINAL) * a_pair
    return state_flops(operands, grid) <= allowed * pairs


def means_flops(operands: Operands, options: Options, adaptation: Adaptation) -> float:
    """FLOPs of coarse rows and state, of one batch entry: what a call with a given plan makes."""
    grid = grid_of(operands, adaptation)
    state = state_flops(operands, grid) if has_state(operands, options, adaptation) else 0.0
    return 4.0 * operands[Slot.Q].shape[-1] * grid.kv_heads * grid.keys + state


def planning_flops(
    operands: Operands, options: Options, grid: Grid, adaptation: Adaptation
) -> jax.Array:
    """FLOPs of a call besides those of the rows that it reads, by batch entry: [B] float32.

    Those of summaries, of key tiles, of both stages, of the state and of the correction by it.
    """
    head_dim = operands[Slot.Q].shape[-1]
    queries, keys = grid.heads * grid.queries, grid.kv_heads * grid.keys
    summaries = 8.0 * head_dim * (queries + 2 * keys)
    if is_exact(adaptation):
        return jnp.full(operands[Slot.Q].shape[:1], float(summaries))
    state = state_flops(operands, grid) if has_state(operands, options, adaptation) else 0
    coarse, fine = subqueries(grid)
    # A tile and a granule that it sees stand for that many pairs.
    a_pair = GRANULE * grid.query_tile
    to_super = coarse * GRANULE / grid.super_tile / 2
    candidates = candidate_share(adaptation, options, grid)
    finer = fine * (GRANULE // FINE)
    dense = dense_flops(operands, options, grid)
    judged = judged_key_tiles(operands, grid, judged_share(adaptation))
    if judged == grid.key_tiles:
        everywhere = coarse + to_super + finer * candidates
        return summaries + state + dense * (everywhere / a_pair)
    seen = visible_keys(operands, options, grid)
    share = jnp.minimum(seen, judged * KEY_TILE).sum(-1) / jnp.maximum(seen.sum(-1), 1)
    to_key_tiles = coarse * GRANULE / KEY_TILE
    stages = coarse * share + to_super + to_key_tiles + finer * candidates
    return summaries + state + dense * (stages / a_pair)
