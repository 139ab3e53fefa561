"""Attention functions for the attention layers of Flax.

Pass `linen_attention` as ``attention_fn`` of ``flax.linen.MultiHeadDotProductAttention`` and
`nnx_attention` as that of ``flax.nnx.MultiHeadAttention``; bind more with `functools.partial`, for
example ``partial(linen_attention, implementation='vulkan', is_causal=True)``. Both take the
parameters of the functions they replace, by the same names and in the same order: linen passes only
the keywords that it finds in the signature, nnx passes all of its own.

What differs from the functions of Flax:

- Scores, softmax and sums are float32 whatever the dtype of the operands, so ``precision`` and
  ``force_fp32_for_softmax`` are accepted and change nothing.
- A query row that may attend to nothing gives zeros; Flax gives the mean of all values.
- The matrix of attention weights never exists, so it can be neither dropped out nor sown.
- One query beside many keys and a mask is a step of decoding with a cache, whose mask says what was
  decoded before: ``is_causal`` would show it the first key only, and is ignored.

With ``adaptation`` attention is adaptive:
``partial(linen_attention, is_causal=True, adaptation=Adaptation(budget=0.25))``. Say causality by
``is_causal`` rather than by a mask: a mask has to be looked at key by key, and the state's
correction of `docs/router.md` is left out beside one. Calls of fewer than 16 queries, so the
steps of decoding, are exact: to choose their levels would cost more than it saves.

Flax itself is not imported here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_aat.adaptation import Adaptation
from jax_aat.attention import Implementation, tiled_attention
from jax_aat.levels import GRANULE

__all__ = ["linen_attention", "nnx_attention"]

_FEWEST_QUERIES = GRANULE
"""Queries of a call that is worth planning: what the router judges by at first is their mean.

