"""Cuts the operands of an attention call into tiles of queries and blocks of keys.

Inside a tile the query heads are grouped by the key/value head that they share: logits lie as
[*batch, K, G, t, s], queries as [*batch, t, K, G, H], row statistics as [*batch, K, G, t].
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_aat._compat import vary_like
from jax_aat.problem import (
    Extents,
    Operands,
    Options,
    Slot,
    accumulation_dtype,
    extents,
)

# Products of float32 need more than a TPU's or GPU's default; those of 16-bit floats do not.
PRECISION = {
    jnp.dtype(jnp.bfloat16): lax.Precision.DEFAULT,
    jnp.dtype(jnp.float16): lax.Precision.HIGH,
}

_COARSE = {
    Slot.K: Slot.COARSE_K,
    Slot.V: Slot.COARSE_V,
    Slot.DK: Slot.DCOARSE_K,
    Slot.DV: Slot.DCOARSE_V,
}

Accumulators = dict[Any, jax.Array]
"""What a fold carries, by slot or name."""

Step = Callable[[Accumulators, Accumulators, Any, Any], tuple[Accumulators, Accumulators]]
"""(rows of a tile, gradients along keys, tile, block) -> both, after the pair of tile and block."""


@dataclasses.dataclass(frozen=True)
class TiledCall(abc.ABC):
    """An attention call as pairs of a tile of queries and a block of keys.

    Attributes:
      operands: Those of the call, brought into the form that the pairs are taken from.
      options: Those of the call.
      extents: Sizes of the call, without padding.
    """

    operands: Operands
    options: Options
    extents: Extents

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Type of logits and accumulators."""
        return accumulation_dtype(self.operands[Slot.Q].dtype)

    @property
    @abc.abstractmethod
    def padded_queries(self) -> int:
        """T, rounded up to whole tiles."""

    @property
    @abc.abstractmethod
    def padded_keys(self) -> int:
        """S, rounded up to whole blocks."""

    @property
    @abc.abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a statistic of all query rows."""

    @abc.abstractmethod
    def fold(
        self,
        step: Step,
        rows: Mapping[Any, tuple[tuple[int, ...], float]],
        keys: Mapping[Slot, tuple[int, ...]] | None = None,
    ) -> tuple[Accumulators, Accumulators]:
        """Runs `step` over the work list.

        Args:
          step: What a pair adds to the rows of its tile and to gradients along keys.
          rows: For each accumulator of query rows its axes after those of `row_shape` and the value
            that it starts from.
          keys: Shape of each gradient along keys, as `Extents.shape` says; they start from 0.

        Returns:
          The accumulators of all rows, [*row_shape, ...], and the gradients along keys.
        """

    @abc.abstractmethod
    def take(self, slot: Slot, i: Any, j: Any) -> jax.Array:
        """Part of an operand that tile i and block j need, grouped by heads.

        K, V, DK and DV are those of coarse rows in a block of these.
        """

    @abc.abstractmethod
    def rows_of(self, x: jax.Array, i: Any) -> jax.Array:
        """Rows of tile i of a statistic [*row_shape, ...]."""

    @abc.abstractmethod
    def grouped_rows(self, slot: Slot) -> jax.Array:
        """A whole operand of query rows as [*row_shape, ...]."""

    @abc.abstractmethod
    def add(self, slot: Slot, x: jax.Array, i: Any, j: Any, part: jax.Array) -> jax.Array:
        """Adds a pair's part to a gradient along keys."""

    @abc.abstractmethod
    def result(self, slot: Slot, x: jax.Array) -> jax.Array:
        """An accumulator as a result of the call: without padding and grouping, in its dtype."""

    @abc.abstractmethod
    def positions(self, i: Any, j: Any) -> tuple[jax.Array, jax.Array]:
        """Positions of queries and of keys of a pair, which broadcast to its logits."""

    def is_coarse(self, j: Any) -> bool:
        """Whether a block is one of coarse rows, each of which stands for several keys."""
        del j
        return False

    def key_slot(self, slot: Slot, j: Any) -> Slot:
        """The slot of K, V, DK or DV for the rows of a block."""
        return _COARSE[slot] if self.is_coarse(j) else slot

    def logits(self, i: Any, j: Any) -> tuple[jax.Array, jax.Array | float]:
        """Logits of a pair, -inf where hidden, and the slope of the soft cap, 0 there."""
        slope: jax.Array | float = 1.0
        visible = self.visible(i, j)
        # A compiler may contract a score's multiplication with the subtraction of a maximum, which
        # was that of rounded scores: the difference could then be any number. So q is scaled, and
        # maximum, which changes nothing, stands in between.
        q = self.take(Slot.Q, i, j) * self.options.scale
        scores = self.product("tkgh,skh->kgts", q, self.take(Slot.K, i, j))
        cap = self.options.soft_cap
        if cap:
            squashed = jnp.tanh(scores / cap)
            scores, slope = jnp.maximum(cap * squashed, -cap), 1 - squashed**2
            if visible is not None:
                slope = jnp.where(visible, slope, 0)
        if Slot.BIAS in self.operands:
            scores += self.take(Slot.BIAS, i, j)
        if self.is_coarse(j):
            scores += self.mass(j)
            if Slot.LEVEL_BIAS in self.operands:
                scores += self.take(Slot.LEVEL_BIAS, i, j)
        return scores if visible is None else jnp.where(visible, scores, -jnp.inf), slope

    def logits_tangent(self, slope: jax.Array | float, i: Any, j: Any) -> jax.Array | float:
        """Tangent of the logits of a pair along DQ, DK, DBIAS and DLEVEL_BIAS."""
        total: jax.Array | float = 0.0
        if Slot.DQ in self.operands:
            total += self.product(
                "tkgh,skh->kgts", self.take(Slot.DQ, i, j), self.take(Slot.K, i, j)
            )
        if self.key_slot(Slot.DK, j) in self.operands:
            total += self.product(
                "tkgh,skh->kgts", self.take(Slot.Q, i, j), self.take(Slot.DK, i, j)
            )
        total *= slope * self.options.scale
        if Slot.DBIAS in self.operands:
            total += self.take(Slot.DBIAS, i, j)
        if self.is_coarse(j) and Slot.DLEVEL_BIAS in self.operands:
            total += self.take(Slot.DLEVEL_BIAS, i, j)
        return total

    def mass(self, j: Any) -> jax.Array:
        """Logarithm of the number of keys that each row of a coarse block stands for.

        Without a plan no block is coarse, and this is never asked.
        """
        raise NotImplementedError

    def by_level(self, x: jax.Array, j: Any) -> jax.Array:
        """Sums [..., rows of a coarse block] over those at level 1 and at level 2: [..., 2].

        Without a plan no block is coarse, and this is never asked.
        """
        raise NotImplementedError

    def visible(self, i: Any, j: Any) -> jax.Array | None:
        """Which keys of a block the queries of a tile see; None: all."""
        query, key = self.positions(i, j)
        left, right = self.options.window
        conditions = []
        # Whether a symbolic length is whole is not known here.
        if not _same(self.padded_queries, self.extents.queries):
            conditions.append(query < self.extents.queries)
        if not _same(self.padded_keys, self.extents.keys):
            conditions.append(key < self.extents.keys)
        if self.options.causal:
            conditions.append(key <= query)
        if left >= 0:
            conditions.append(key >= query - left)
        if right >= 0:
            conditions.append(key <= query + right)
        if Slot.MASK in self.operands:
            conditions.append(self.take(Slot.MASK, i, j))
        if Slot.Q_LENGTHS in self.operands:
            conditions.append(query < self.take(Slot.Q_LENGTHS, i, j))
        if Slot.KV_LENGTHS in self.operands:
            conditions.append(key < self.take(Slot.KV_LENGTHS, i, j))
        if Slot.Q_SEGMENTS in self.operands:
            conditions.append(self.take(Slot.Q_SEGMENTS, i, j) == self.take(Slot.KV_SEGMENTS, i, j))
        visible = None
        for condition in conditions:
            visible = condition if visible is None else visible & condition
        return visible

    def product(self, subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
        """Einsum over the axes after the batch axes, which broadcast."""
        inputs, output = subscripts.split("->")
        a, b = inputs.split(",")
        return jnp.einsum(
            f"...{a},...{b}->...{output}",
            left,
            right,
            precision=PRECISION.get(self.operands[Slot.Q].dtype, lax.Precision.HIGHEST),
        )

    def weighted(self, subscripts: str, weights: jax.Array, rows: jax.Array) -> jax.Array:
        """`product` of weights, none negative, with rows [..., H]: those of weight 0 are left out.

        0 times NaN would be NaN. Results that weigh a row that is not finite are NaN.
        """
        total = self.product(subscripts, weights, finite(rows))
        bad = (~jnp.isfinite(rows).all(-1)).astype(rows.dtype)
        spoiled = self.product(subscripts.replace("h", ""), weights, bad)
        return jnp.where(spoiled[..., None] != 0, jnp.nan, total)

    def filled(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """An accumulator."""
        return vary_like(jnp.full(shape, value, self.dtype), self.operands.values())


@dataclasses.dataclass(frozen=True)
class Tiles(TiledCall):
    """An attention call cut into tiles of neighbours, every pair that may see each other listed.

    Attributes:
      rows: Queries of a tile.
      columns: Keys of a block.
    """

    rows: int
    columns: int

    @classmethod
    def cut(cls, operands: Operands, options: Options, tile: tuple[int, int]) -> "Tiles":
        """Cuts a call into tiles of at most `tile` = (queries, keys)."""
        sizes = extents(operands)
        # A symbolic length is cut into full tiles.
        rows = min(tile[0], sizes.queries) if isinstance(sizes.queries, int) else tile[0]
        columns = min(tile[1], sizes.keys) if isinstance(sizes.keys, int) else tile[1]
        tiles = cls(operands, options, sizes, rows, columns)
        padded = {
            slot: _pad_to(x, tiles.padded_shape(slot, x.shape)) for slot, x in operands.items()
        }
        return dataclasses.replace(tiles, operands=padded)

    @property
    def padded_queries(self) -> int:
        """See `TiledCall.padded_queries`."""
        return -(-self.extents.queries // self.rows) * self.rows

    @property
    def padded_keys(self) -> int:
        """See `TiledCall.padded_keys`."""
        return -(-self.extents.keys // self.columns) * self.columns

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See `TiledCall.row_shape`: [*batch, K, G, padded T]."""
        sizes = self.extents
        return (*sizes.batch, sizes.kv_heads, sizes.groups, self.padded_queries)

    def padded_shape(self, slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an operand once it is padded; axes of size 1 that broadcast stay."""
        padded = list(shape)
        axes = (
            (slot.query_axis, self.extents.queries, self.padded_queries),
            (slot.key_axis, self.extents.keys, self.padded_keys),
        )
        for axis, size, padded_size in axes:
            if axis is not None and shape[axis] == size:
                padded[axis] = padded_size
        return tuple(padded)

    def fold(
        self,
        step: Step,
        rows: Mapping[Any, tuple[tuple[int, ...], float]],
        keys: Mapping[Slot, tuple[int, ...]] | None = None,
    ) -> tuple[Accumulators, Accumulators]:
        """See `TiledCall.fold`."""
        start = (
            {name: self.filled((*self.row_shape, *core), x) for name, (core, x) in rows.items()},
            {s: self.filled(self.padded_shape(s, x), 0) for s, x in (keys or {}).items()},
        )

        def on_tile(carry: Any, i: Any, j: Any) -> Any:
            old, keys = carry
            new, keys = step({name: self.rows_of(x, i) for name, x in old.items()}, keys, i, j)
            return {name: self._with_rows(old[name], i, x) for name, x in new.items()}, keys

        pairs = self._work_list()
        if pairs.shape[0] == 1:
            return cast("tuple[Accumulators, Accumulators]", on_tile(start, 0, 0))
        # For derivatives of derivatives: tiles of logits are recomputed rather than stored.
        recomputed = jax.checkpoint(on_tile, prevent_cse=False)
        return cast(
            "tuple[Accumulators, Accumulators]",
            lax.scan(lambda carry, ij: (recomputed(carry, *ij), None), start, pairs)[0],
        )

    def _work_list(self) -> Any:
        """[pairs, 2]: every tile with every block that it sees, by causality and window."""
        tile_count = self.padded_queries // self.rows
        block_count = self.padded_keys // self.columns
        if not (isinstance(tile_count, int) and isinstance(block_count, int)):
            pairs = jnp.arange(tile_count * block_count, dtype=jnp.int32)
            return jnp.stack([pairs // block_count, pairs % block_count], axis=-1)
        tile, block = np.indices((tile_count, block_count))
        # Key minus query position lies in [nearest, furthest] inside a pair.
        nearest = block * self.columns - ((tile + 1) * self.rows - 1)
        furthest = (block + 1) * self.columns - 1 - tile * self.rows
        left, right = self.options.window
        seen = np.ones((tile_count, block_count), bool)
        if self.options.causal:
            seen &= nearest <= 0
        if left >= 0:
            seen &= furthest >= -left
        if right >= 0:
            seen &= nearest <= right
        return np.argwhere(seen).astype(np.int32)

    def take(self, slot: Slot, i: Any, j: Any) -> jax.Array:
        """See `TiledCall.take`."""
        x = self.operands[slot]
        if slot.query_axis is not None and x.shape[slot.query_axis] == self.padded_queries:
            x = _slice(x, slot.query_axis, i, self.rows)
        if slot.key_axis is not None and x.shape[slot.key_axis] == self.padded_keys:
            x = _slice(x, slot.key_axis, j, self.columns)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype)
        match slot:
            case Slot.Q_LENGTHS | Slot.KV_LENGTHS:
                return x[..., None, None, None, None]
            case Slot.Q_SEGMENTS:
                return x[..., None, None, :, None]
            case Slot.KV_SEGMENTS:
                return x[..., None, None, None, :]
            case Slot.K | Slot.V | Slot.DK | Slot.DV:
                return x
            case Slot.LSE | Slot.DLSE:
                return jnp.moveaxis(self._grouped(x, -1), -3, -1)
            case _:
                assert slot.head_axis is not None
                return self._grouped(x, slot.head_axis)

    def positions(self, i: Any, j: Any) -> tuple[jax.Array, jax.Array]:
        """See `TiledCall.positions`."""
        query = i * self.rows + jnp.arange(self.rows)[:, None]
        key = j * self.columns + jnp.arange(self.columns)
        return query, key

    def rows_of(self, x: jax.Array, i: Any) -> jax.Array:
        """See `TiledCall.rows_of`."""
        return _slice(x, self._row_axis, i, self.rows)

    def _with_rows(self, x: jax.Array, i: Any, rows: jax.Array) -> jax.Array:
        """`x` with the rows of tile i replaced."""
        axis = self._row_axis
        return lax.dynamic_update_slice_in_dim(x, rows, i * self.rows, axis)

    @property
    def _row_axis(self) -> int:
        return len(self.extents.batch) + 2

    def add(self, slot: Slot, x: jax.Array, i: Any, j: Any, part: jax.Array) -> jax.Array:
        """See `TiledCall.add`; sums over the axes where the gradient has size 1."""
        if slot is Slot.DBIAS:
            part = part.reshape(*part.shape[:-4], self.extents.heads, *part.shape[-2:])
        sizes = zip(part.shape, x.shape, strict=True)
        part = sum_to(part, tuple(1 if whole == 1 else size for size, whole in sizes))
        starts: list[Any] = [jnp.int32(0)] * x.ndim
        if slot.query_axis is not None and x.shape[slot.query_axis] != 1:
            starts[slot.query_axis] = jnp.int32(i * self.rows)
        if slot.key_axis is not None and x.shape[slot.key_axis] != 1:
            starts[slot.key_axis] = jnp.int32(j * self.columns)
        old = lax.dynamic_slice(x, starts, part.shape)
        return lax.dynamic_update_slice(x, old + part, starts)

    def grouped_rows(self, slot: Slot) -> jax.Array:
        """See `TiledCall.grouped_rows`."""
        x = self.operands[slot].astype(self.dtype)
        assert slot.head_axis is not None
        x = self._grouped(x, slot.head_axis)
        return jnp.moveaxis(x, slot.head_axis - 2, -1 if slot.core_ndim == 2 else -2)

    def _grouped(self, x: jax.Array, axis: int) -> jax.Array:
        """Splits the axis of query heads into [K, G]; one of size 1 into [1, 1]."""
        axis += x.ndim
        sizes = self.extents
        heads = (1, 1) if x.shape[axis] == 1 else (sizes.kv_heads, sizes.groups)
        return x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 1 :])

    def result(self, slot: Slot, x: jax.Array) -> jax.Array:
        """See `TiledCall.result`."""
        match slot:
            case Slot.OUT | Slot.DOUT | Slot.DQ:
                x = jnp.moveaxis(x, -2, -4)[..., : self.extents.queries, :, :, :]
                x = x.reshape(self.extents.shape(slot))
                return x.astype(self.operands[Slot.Q].dtype)
            case Slot.LSE | Slot.DLSE:
                x = jnp.moveaxis(x, -1, -3)[..., : self.extents.queries, :, :]
                return x.reshape(self.extents.shape(slot))
            case Slot.DK | Slot.DV:
                x = x[..., : self.extents.keys, :, :]
                return x.astype(self.operands[Slot.K].dtype)
            case _:
                rows = slice(None if x.shape[-2] == 1 else self.extents.queries)
                columns = slice(None if x.shape[-1] == 1 else self.extents.keys)
                return x[..., rows, columns].astype(self.operands[Slot.BIAS].dtype)


def sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums `x` over the axes where `shape` is 1: the transpose of broadcasting."""
    axes = tuple(
        axis
        for axis, (size, wanted) in enumerate(zip(x.shape, shape, strict=True))
        if wanted == 1 and size != 1
    )
    return x.sum(axes, keepdims=True) if axes else x


def finite(rows: jax.Array) -> jax.Array:
    """Rows to be multiplied by weights of 0, too: what is not finite, of which 0 is NaN, left out.

    Where weights are derivatives of scores nothing else is to be done: of such a row those that are
    not 0 are NaN themselves.
    """
    return jnp.where(jnp.isfinite(rows), rows, 0)


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return isinstance(a, int) and a == b


def _slice(x: jax.Array, axis: int, index: Any, size: int) -> jax.Array:
    if _same(x.shape[axis], size):
        return x
    return lax.dynamic_slice_in_dim(x, index * size, size, axis % x.ndim)


def _pad_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])
