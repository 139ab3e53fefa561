"""The forward primitive: (q, k, v, ...) -> (out, logsumexp)."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from jax_aat import tiled_xla
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
)


def forward(operands: Operands, options: Options, implementation: str) -> tuple[Any, Any]:
    """Attention of the operands in slots Q to KV_SEGMENTS.

    Args:
      operands: Arrays by slot, shaped as `docs/architecture.md` says.
      options: Scale, causality, window and soft cap.
      implementation: 'xla' or 'vulkan'.

    Returns:
      out [*batch, T, N, H] in the dtype of q; logsumexp [*batch, T, N] in float32 (float64 for
      float64 operands).
    """
    out, lse = rules.bind(
        rules.forward_p,
        operands,
        options=options,
        implementation=implementation,
        needs_devices=devices_marker() if implementation == "vulkan" else None,
    )
    return out, lse


def _result_types(operands: Operands, **_: Any) -> dict[Slot, jax.ShapeDtypeStruct]:
    sizes, dtype = extents(operands), operands[Slot.Q].dtype
    return {
        Slot.OUT: jax.ShapeDtypeStruct(sizes.shape(Slot.OUT), dtype),
        Slot.LSE: jax.ShapeDtypeStruct(sizes.shape(Slot.LSE), accumulation_dtype(dtype)),
    }


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, slots: Sequence[int], **params: Any
) -> tuple[list[Any], list[Any]]:
    operands = by_slot(slots, primals)
    out, lse = rules.bind(rules.forward_p, operands, **params)
    # Named, so that a checkpoint policy may keep them and spare the backward pass a forward one.
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_logsumexp")
    moving = by_slot(slots, tangents).items()
    along = {TANGENT_OF[slot]: t for slot, t in moving if type(t) is not ad.Zero}
    if not along:
        return [out, lse], [rules.no_tangent(x) for x in (out, lse)]
    known = operands | {Slot.OUT: out, Slot.LSE: lse}
    return [out, lse], rules.bind(rules.tangent_p, known | along, **params)


rules.register_abstract_eval(rules.forward_p, _result_types)
rules.register_lowering(rules.forward_p, tiled_xla.forward, _result_types)
rules.register_batching(rules.forward_p)
ad.primitive_jvps[rules.forward_p] = _jvp
