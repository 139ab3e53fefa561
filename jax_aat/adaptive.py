"""Adaptive attention of checked operands: plan, coarse rows, the primitive, the correction."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_aat.adaptation import Adaptation
from jax_aat.plan import TilePlan
from jax_aat.primitives import forward
from jax_aat.problem import Operands, Options, Slot
from jax_aat.pyramid import coarse_rows, correction
from jax_aat.router import has_state


def attend(
    operands: Operands,
    options: Options,
    adaptation: Adaptation,
    implementation: str,
    plan: TilePlan | None = None,
    log_lambda: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, TilePlan]:
    """Attention at the levels of a plan.

    Args:
      operands: Those of the call, with one batch axis [B], no axis of size 0.
      options: Those of the call.
      adaptation: How a plan is made if none is given, and which levels are corrected.
      implementation: 'xla' or 'vulkan'.
      plan: Levels to use; None: chosen for these operands.
      log_lambda: The price to plan by where `adaptation` has a tolerance, broadcasts to [B, L].

    Returns:
      out [B, T, N, H] in the dtype of q, logsumexp [B, T, N] of what was read, and the plan.
    """
    if plan is None:
        plan = TilePlan.choose(operands, options, adaptation, log_lambda)
    else:
        plan = plan.for_call(operands, options)
    plan = jax.tree.map(jax.lax.stop_gradient, plan)
    coarse_k, coarse_v = coarse_rows(operands)
    values = operands | {Slot.COARSE_K: coarse_k, Slot.COARSE_V: coarse_v} | plan.operands()
    options = dataclasses.replace(options, query_tile=adaptation.query_tile)
    if not has_state(operands, options, adaptation):
        out, lse, _ = forward(values, options, implementation)
        return out, lse, plan
    state = correction(operands, options)
    values[Slot.LEVEL_BIAS] = state.level_bias.astype(jnp.float32)
    out, lse, shares = forward(values, options, implementation)
    return state.applied(out, shares), lse, plan