Planning reads every key, which for one query is what exact attention does.
"""


def linen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    *,
    is_causal: bool = False,
    implementation: Implementation | None = None,
    adaptation: Adaptation | None = None,
) -> jax.Array:
    """Attention for ``flax.linen``, in place of ``flax.linen.dot_product_attention``.

    Args:
      query: [*batch, T, N, H], with any number of batch axes, none included.
      key: [*batch, S, K, H]; N is a multiple of K.
      value: [*batch, S, K, H].
      bias: floating point, broadcastable to [*batch, N, T, S]; added to the scores.
      mask: of any dtype, broadcastable to [*batch, N, T, S]; what is not zero may be attended to.
      broadcast_dropout: ignored, as there is no dropout of weights.
      dropout_rng: ignored, as there is no dropout of weights.
      dropout_rate: must be 0 unless ``deterministic``.
      deterministic: True switches dropout off.
      dtype: dtype that the operands are converted to; None: the one they promote to.
      precision: ignored, sums are float32.
      module: must be None: there are no weights to sow.
      force_fp32_for_softmax: ignored, the softmax is float32.
      einsum_dot_general: must be None: the products are not einsums.
      qk_attn_weights_einsum: must be None, likewise.
      attn_weights_value_einsum: must be None, likewise.
      is_causal: whether position t attends to positions up to t only; ignored in decoding steps.
      implementation: as in `jax_aat.tiled_attention`.
      adaptation: how much is computed exactly, by a budget or a threshold; None: everything.

    Returns:
      [*batch, T, N, H], of the dtype of the converted operands.

    Raises:
      ValueError: for dropout or sowing of weights, another einsum, a tolerance, or shapes that do
        not fit.
    """
    del broadcast_dropout, dropout_rng, precision, force_fp32_for_softmax
    if any((einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)):
        raise ValueError(
            "linen_attention computes its products in one kernel and cannot use another einsum: "
            "leave qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls unset, or keep "
            "flax.linen.dot_product_attention for this layer"
        )
    _refuse_weights(dropout_rate, deterministic, module)
    return _attend(query, key, value, bias, mask, dtype, is_causal, implementation, adaptation)


def nnx_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Any = None,
    is_causal: bool = False,
    *,
    implementation: Implementation | None = None,
    adaptation: Adaptation | None = None,
) -> jax.Array:
    """Attention for ``flax.nnx``, in place of ``flax.nnx.dot_product_attention``.

    Args:
      query: [*batch, T, N, H], with any number of batch axes, none included.
      key: [*batch, S, K, H]; N is a multiple of K.
      value: [*batch, S, K, H].
      bias: floating point, broadcastable to [*batch, N, T, S]; added to the scores.
      mask: of any dtype, broadcastable to [*batch, N, T, S]; what is not zero may be attended to.
      broadcast_dropout: ignored, as there is no dropout of weights.
      dropout_rng: ignored, as there is no dropout of weights.
      dropout_rate: must be 0 unless ``deterministic``.
      deterministic: True switches dropout off.
      dtype: dtype that the operands are converted to; None: the one they promote to.
      precision: ignored, sums are float32.
      module: must be None: there are no weights to sow.
      promote_dtype: function from ((query, key, value), dtype=dtype) to the three arrays converted;
        None: ordinary promotion, as described for ``dtype``.
      is_causal: whether position t attends to positions up to t only; ignored in decoding steps.
      implementation: as in `jax_aat.tiled_attention`.
      adaptation: how much is computed exactly, by a budget or a threshold; None: everything.

    Returns:
      [*batch, T, N, H], of the dtype of the converted operands.

    Raises:
      ValueError: for dropout or sowing of weights, a tolerance, or shapes that do not fit.
    """
    del broadcast_dropout, dropout_rng, precision
    _refuse_weights(dropout_rate, deterministic, module)
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        dtype = None
    return _attend(query, key, value, bias, mask, dtype, is_causal, implementation, adaptation)


def _refuse_weights(dropout_rate: float, deterministic: bool, module: Any) -> None:
    """Raises where the matrix of attention weights would be needed."""
    if not deterministic and dropout_rate > 0.0:
        raise ValueError(
            f"dropout_rate={dropout_rate} asks for dropout of the attention weights, which tiled "
            "attention never forms: give the attention layer dropout_rate=0.0 and apply a Dropout "
            "layer to its output, or pass deterministic=True to evaluate without dropout"
        )
    if module is not None:
        raise ValueError(
            "sow_weights=True asks for the attention weights, which tiled attention never forms: "
            "call the layer without it, or use the attention function of Flax to look at weights"
        )


def _attend(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    is_causal: bool,
    implementation: Implementation | None,
    adaptation: Adaptation | None,
) -> jax.Array:
    """Promotes the operands, folds their batch axes into one and attends."""
    if isinstance(adaptation, Adaptation) and adaptation.tolerance is not None:
        raise ValueError(
            f"adaptation: tolerance={adaptation.tolerance} needs a state that is carried from call "
            "to call, for which an attention_fn has no place: give a budget or a threshold, or "
            "call tiled_attention from a layer of your own that holds a ResolutionState"
        )
    if dtype is None:
        dtype = jnp.result_type(query, key, value)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    q, k, v = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch = q.shape[:-3]
    for name, array in (("query", q), ("key", k), ("value", v)):
        if array.ndim < 3 or array.shape[:-3] != batch:
            raise ValueError(
                f"{name} must have shape [*batch, length, heads, head_dim] with the batch axes of "
                f"query, got {array.shape} beside query {q.shape}"
            )
    queries, keys = q.shape[-3], k.shape[-3]
    decodes = queries == 1 < keys and mask is not None
    fold = (math.prod(batch),)
    folded = tiled_attention(
        q.reshape(fold + q.shape[-3:]),
        k.reshape(fold + k.shape[-3:]),
        v.reshape(fold + v.shape[-3:]),
        bias=None if bias is None else _fold_scores("bias", jnp.asarray(bias), batch),
        mask=None if mask is None else _fold_scores("mask", jnp.asarray(mask, bool), batch),
        is_causal=is_causal and not decodes,
        implementation=implementation,
        adaptation=None if queries < _FEWEST_QUERIES else adaptation,
    )
    return folded.reshape(q.shape)


def _fold_scores(name: str, array: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """Shapes a bias or mask that broadcasts to [*batch, N, T, S] as four axes, the first 1 or B."""
    missing = len(batch) + 3 - array.ndim
    if missing < 0:
        raise ValueError(
            f"{name} must broadcast to [*batch, heads, query length, key length] with batch axes "
            f"{batch}, got shape {array.shape}"
        )
    array = array.reshape((1,) * missing + array.shape)
    if any(size != 1 for size in array.shape[:-3]):
        array = jnp.broadcast_to(array, (*batch, *array.shape[-3:]))
    return array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:])
