"""Adaptive attention of checked operands: plan, coarse rows, the primitive, the correction.

`attend` is one call at the levels of a plan; `attend_observed` plans by a state, audits, reports.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_aat import corrected
from jax_aat._compat import vary_like
from jax_aat.adaptation import Adaptation, grid_of
from jax_aat.audit import Audit, audit, choose_rows
from jax_aat.plan import TilePlan
from jax_aat.primitives import forward
from jax_aat.primitives.plan import plan_and_attend, serves, shader_goal
from jax_aat.problem import Operands, Options, Slot
from jax_aat.report import Report, make_report
from jax_aat.router import has_state
from jax_aat.row_bounds import row_bounds
from jax_aat.state import ResolutionState


def attend(
    operands: Operands,
    options: Options,
    adaptation: Adaptation,
    implementation: str,
    plan: TilePlan | None = None,
    past: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> tuple[jax.Array, jax.Array, TilePlan]:
    """Attention at the levels of a plan.

    Args:
      operands: Those of the call, with one batch axis [B], no axis of size 0.
      options: Those of the call.
      adaptation: How a plan is made if none is given, and which levels are corrected.
      implementation: 'xla' or 'vulkan'.
      plan: Levels to use; None: chosen for these operands.
      past: What a state says of the plan to be chosen: log lambda and previous levels, as those of
        `jax_aat.router.route`.

    Returns:
      out [B, T, N, H] in the dtype of q, logsumexp [B, T, N] of what was read, and the plan.
    """
    options = dataclasses.replace(options, corrects=has_state(operands, options, adaptation))
    if (
        plan is None
        and implementation == "vulkan"
        and plans_in_one_submission(operands, adaptation)
    ):
        grid = grid_of(operands, adaptation)
        goal = shader_goal(operands, options, grid, adaptation, *past)
        made = plan_and_attend(operands | goal, options, adaptation)
        out, lse = made[Slot.OUT], made[Slot.LSE]
        return out, lse, TilePlan.of_results(made, operands, options, adaptation)
    if plan is None:
        plan = TilePlan.choose(operands, options, adaptation, *past, implementation)
    else:
        plan = plan.for_call(operands, options)
    plan = jax.tree.map(jax.lax.stop_gradient, plan)
    options = options.planned(plan.grid)
    values = operands | plan.operands()
    if implementation == "vulkan":
        out, lse, _ = forward(values, options, implementation)
    else:
        # Coarse rows and state are functions like any other to XLA, which then keeps them for the
        # backward pass.
        attention = functools.partial(forward, implementation=implementation)
        out, lse, _ = corrected.forward(values, options, attention)
    return out, lse, plan


def plans_in_one_submission(operands: Operands, adaptation: Adaptation) -> bool:
    """Whether shaders plan a call and attend by one submission, which spares a round trip.

    Over several devices a plan is made apart: it needs all heads, which attention may split.
    """
    return jax.device_count() == 1 and serves(operands, adaptation)


def attend_observed(
    operands: Operands,
    options: Options,
    adaptation: Adaptation,
    implementation: str,
    plan: TilePlan | None = None,
    state: ResolutionState | None = None,
    *,
    reports: bool = False,
    certifies: bool = False,
) -> tuple[jax.Array, jax.Array, ResolutionState | None, Report | None]:
    """Attention that a state steers, with the state after it and a report.

    Args:
      operands: Those of the call, with one batch axis [B], no axis of size 0.
      options: Those of the call.
      adaptation: That of the call.
      implementation: 'xla' or 'vulkan'.
      plan: Levels to use; None: those of the state, or chosen for these operands.
      state: That before the call.
      reports: Whether to report.
      certifies: Whether the report has certified bounds.

    Returns:
      out [B, T, N, H], logsumexp [B, T, N], the next state if there is one, the report if wanted.
    """
    past = (None, None) if state is None else (state.log_price, state.levels)
    planned: jax.Array | bool = plan is None
    if plan is None and state is not None:
        due = state.step % adaptation.replan_every == 0
        plan = _kept(operands, options, adaptation, implementation, state, past, due)
        planned = True if plan is None else due
    out, lse, plan = attend(operands, options, adaptation, implementation, plan, past)
    if state is None and not reports:
        return out, lse, None, None
    found = Audit.empty(plan.grid.heads)
    batch, queries = out.shape[:2]
    rate = adaptation.audit_rate_for(queries)
    # Without a tolerance nobody but the report asks what an audit finds.
    audits = rate > 0 and (reports or adaptation.tolerance is not None)
    if audits:
        seed, step = (0, 0) if state is None else (state.seed, state.step)
        rows = choose_rows(seed, step, batch, queries, rate)
        found = audit(operands, options, out, plan.levels, plan.grid, *rows)
    bound = None
    if certifies:
        bound = row_bounds(operands, options, plan, out, implementation)
    previous = None if state is None else state.levels
    report = make_report(operands, options, plan, found, previous, bound, planned=planned)
    following = None
    if state is not None:
        by_list = report.spent[:: plan.grid.tile_heads]
        following = state.after_call(plan, found if audits else None, by_list)
    return out, lse, following, report if reports else None


def _kept(
    operands: Operands,
    options: Options,
    adaptation: Adaptation,
    implementation: str,
    state: ResolutionState,
    past: tuple[jax.Array | None, jax.Array | None],
    due: jax.Array,
) -> TilePlan | None:
    """The plan of a state that keeps one; replaced where that is due."""
    kept, kept_hides = state.plan, state.plan_hides
    if kept is None or kept_hides is None:
        return None

    def chosen() -> TilePlan:
        return TilePlan.choose(operands, options, adaptation, *past, implementation)

    def reused(hides: bool) -> TilePlan:
        return dataclasses.replace(kept, hides=hides).for_call(operands, options)

    known = jax.tree.leaves((kept, operands))

    def alike(branch: Callable[[], TilePlan]) -> TilePlan:
        # Inside a shard_map all branches vary over the same mesh axes.
        made: TilePlan = jax.tree.map(lambda x: vary_like(x, known), branch())
        return made

    # Lists are made anew only where the plan hides what this call may show.
    branches = (chosen, functools.partial(reused, False), functools.partial(reused, True))
    alikes = [functools.partial(alike, branch) for branch in branches]
    planned: TilePlan = lax.switch(jnp.where(due, 0, 1 + kept_hides), alikes)
    return planned
