"""The planning primitive: (q, k, v, ..., goal) -> levels and work lists; or prices alone."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad

from jax_aat import corrected, router
from jax_aat._compat import register_dead_code
from jax_aat.adaptation import Adaptation, grid_of
from jax_aat.boundary import boundary
from jax_aat.hierarchy import judged_key_tiles
from jax_aat.levels import Grid
from jax_aat.lists import Capacity, pack
from jax_aat.primitives import rules
from jax_aat.primitives.forward import NAMES
from jax_aat.primitives.partition import devices_marker
from jax_aat.problem import (
    KEY_LISTS,
    TANGENT_OF,
    Operands,
    Options,
    Slot,
    by_slot,
    extents,
    over_batch,
)

LISTS = (
    Slot.LEVELS,
    Slot.LIST_HEADERS,
    Slot.LIST_ENTRIES,
    Slot.KEY_LIST_HEADERS,
    Slot.KEY_LIST_ENTRIES,
)

_PLAN = (*LISTS, Slot.LAMBDA)
_ATTENTION = (Slot.OUT, Slot.LSE, Slot.SHARES)
_GOAL = (Slot.PRICES, Slot.SPARE_ROWS, Slot.LAMBDA, Slot.PREVIOUS_LEVELS)


def make_prices(operands: Operands, options: Options, adaptation: Adaptation) -> jax.Array:
    """The prices of all granules, by shaders: what `jax_aat.router.break_even` gives."""
    prices: jax.Array = _bind(operands, options, adaptation, (Slot.PRICES,), rules.plan_p)[0]
    return prices


def serves(operands: Operands, adaptation: Adaptation) -> bool:
    """Whether shaders plan such calls, where a Vulkan device computes them."""
    given = Slot.MASK in operands or Slot.BIAS in operands
    return not given and not router.is_exact(adaptation)


def shader_goal(
    operands: Operands,
    options: Options,
    grid: Grid,
    adaptation: Adaptation,
    log_lambda: jax.Array | None = None,
    previous: jax.Array | None = None,
) -> Operands:
    """What shaders need besides the operands of a call; arguments as those of `router.route`."""
    goal = router.goal_of(operands, options, grid, adaptation, log_lambda, previous)
    return {slot: lax.stop_gradient(x) for slot, x in goal.items()}


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
    return _made(operands, options, adaptation, (), rules.plan_p)


def plan_and_attend(operands: Operands, options: Options, adaptation: Adaptation) -> Operands:
    """Attention at the levels of a plan, and the plan, by one submission of shaders.

    Args:
      operands: As those of `make_plan`.
      options: Those of the call.
      adaptation: As that of `make_plan`.

    Returns:
      What `make_plan` gives, and OUT, LSE and SHARES as `jax_aat.primitives.forward` gives them.
    """
    return _made(operands, options, adaptation, _ATTENTION, rules.planned_forward_p)


def _made(
    operands: Operands,
    options: Options,
    adaptation: Adaptation,
    others: tuple[Slot, ...],
    primitive: Primitive,
) -> Operands:
    wanted = (*others, *_plan_slots(operands))
    values = _bind(operands, options, adaptation, wanted, primitive)
    results = dict(zip(wanted, values, strict=True))
    if Slot.LAMBDA in results:
        return results
    return results | {Slot.LAMBDA: router.used(operands[Slot.LAMBDA])}


def _plan_slots(operands: Operands) -> tuple[Slot, ...]:
    """What of a plan is computed; where lambda is no result, it is given."""
    return _PLAN if Slot.SPARE_ROWS in operands else LISTS


def _bind(
    operands: Operands,
    options: Options,
    adaptation: Adaptation,
    results: tuple[Slot, ...],
    primitive: Primitive,
) -> list[Any]:
    share = router.judged_share(adaptation)
    grid = grid_of(operands, adaptation)
    options = dataclasses.replace(
        options.planned(grid),
        level_count=len(adaptation.levels),
        candidate_share=router.candidate_share(adaptation, options, grid),
        floor_share=router.floor_share(adaptation),
        judged_key_tiles=judged_key_tiles(operands, grid, share),
        list_capacity=router.list_capacity(operands, options, grid, adaptation),
    )
    return rules.bind(
        primitive,
        operands,
        options=options,
        adaptation=adaptation,
        results=results,
        implementation="vulkan",
        needs_devices=devices_marker(),
    )


def _result_types(
    operands: Operands, *, options: Options, results: Sequence[Slot], **_: Any
) -> dict[Slot, jax.ShapeDtypeStruct]:
    sizes = extents(operands)
    grid, batch = options.grid(sizes), sizes.batch
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
    types = {
        slot: jax.ShapeDtypeStruct(
            (*batch, *shape), jnp.float32 if slot is Slot.LAMBDA else jnp.uint32
        )
        for slot, shape in shapes.items()
    }
    for slot in _ATTENTION:
        dtype = operands[Slot.Q].dtype if slot is Slot.OUT else jnp.float32
        types[slot] = jax.ShapeDtypeStruct(sizes.shape(slot), dtype)
    return {slot: types[slot] for slot in results}


def _planned(
    operands: Operands, *, options: Options, adaptation: Adaptation, results: Sequence[Slot]
) -> list[jax.Array]:
    """The same in jax.numpy, where a platform has no custom call."""
    sizes = extents(operands)
    grid, batch = options.grid(sizes), sizes.batch

    def flat(slot: Slot, x: jax.Array) -> jax.Array:
        return over_batch(slot, x, batch).reshape(math.prod(batch), *x.shape[len(batch) :])

    operands = {slot: flat(slot, x) for slot, x in operands.items()}
    if Slot.PRICES in operands:
        prices = operands[Slot.PRICES]
    else:
        prices = router.break_even(operands, options, grid, adaptation)
    values = {Slot.PRICES: prices}
    if Slot.PRICES not in results:
        levels, price = router.levels_at(prices, operands, options, grid, adaptation)
        capacity = Capacity.of(grid, options.causal, options.window)
        lists = pack(levels, boundary(operands, options, grid).full, grid, capacity)
        values |= dict(zip(LISTS, (levels, *lists), strict=True)) | {Slot.LAMBDA: price}
    if Slot.OUT in results:
        known = {slot: x for slot, x in operands.items() if slot not in _GOAL}
        made = {slot: values[slot] for slot in LISTS}
        attended = corrected.forward(known | made, options)
        values |= dict(zip(_ATTENTION, attended, strict=True))
    return [values[slot].reshape(*batch, *values[slot].shape[1:]) for slot in results]


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    # A plan is piecewise constant.
    results = rules.plan_p.bind(*primals, **params)
    return results, [rules.no_tangent(x) for x in results]


def _forward_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, slots: Sequence[int], **params: Any
) -> tuple[list[Any], list[Any]]:
    operands = by_slot(slots, primals)
    wanted = params["results"]
    # The derivative needs what may have been dead code before (`_without_dead_results`).
    needed = (*_ATTENTION, *_plan_slots(operands))
    missing = (slot for slot in needed if slot not in wanted)
    params |= {"results": (*wanted, *missing)}
    values = rules.bind(rules.planned_forward_p, operands, **params)
    results = dict(zip(params["results"], values, strict=True))
    results |= {slot: checkpoint_name(results[slot], NAMES[slot]) for slot in _ATTENTION}
    moving = {s: t for s, t in by_slot(slots, tangents).items() if type(t) is not ad.Zero}
    along = {TANGENT_OF[slot]: t for slot, t in moving.items() if slot in TANGENT_OF}
    derivatives = {slot: rules.no_tangent(x) for slot, x in results.items()}
    if along:
        known = {slot: x for slot, x in (operands | results).items() if slot not in _GOAL}
        kept = {name: params[name] for name in ("options", "implementation", "needs_devices")}
        terms = rules.bind(rules.tangent_p, known | along, **kept)
        derivatives |= dict(zip(_ATTENTION, terms, strict=True))
    return [results[slot] for slot in wanted], [derivatives[slot] for slot in wanted]


def _without_dead_results(used: list[bool], equation: Any) -> tuple[list[bool], Any]:
    """Dead code: transposed lists serve backward passes alone, and take long to make.

    What nobody reads of a plan besides the call itself, its lists or all of it, may share its
    memory with what it is made from. Shares serve derivatives, too.
    """
    if not any(used):
        return [False] * len(equation.invars), None
    results = equation.params["results"]
    wanted = {slot for slot, is_used in zip(results, used, strict=True) if is_used}
    attends = equation.primitive is rules.planned_forward_p
    dead: tuple[Slot, ...] = KEY_LISTS
    if wanted.intersection(KEY_LISTS):
        dead = ()
    elif attends and not wanted.intersection(_PLAN):
        dead = _PLAN
    elif attends and Slot.LIST_ENTRIES not in wanted:
        dead = (Slot.LIST_ENTRIES, *KEY_LISTS)
    if Slot.SHARES not in wanted:
        dead = (*dead, Slot.SHARES)
    kept = [i for i, slot in enumerate(results) if slot not in dead]
    equation = equation.replace(
        outvars=[equation.outvars[i] for i in kept],
        params=equation.params | {"results": tuple(results[i] for i in kept)},
    )
    return [True] * len(equation.invars), equation


for _primitive in (rules.planned_forward_p, rules.plan_p):
    register_dead_code(_primitive, _without_dead_results)

rules.register_abstract_eval(rules.planned_forward_p, _result_types)
rules.register_lowering(rules.planned_forward_p, _planned, _result_types, "jax_aat_forward")
rules.register_batching(rules.planned_forward_p)
ad.primitive_jvps[rules.planned_forward_p] = _forward_jvp

rules.register_abstract_eval(rules.plan_p, _result_types)
rules.register_lowering(rules.plan_p, _planned, _result_types)
rules.register_batching(rules.plan_p)
ad.primitive_jvps[rules.plan_p] = _jvp
