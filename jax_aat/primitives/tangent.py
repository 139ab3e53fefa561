"""The tangent primitive: (q, k, v, ..., out, logsumexp, dq, dk, dv, dbias) -> (dout, dlogsumexp).

Linear in the tangents dq, dk, dv and dbias, of which those that are zero are left out. With a plan
there are shares and dshares, dcoarse_k, dcoarse_v and dlevel_bias besides.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters import ad

from jax_aat import corrected
from jax_aat.primitives import rules
from jax_aat.problem import TANGENT_OF, Operands, Slot, extents, forward_results


def _result_types(operands: Operands, **_: Any) -> dict[Slot, jax.ShapeDtypeStruct]:
    sizes = extents(operands)
    return {
        TANGENT_OF[slot]: jax.ShapeDtypeStruct(sizes.shape(slot), operands[slot].dtype)
        for slot in forward_results(operands)
    }


def _transposed(
    known: Operands, cotangents: Sequence[Any], wanted: dict[Slot, Any], **params: Any
) -> dict[Slot, Any]:
    pairs = zip(forward_results(known), cotangents, strict=True)
    along = {TANGENT_OF[slot]: ct for slot, ct in pairs if type(ct) is not ad.Zero}
    dbias_shape = None
    if Slot.DBIAS in wanted:
        # Summed by the pass over the axes along which bias broadcasts.
        dbias_shape = wanted[Slot.DBIAS].shape
    gradients = rules.bind(
        rules.backward_p,
        known | along,
        results=tuple(wanted),
        dbias_shape=dbias_shape,
        **params,
    )
    return dict(zip(wanted, gradients, strict=True))


rules.register_abstract_eval(rules.tangent_p, _result_types)
rules.register_lowering(
    rules.tangent_p, corrected.tangent, _result_types, in_parts=corrected.makes_means
)
rules.register_batching(rules.tangent_p)
rules.register_linear(
    rules.tangent_p,
    corrected.tangent,
    linear=(
        *(Slot.DQ, Slot.DK, Slot.DV, Slot.DBIAS),
        *(Slot.DCOARSE_K, Slot.DCOARSE_V, Slot.DLEVEL_BIAS),
    ),
    transposed=_transposed,
)
