"""The backward primitive: (q, k, v, ..., out, logsumexp, dout, dlogsumexp) -> gradients.

Linear in the cotangents dout and dlogsumexp, of which one that is zero is left out; `results` says
which of dq, dk, dv and dbias are wanted. The transpose of the tangent primitive. With a plan there
are shares and dshares, dcoarse_k, dcoarse_v and dlevel_bias besides.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters import ad

from jax_aat import corrected
from jax_aat.primitives import rules
from jax_aat.problem import PRIMAL_OF, TANGENT_OF, Operands, Slot, extents, forward_results


def _result_types(
    operands: Operands, *, results: Sequence[Slot], dbias_shape: tuple[int, ...] | None, **_: Any
) -> dict[Slot, jax.ShapeDtypeStruct]:
    sizes = extents(operands)
    return {
        slot: jax.ShapeDtypeStruct(
            dbias_shape if slot is Slot.DBIAS else sizes.shape(slot),
            operands[PRIMAL_OF[slot]].dtype,
        )
        for slot in results
    }


def _transposed(
    known: Operands,
    cotangents: Sequence[Any],
    wanted: dict[Slot, Any],
    *,
    results: Sequence[Slot],
    dbias_shape: tuple[int, ...] | None,
    **params: Any,
) -> dict[Slot, Any]:
    pairs = zip(results, cotangents, strict=True)
    along = {slot: ct for slot, ct in pairs if type(ct) is not ad.Zero}
    tangents = rules.bind(rules.tangent_p, known | along, **params)
    names = (TANGENT_OF[slot] for slot in forward_results(known))
    return dict(zip(names, tangents, strict=True))


def _in_parts(operands: Operands) -> bool:
    """Cotangents of shares that a call corrects by occur in derivatives of derivatives alone."""
    return corrected.makes_means(operands) and Slot.DSHARES in operands


rules.register_abstract_eval(rules.backward_p, _result_types)
rules.register_lowering(rules.backward_p, corrected.backward, _result_types, in_parts=_in_parts)
rules.register_batching(rules.backward_p)
rules.register_linear(
    rules.backward_p,
    corrected.backward,
    linear=(Slot.DOUT, Slot.DLSE, Slot.DSHARES),
    transposed=_transposed,
)
