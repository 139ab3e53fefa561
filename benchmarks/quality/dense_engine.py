"""Attention under any selection of keys and coarse rows, computed densely, to judge its quality.

Speed is not its point: it computes every logit and hides what a method leaves out, so that all
methods share one implementation, and it counts what each would have had to compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 512
"""Query positions whose logits are held at once."""
_SEGMENTS = 4
"""Parts of the queries; each looks at no more keys than its last query sees."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "bias", "keys"], meta_fields=[])
@dataclass(frozen=True)
class Coarse:
    """Rows that stand for many keys each.

    Attributes:
      values: [R, K, H].
      bias: [N, query blocks, R], added to the logits; -inf where a block does not use the row.
      keys: [R, K, H]; None: the bias is the whole logit, the same for all queries of a block, and
        costs one row a block rather than one a query.
    """

    values: jax.Array
    bias: jax.Array
    keys: jax.Array | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["planning", "keep", "window", "coarse", "row_bias", "tilt"],
    meta_fields=["sinks"],
)
@dataclass(frozen=True)
class Selection:
    """What a method lets attention see, besides causality.

    Attributes:
      planning: Floating-point operations spent to decide it.
      keep: Blocks of keys seen exactly, bool [N, query blocks, key blocks]; None: all.
      window: Number of last keys that a query sees; None: all.
      sinks: Number of first keys that every query sees despite the window.
      coarse: Kinds of coarse rows.
      row_bias: Added to the logits of a query's coarse rows, [T, N, kinds].
      tilt: [T, N, kinds, H], times the share of a kind added to the output of a query.
    """

    planning: jax.Array | float = 0.0
    keep: jax.Array | None = None
    window: jax.Array | None = None
    sinks: int = 0
    coarse: tuple[Coarse, ...] = ()
    row_bias: jax.Array | None = None
    tilt: jax.Array | None = None


def dense_operations(heads: int, length: int, head_dim: int) -> float:
    """Floating-point operations of exact causal attention: two products a visible pair."""
    return 4.0 * heads * head_dim * length * (length + 1) / 2


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array]:
    """Causal attention that sees what a selection allows.

    Args:
      query: [T, N, H].
      key: [T, K, H].
      value: As key.
      selection: What is seen. Its block sizes divide `CHUNK`, or T if that is less.

    Returns:
      The output [T, N, H] in the dtype of query, and the operations it takes, planning included,
      as a fraction of those of exact attention.
    """
    length, heads, head_dim = query.shape
    chunk = min(CHUNK, length)
    chunks = length // chunk
    segments = min(_SEGMENTS, chunks)
    if length % (chunk * segments):
        raise ValueError(f"{length} positions are not {segments} segments of chunks of {chunk}")
    outputs, counts = [], []
    for segment in range(segments):
        keys = length * (segment + 1) // segments
        one = partial(_attend_chunk, query, key[:keys], value[:keys], selection, chunk)
        indices = jnp.arange(chunks // segments) + segment * (chunks // segments)
        out, count = jax.lax.map(one, indices)
        outputs.append(out.reshape(-1, heads, head_dim))
        counts.append(count.sum())
    spent = 4.0 * head_dim * sum(counts) + selection.planning
    return jnp.concatenate(outputs), spent / dense_operations(heads, length, head_dim)


def _attend_chunk(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: Selection,
    chunk: int,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One chunk of queries; returns its output [chunk, N, H] and the rows that it had to read."""
    length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    rows = partial(_rows_of, start=index * chunk, count=chunk, length=length)
    # Rows of all heads that share keys lie together: one product a key/value head.
    shared = rows(query, axis=0).reshape(chunk, kv_heads, -1, head_dim)
    shared = shared.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)

    def product(rows_of_keys: jax.Array) -> jax.Array:
        logits = jnp.einsum(
            "krh,skh->krs", shared, rows_of_keys, preferred_element_type=jnp.float32
        )
        return logits.reshape(heads, chunk, -1) / math.sqrt(head_dim)

    seen = _seen(selection, index * chunk + jnp.arange(chunk), key.shape[0])
    if selection.keep is not None:
        # The blocks of the keys before the end of this segment.
        blocks = selection.keep.shape[2] * key.shape[0] // length
        seen = seen & _per_row(rows(selection.keep[..., :blocks], axis=1), chunk, key.shape[0])
    logits = [jnp.where(seen, product(key), -jnp.inf)]
    # Summed in two steps: each is exact in its type.
    by_row = seen.sum(-1, dtype=jnp.int32).astype(jnp.float32)
    values, count = [value], jnp.broadcast_to(by_row, logits[0].shape[:2]).sum()
    for kind, coarse in enumerate(selection.coarse):
        bias = rows(coarse.bias, axis=1)
        scores = _per_row(bias, chunk, bias.shape[2])
        used = (bias > -jnp.inf).sum().astype(jnp.float32)
        if coarse.keys is None:
            count += used
        else:
            count += used * (chunk // bias.shape[1])
            scores += product(coarse.keys)
        if selection.row_bias is not None:
            scores += rows(selection.row_bias, axis=0)[..., kind].T[..., None]
        logits.append(scores)
        values.append(coarse.values)

    largest = jnp.stack([x.max(-1) for x in logits]).max(0)[..., None]
    weights = [jnp.exp(x - largest) for x in logits]
    masses = [x.sum(-1) for x in weights]
    total = sum(masses)
    parts = [
        jnp.einsum(
            "krs,skh->krh",
            weight.astype(value.dtype).reshape(kv_heads, -1, weight.shape[-1]),
            of.astype(value.dtype),
            preferred_element_type=jnp.float32,
        )
        for weight, of in zip(weights, values, strict=True)
    ]
    out = sum(parts).reshape(heads, chunk, head_dim).swapaxes(0, 1) / total.T[..., None]
    if selection.tilt is not None:
        shares = jnp.stack([(mass / total).T for mass in masses[1:]], axis=-1)
        out += jnp.einsum("tnc,tnch->tnh", shares, rows(selection.tilt, axis=0))
    return out.astype(query.dtype), count


def _rows_of(x: jax.Array, axis: int, start: Any, count: int, length: int) -> jax.Array:
    """The part of an axis, of positions or blocks of them, that a chunk of positions needs."""
    block = length // x.shape[axis]
    return jax.lax.dynamic_slice_in_dim(x, start // block, count // block, axis)


def _per_row(blocks: jax.Array, rows: int, columns: int) -> jax.Array:
    """[N, row blocks, column blocks] as [N, rows, columns]."""
    heads, height, width = blocks.shape
    shape = (heads, height, rows // height, width, columns // width)
    return jnp.broadcast_to(blocks[:, :, None, :, None], shape).reshape(heads, rows, columns)


def _seen(selection: Selection, positions: jax.Array, keys: int) -> jax.Array:
    """Whether causality and the window let positions see keys: [1, positions, keys]."""
    behind = positions[:, None] - jnp.arange(keys)
    seen = behind >= 0
    if selection.window is not None:
        seen &= (behind < selection.window) | (jnp.arange(keys) < selection.sinks)
    return seen[None]
