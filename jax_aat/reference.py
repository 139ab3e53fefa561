"""Dense attention in plain jax.numpy: the oracle that every implementation is compared with.

It holds the whole matrix of logits, takes any floating-point type and computes in it (16-bit types
in float32); under `jax.enable_x64` it is exact enough to judge float32.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.problem import EMPTY_LOGSUMEXP, accumulation_dtype


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention by its definition.

    Arguments are those of `jax_aat.tiled_attention` in the layout BTNH.

    Returns:
      The output [B, T, N, H] and logsumexp [B, T, N], both in float64 if `query` is float64, else
      in float32.
    """
    dtype = accumulation_dtype(query.dtype)
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    logits *= 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits += bias.astype(dtype)

    t = jnp.arange(q.shape[1])[:, None]
    s = jnp.arange(k.shape[1])
    visible = jnp.ones(logits.shape, bool)
    if mask is not None:
        visible &= mask
    if is_causal:
        visible &= s <= t
    if local_window_size is not None:
        both = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
        visible &= (t - both[0] <= s) & (s <= t + both[1])
    if query_seq_lengths is not None:
        visible &= t < query_seq_lengths[:, None, None, None]
    if key_value_seq_lengths is not None:
        visible &= s < key_value_seq_lengths[:, None, None, None]
    if query_segment_ids is not None and key_value_segment_ids is not None:
        visible &= (query_segment_ids[:, :, None] == key_value_segment_ids[:, None, :])[:, None]

    logits = jnp.where(visible, logits, -jnp.inf)
    # jnp.max has no value for no keys; a row that sees nothing has no maximum to subtract.
    largest = logits.max(-1, keepdims=True, initial=-jnp.inf)
    shift = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    weights = jnp.exp(logits - shift)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total, v, precision="highest")
    lse = jnp.where(empty, EMPTY_LOGSUMEXP, shift + jnp.log(total))[..., 0]
    return out, jnp.swapaxes(lse, 1, 2)
