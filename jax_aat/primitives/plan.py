"""The planning primitive: (q, k, v, ..., goal) -> levels and work lists; or prices alone."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_aat import router
from jax_aat.adaptation import Adaptation
from jax_aat.boundary import boundary
from jax_aat.hierarchy import judged_super_tiles
from jax_aat.levels import Grid
from jax_aat.lists import Capacity, pack
from jax_aat.primitives import rules
from jax_aat.primitives.partition import devices_marker
from jax_aat.problem import Operands, Options, Slot, extents

LISTS = (
    Slot.LEVELS,
    Slot.LIST_HEADERS,
    Slot.LIST_ENTRIES,
    Slot.KEY_LIST_HEADERS,
    Slot.KEY_LIST_ENTRIES,
)


def make_prices(operands: Operands, options: Options, adaptation: Adaptation) -> jax.Array:
    """The prices of all granules, by shaders: what `jax_aat.router.break_even` gives."""
    prices: jax.Array = _bind(operands, options, adaptation, (Slot.PRICES,))[0]
    return prices


def serves(operands: Operands, adaptation: Adaptation) -> bool:
    """Whether shaders plan such calls, where a Vulkan device computes them."""
    given = Slot.MASK in operands or Slot.BIAS in operands
    return not given and not router.is_exact(adaptation)


def serves_prices(operands: Operands, grid: Grid, adaptation: Adaptation) -> bool:
    """Whether shaders make the prices too: not where tiles look into super-tiles first."""
    judged = judged_super_tiles(operands, grid, router.candidate_share(adaptation))
    return judged == grid.super_tiles


def make_plan(operands: Operands, options: Options, adaptation: Adaptation) -> Operands:
    """The plan of a call, by shaders.

    Args:
      operands: Those in slots Q to KV_SEGMENTS, without bias and mask; what
        `jax_aat.router.goal_of` gives; PRICES, if they are known.
      options: Those of the call.
      adaptation: Which levels are in use and how they are judged.

    Returns:
      Levels and lists as `jax_aat.lists.pack` makes them, and LAMBDA as it was used, [*batch, L].
    """
    searched = Slot.SPARE_ROWS in operands
    wanted = (*LISTS, Slot.LAMBDA) if searched else LISTS
    results = dict(zip(wanted, _bind(operands, options, adaptation, wanted), strict=True))
    return results if searched else results | {Slot.LAMBDA: router.used(operands[Slot.LAMBDA])}


def _bind(
    operands: Operands, options: Options, adaptation: Adaptation, results: tuple[Slot, ...]
) -> list[Any]:
    options = dataclasses.replace(
        options,
        query_tile=adaptation.query_tile,
        level_count=len(adaptation.levels),
        candidate_share=router.candidate_share(adaptation),
        floor_share=router.floor_share(adaptation),
    )
    return rules.bind(
        rules.plan_p,
        operands,
        options=options,
        adaptation=adaptation,
        results=results,
        implementation="vulkan",
        needs_devices=devices_marker(),
    )


def _grid(operands: Operands, options: Options) -> Grid:
    sizes = extents(operands)
    return Grid(sizes.queries, sizes.keys, sizes.heads, sizes.kv_heads, options.query_tile)


def _result_types(
    operands: Operands, *, options: Options, results: Sequence[Slot], **_: Any
) -> dict[Slot, jax.ShapeDtypeStruct]:
    grid, batch = _grid(operands, options), extents(operands).batch
    capacity = Capacity.of(grid, options.causal, options.window)
    tiles = (grid.lists, grid.tiles)
    shapes = {
        Slot.LEVELS: (*tiles, grid.words),
        Slot.LIST_HEADERS: (*tiles, 4),
        Slot.LIST_ENTRIES: (grid.lists, capacity.entries),
        Slot.KEY_LIST_HEADERS: (grid.kv_heads, grid.key_tiles + grid.coarse_tiles, 4),
        Slot.KEY_LIST_ENTRIES: (grid.kv_heads, capacity.key_entries),
        Slot.PRICES: (*tiles, grid.granules),
        Slot.LAMBDA: (grid.lists,),
    }
    return {
        slot: jax.ShapeDtypeStruct(
            (*batch, *shapes[slot]), jnp.float32 if slot is Slot.LAMBDA else jnp.uint32
        )
        for slot in results
    }


def _planned(
    operands: Operands, *, options: Options, adaptation: Adaptation, results: Sequence[Slot]
) -> list[jax.Array]:
    """The same in jax.numpy, where a platform has no custom call."""
    grid, batch = _grid(operands, options), extents(operands).batch

    def flat(x: jax.Array) -> jax.Array:
        core = x.shape[len(batch) :]
        return jnp.broadcast_to(x, (*batch, *core)).reshape(math.prod(batch), *core)

    operands = {slot: flat(x) for slot, x in operands.items()}
    if Slot.PRICES in operands:
        prices = operands[Slot.PRICES]
    else:
        prices = router.break_even(operands, options, grid, adaptation)
    values = {Slot.PRICES: prices}
    if Slot.LEVELS in results:
        levels, price = router.levels_at(prices, operands, options, grid, adaptation)
        capacity = Capacity.of(grid, options.causal, options.window)
        lists = pack(levels, boundary(operands, options, grid).full, grid, capacity)
        values |= dict(zip(LISTS, (levels, *lists), strict=True)) | {Slot.LAMBDA: price}
    return [values[slot].reshape(*batch, *values[slot].shape[1:]) for slot in results]


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    # A plan is piecewise constant.
    results = rules.plan_p.bind(*primals, **params)
    return results, [rules.no_tangent(x) for x in results]


rules.register_abstract_eval(rules.plan_p, _result_types)
rules.register_lowering(rules.plan_p, _planned, _result_types)
rules.register_batching(rules.plan_p)
ad.primitive_jvps[rules.plan_p] = _jvp
