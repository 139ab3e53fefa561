"""The forward primitive: (q, k, v, ...) -> (out, logsumexp)."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from jax_aat import corrected
from jax_aat.primitives import rules
from jax_aat.primitives.partition import devices_marker
from jax_aat.problem import (
    TANGENT_OF,
    Operands,
    Options,
    Slot,
    accumulation_dtype,
    by_slot,
    extents,
    forward_results,
)

NAMES = {
    Slot.OUT: "attention_out",
    Slot.LSE: "attention_logsumexp",
    Slot.SHARES: "attention_shares",
}


def forward(operands: Operands, options: Options, implementation: str) -> tuple[Any, ...]:
    """Attention of the operands in slots Q to KV_SEGMENTS and, with a plan, COARSE_K and up.

    Without coarse rows a call with a plan makes them; `options.corrects` says whether its state
    corrects them.

    Args:
      operands: Arrays by slot, shaped as `docs/architecture.md` says.
      options: Scale, causality, window, soft cap and the plan's query tile.
      implementation: 'xla', 'vulkan' or `rules.BY_SIZE`.

    Returns:
      out [*batch, T, N, H] in the dtype of q; logsumexp [*batch, T, N] in float32 (float64 for
      float64 operands); with a plan also shares [*batch, T, N, 2] in the dtype of logsumexp.
    """
    return tuple(
        rules.bind(
            rules.forward_p,
            operands,
            options=options,
            implementation=implementation,
            needs_devices=None if implementation == "xla" else devices_marker(),
        )
    )


def _result_types(operands: Operands, **_: Any) -> dict[Slot, jax.ShapeDtypeStruct]:
    sizes, dtype = extents(operands), operands[Slot.Q].dtype
    dtypes = {Slot.OUT: dtype, Slot.LSE: accumulation_dtype(dtype)}
    return {
        slot: jax.ShapeDtypeStruct(sizes.shape(slot), dtypes.get(slot, dtypes[Slot.LSE]))
        for slot in forward_results(operands)
    }


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, slots: Sequence[int], **params: Any
) -> tuple[list[Any], list[Any]]:
    operands = by_slot(slots, primals)
    results = dict(
        zip(forward_results(slots), rules.bind(rules.forward_p, operands, **params), strict=True)
    )
    # Named, so that a checkpoint policy may keep them and spare the backward pass a forward one.
    results = {slot: checkpoint_name(x, NAMES[slot]) for slot, x in results.items()}
    values = list(results.values())
    moving = by_slot(slots, tangents).items()
    along = {TANGENT_OF[slot]: t for slot, t in moving if type(t) is not ad.Zero}
    if not along:
        return values, [rules.no_tangent(x) for x in values]
    return values, rules.bind(rules.tangent_p, operands | results | along, **params)


rules.register_abstract_eval(rules.forward_p, _result_types)
rules.register_lowering(rules.forward_p, corrected.forward, _result_types)
rules.register_batching(rules.forward_p)
ad.primitive_jvps[rules.forward_p] = _jvp
