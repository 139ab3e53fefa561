"""The words in which Python and C++ speak of an attention call: operand slots and options.

The table of slots, with shapes and dtypes, is in `docs/architecture.md`; the numbers are those of
`shaders/common/params.h`.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.levels import Grid

EMPTY_LOGSUMEXP = float(np.float32(-0.7) * np.finfo(np.float32).max)
"""logsumexp of a query row that has nothing to attend to."""


class Slot(enum.IntEnum):
    """An operand or a result of a primitive; primitives take theirs in this order."""

    Q = 0
    K = 1
    V = 2
    BIAS = 3
    MASK = 4
    Q_LENGTHS = 5
    KV_LENGTHS = 6
    Q_SEGMENTS = 7
    KV_SEGMENTS = 8
    OUT = 9
    LSE = 10
    DQ = 11
    DK = 12
    DV = 13
    DBIAS = 14
    DOUT = 15
    DLSE = 16
    COARSE_K = 17
    COARSE_V = 18
    LEVEL_BIAS = 19
    LEVELS = 20
    LIST_HEADERS = 21
    LIST_ENTRIES = 22
    KEY_LIST_HEADERS = 23
    KEY_LIST_ENTRIES = 24
    SHARES = 25
    DCOARSE_K = 26
    DCOARSE_V = 27
    DLEVEL_BIAS = 28
    DSHARES = 29
    ROW_COUNTS = 30
    PRICES = 31
    SPARE_ROWS = 32
    LAMBDA = 33
    PREVIOUS_LEVELS = 34

    @property
    def core_ndim(self) -> int:
        """Number of axes after the batch axes."""
        return _CORE_NDIM[self]

    @property
    def query_axis(self) -> int | None:
        """Axis that runs along queries, from the end; None: there is none."""
        return _QUERY_AXIS.get(self)

    @property
    def key_axis(self) -> int | None:
        """Axis that runs along keys, from the end; None: there is none."""
        return _KEY_AXIS.get(self)

    @property
    def head_axis(self) -> int | None:
        """Axis that runs along heads, from the end; None: there is none."""
        return _HEAD_AXIS.get(self)


_LENGTHS = (Slot.Q_LENGTHS, Slot.KV_LENGTHS)
_SEGMENTS = (Slot.Q_SEGMENTS, Slot.KV_SEGMENTS)
_LOGIT_LIKE = (Slot.BIAS, Slot.MASK, Slot.DBIAS)
_QUERY_LIKE = (Slot.Q, Slot.OUT, Slot.DQ, Slot.DOUT)
_KEY_LIKE = (Slot.K, Slot.V, Slot.DK, Slot.DV)
_ROW_LIKE = (Slot.LSE, Slot.DLSE)
_COARSE_LIKE = (Slot.COARSE_K, Slot.COARSE_V, Slot.DCOARSE_K, Slot.DCOARSE_V)
_SHARE_LIKE = (Slot.LEVEL_BIAS, Slot.SHARES, Slot.DLEVEL_BIAS, Slot.DSHARES, Slot.ROW_COUNTS)

LISTS = (
    Slot.LEVELS,
    Slot.LIST_HEADERS,
    Slot.LIST_ENTRIES,
    Slot.PRICES,
    Slot.LAMBDA,
    Slot.PREVIOUS_LEVELS,
)
"""Operands with an axis along chunks of query heads."""
KEY_LISTS = (Slot.KEY_LIST_HEADERS, Slot.KEY_LIST_ENTRIES)
KV_LIKE = (*_KEY_LIKE, *_COARSE_LIKE, *KEY_LISTS)
"""Slots with an axis along key/value heads."""

_CORE_NDIM = (
    dict.fromkeys((*_LENGTHS, Slot.SPARE_ROWS), 0)
    | dict.fromkeys((*_SEGMENTS, Slot.LAMBDA), 1)
    | dict.fromkeys((*_ROW_LIKE, Slot.LIST_ENTRIES, Slot.KEY_LIST_ENTRIES), 2)
    | dict.fromkeys((*_LOGIT_LIKE, *_QUERY_LIKE, *_KEY_LIKE, *_COARSE_LIKE, *_SHARE_LIKE), 3)
    | dict.fromkeys((Slot.LEVELS, Slot.LIST_HEADERS, Slot.KEY_LIST_HEADERS), 3)
    | dict.fromkeys((Slot.PRICES, Slot.PREVIOUS_LEVELS), 3)
)
_QUERY_AXIS = {Slot.Q_SEGMENTS: -1} | dict.fromkeys((*_LOGIT_LIKE, *_ROW_LIKE), -2)
_QUERY_AXIS |= dict.fromkeys((*_QUERY_LIKE, *_SHARE_LIKE), -3)
_KEY_AXIS = {Slot.KV_SEGMENTS: -1} | dict.fromkeys(_LOGIT_LIKE, -1) | dict.fromkeys(_KEY_LIKE, -3)
_HEAD_AXIS = dict.fromkeys((*_QUERY_LIKE, *_KEY_LIKE), -2) | dict.fromkeys(_LOGIT_LIKE, -3)
_HEAD_AXIS |= dict.fromkeys(_ROW_LIKE, -1) | dict.fromkeys((*_COARSE_LIKE, *_SHARE_LIKE), -2)
_HEAD_AXIS |= {slot: -_CORE_NDIM[slot] for slot in (*LISTS, *KEY_LISTS)}

TANGENT_OF = {
    Slot.Q: Slot.DQ,
    Slot.K: Slot.DK,
    Slot.V: Slot.DV,
    Slot.BIAS: Slot.DBIAS,
    Slot.OUT: Slot.DOUT,
    Slot.LSE: Slot.DLSE,
    Slot.COARSE_K: Slot.DCOARSE_K,
    Slot.COARSE_V: Slot.DCOARSE_V,
    Slot.LEVEL_BIAS: Slot.DLEVEL_BIAS,
    Slot.SHARES: Slot.DSHARES,
}
PRIMAL_OF = {tangent: primal for primal, tangent in TANGENT_OF.items()}

Operands = dict[Slot, jax.Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """What of an attention call is known when it is traced.

    Attributes:
      scale: Factor of the logits.
      causal: Query t sees keys s <= t only.
      window: (left, right): query t sees keys t - left <= s <= t + right; -1: unbounded.
      soft_cap: c: logits become c tanh(logits / c) before the bias is added; 0: they do not.
      query_tile: Rows of a query tile of the plan; 0: there is none.
      super_tile: Keys of a super-tile of it.
      level_count: Where a plan is made, the number of levels in use.
      candidate_share: Likewise, the share of the granules that a tile sees that the router judges
        twice.
      floor_share: Likewise, the share of them that is exact for its importance; half as much, in
        causal calls, is for being near.
      judged_key_tiles: Likewise, how many key tiles a tile looks into.
      list_capacity: Likewise, entries that a work list has room for, on average of those of a batch
        entry.
      corrects: Where a call with a plan makes its coarse rows, whether the state corrects them.
    """

    scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    soft_cap: float = 0.0
    query_tile: int = 0
    super_tile: int = 0
    level_count: int = 0
    candidate_share: float = 0.0
    floor_share: float = 0.0
    judged_key_tiles: int = 0
    list_capacity: int = 0
    corrects: bool = False

    def planned(self, grid: Grid) -> "Options":
        """Those of a call with a plan of this grid."""
        return dataclasses.replace(self, query_tile=grid.query_tile, super_tile=grid.super_tile)

    def grid(self, sizes: "Extents") -> Grid:
        """How a call with a plan is cut."""
        lengths, heads = (sizes.queries, sizes.keys), (sizes.heads, sizes.kv_heads)
        return Grid(*lengths, *heads, self.query_tile, self.super_tile)


@dataclasses.dataclass(frozen=True)
class Extents:
    """Sizes of an attention call.

    Attributes:
      batch: The batch axes, broadcast over all operands.
      queries: T.
      keys: S.
      heads: N, of the queries.
      kv_heads: K, of keys and values.
      head_dim: H.
      coarse_rows: R, mean rows of granules and super-tiles; 0 without a plan.
    """

    batch: tuple[int, ...]
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    coarse_rows: int = 0

    @property
    def groups(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """Shape of a result in a slot; that of DBIAS is without broadcasting."""
        if slot in _QUERY_LIKE:
            return (*self.batch, self.queries, self.heads, self.head_dim)
        if slot in _KEY_LIKE:
            return (*self.batch, self.keys, self.kv_heads, self.head_dim)
        if slot in _ROW_LIKE:
            return (*self.batch, self.queries, self.heads)
        if slot in _COARSE_LIKE:
            return (*self.batch, self.coarse_rows, self.kv_heads, self.head_dim)
        if slot in _SHARE_LIKE:
            return (*self.batch, self.queries, self.heads, 2)
        if slot in _LOGIT_LIKE:
            return (*self.batch, self.heads, self.queries, self.keys)
        raise ValueError(f"{slot.name} is never a result")


def broadcast_batch(operands: Mapping[Slot, Any]) -> tuple[int, ...]:
    """Batch axes of a call: those of its operands, broadcast."""
    shapes = [np.shape(x)[: len(np.shape(x)) - slot.core_ndim] for slot, x in operands.items()]
    return tuple(jnp.broadcast_shapes(*shapes))


def over_batch(slot: Slot, x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """An operand broadcast to all batch axes of a call."""
    return jnp.broadcast_to(x, (*batch, *x.shape[x.ndim - slot.core_ndim :]))


def counted(size: Any) -> int:
    """A batch size as it counts for how much is computed at once: 1 where it is symbolic."""
    return size if isinstance(size, int) else 1


def extents(operands: Mapping[Slot, Any]) -> Extents:
    """Sizes of the call that takes `operands` (arrays or abstract values)."""
    queries, heads, head_dim = operands[Slot.Q].shape[-3:]
    keys, kv_heads, _ = operands[Slot.K].shape[-3:]
    coarse_rows = operands[Slot.COARSE_K].shape[-3] if Slot.COARSE_K in operands else 0
    batch = broadcast_batch(operands)
    return Extents(batch, queries, keys, heads, kv_heads, head_dim, coarse_rows)


def forward_results(operands: Iterable[int]) -> tuple[Slot, ...]:
    """What the forward pass of `operands` gives."""
    return (Slot.OUT, Slot.LSE, *((Slot.SHARES,) if Slot.LEVELS in operands else ()))


def by_slot(slots: Sequence[int], values: Iterable[Any]) -> dict[Slot, Any]:
    """Names positional operands by their slots."""
    return {Slot(slot): value for slot, value in zip(slots, values, strict=True)}


def accumulation_dtype(dtype: Any) -> "np.dtype[Any]":
    """Type of logits, sums and logsumexp: float64 for float64 operands, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def count_pairs(queries: int, keys: int, causal: bool) -> float:
    """Pairs of a query and a key that causality leaves: with it query t sees t + 1 keys at most."""
    if not causal:
        return float(queries * keys)
    growing = min(queries, keys)
    return growing * (growing + 1) / 2 + (queries - growing) * keys


def problem_words(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    causal: bool,
) -> str:
    """Sizes of a call in words, such as 'B1 T4096 S4096 N8 K2 H64 bfloat16 causal'."""
    sizes = f"B{batch} T{queries} S{keys} N{heads} K{kv_heads} H{head_dim} {dtype}"
    return sizes + (" causal" if causal else "")
