"""An attention call as the work lists of a plan say: what each tile of queries reads.

The tiles of all batch entries and lists are sorted by length and taken a few at a time, so that
those that run together end together. Each walks its own list, chunk by chunk: rows are gathered,
what is not listed is never touched. With Z tiles at a time, logits lie as [Z, 1, G, P, rows], G the
query heads of a tile and P its positions.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_aat.levels import GRANULE, Grid
from jax_aat.problem import PRIMAL_OF, Operands, Options, Slot, extents
from jax_aat.tiles import Accumulators, Step, TiledCall, sum_to

LANES = 4
"""Tiles that run together."""
GRANULES_OF_CHUNK = 16
"""Granules that a tile reads at once."""
ROWS_OF_CHUNK = 128
"""Coarse rows that a tile reads at once."""

_LOGIT_LIKE = (Slot.BIAS, Slot.MASK, Slot.DBIAS)
_QUERY_LIKE = (Slot.Q, Slot.OUT, Slot.DQ, Slot.DOUT)
_ROW_LIKE = (Slot.LSE, Slot.DLSE)
_SHARE_LIKE = (Slot.LEVEL_BIAS, Slot.SHARES, Slot.DLEVEL_BIAS, Slot.DSHARES)
_FINE = (Slot.K, Slot.V, Slot.DK, Slot.DV)
_COARSE = (Slot.COARSE_K, Slot.COARSE_V, Slot.DCOARSE_K, Slot.DCOARSE_V)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The tiles that run together, by index; each attribute [Z] int32."""

    item: jax.Array
    batch: jax.Array
    list: jax.Array
    tile: jax.Array
    kv_head: jax.Array


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of the lists of the tiles that run together.

    Attributes:
      coarse: Whether it lists coarse rows or granules.
      rows: Granules or coarse rows, [Z, n] int32.
      listed: Where the list goes so far, [Z, n] bool.
      counts: Keys that a row stands for, [Z, n] int32.
    """

    coarse: bool
    rows: jax.Array
    listed: jax.Array
    counts: jax.Array


@dataclasses.dataclass(frozen=True)
class ListedTiles(TiledCall):
    """A call whose pairs are those of a plan's work lists.

    Attributes:
      grid: How the call is cut.
      differentiable: Whether loops have a fixed length, as reverse mode wants; short lists then
        leave iterations empty.
    """

    grid: Grid
    differentiable: bool = False

    @classmethod
    def of(cls, operands: Operands, options: Options, differentiable: bool) -> "ListedTiles":
        """Arranges the operands of a call that has a plan among them."""
        sizes = extents(operands)
        grid = options.grid(sizes)
        tiles = cls(operands, options, sizes, grid, differentiable)
        arranged = {slot: tiles._arranged(slot, x) for slot, x in operands.items()}
        return dataclasses.replace(tiles, operands=arranged)

    @property
    def padded_queries(self) -> int:
        """See `TiledCall.padded_queries`."""
        return self.grid.tiles * self.grid.positions

    @property
    def padded_keys(self) -> int:
        """See `TiledCall.padded_keys`."""
        return self.grid.granules * GRANULE

    @property
    def row_shape(self) -> tuple[int, ...]:
        """See `TiledCall.row_shape`: [tiles of all batch entries and lists, 1, G, P]."""
        return (self._items, 1, self.grid.tile_heads, self.grid.positions)

    @property
    def _batch(self) -> int:
        return math.prod(self.extents.batch)

    @property
    def _items(self) -> int:
        return self._batch * self.grid.lists * self.grid.tiles

    def _arranged(self, slot: Slot, x: jax.Array) -> jax.Array:
        """An operand with one batch axis, its axes along queries, keys and heads cut.

        Queries become [I, P], keys [granules, 16], query heads [L, G].
        """
        grid = self.grid
        axes = x.ndim - slot.core_ndim
        batch = self.extents.batch if any(size != 1 for size in x.shape[:axes]) else ()
        x = jnp.broadcast_to(x, (*(batch or x.shape[:axes]), *x.shape[axes:]))
        core = x.shape[axes:]
        x = x.reshape(math.prod(batch), *core)
        tiles, granules = (grid.tiles, grid.positions), (grid.granules, GRANULE)
        heads = (grid.lists, grid.tile_heads)
        if slot in _LOGIT_LIKE:
            # What has size 1 broadcasts.
            sizes = ((3, granules), (2, tiles), (1, heads))
            for axis, parts in sizes:
                x = _cut(x, axis, parts if x.shape[axis] != 1 else (1, 1))
            return x
        if slot in (*_QUERY_LIKE, *_ROW_LIKE, *_SHARE_LIKE):
            return _cut(_cut(x, 2, heads), 1, tiles)
        if slot is Slot.Q_SEGMENTS:
            return _cut(x, 1, tiles)
        if slot is Slot.KV_SEGMENTS or slot in _FINE:
            return _cut(x, 1, granules)
        return x

    def fold(
        self,
        step: Step,
        rows: Mapping[Any, tuple[tuple[int, ...], float]],
        keys: Mapping[Slot, tuple[int, ...]] | None = None,
    ) -> tuple[Accumulators, Accumulators]:
        """See `TiledCall.fold`."""
        shapes = dict(keys or {})
        start = {slot: self._zeros(slot, shape) for slot, shape in shapes.items()}
        headers = self.operands[Slot.LIST_HEADERS].astype(jnp.int32)
        headers = jnp.broadcast_to(headers, (self._batch, *headers.shape[1:])).reshape(-1, 4)
        order = jnp.argsort(-(headers[:, 2] * GRANULE + headers[:, 3]), stable=True)
        groups = -(-self._items // LANES)
        padded = jnp.pad(order, (0, groups * LANES - self._items), constant_values=self._items)

        def together(keys: Accumulators, items: jax.Array) -> tuple[Accumulators, Accumulators]:
            lanes = self._lanes(jnp.minimum(items, self._items - 1))
            header = jnp.where(items[:, None] < self._items, headers[lanes.item], 0)
            state = (
                {
                    name: self.filled((LANES, *self.row_shape[1:], *core), x)
                    for name, (core, x) in rows.items()
                },
                keys,
            )
            for coarse in (False, True):
                state = self._walk(step, state, lanes, header, coarse)
            return state[1], state[0]

        if self.differentiable:
            together = jax.checkpoint(together, prevent_cse=False)
        if groups == 1:
            gradients, found = together(start, padded)
        else:
            gradients, by_group = lax.scan(together, start, padded.reshape(groups, LANES))
            found = {name: x.reshape(-1, *x.shape[2:]) for name, x in by_group.items()}
        place = jnp.argsort(order)
        end = {name: x[place] for name, x in found.items()}
        return end, {slot: self._uncut(slot, x, shapes[slot]) for slot, x in gradients.items()}

    def _walk(self, step: Step, state: Any, lanes: Lanes, header: jax.Array, coarse: bool) -> Any:
        """Runs `step` over the granules, or the coarse rows, that tiles list."""
        size = ROWS_OF_CHUNK if coarse else GRANULES_OF_CHUNK
        longest = -(-(self.grid.coarse_rows if coarse else self.grid.granules) // size)
        count = header[:, 3 if coarse else 2]
        # Coarse rows come after the granules, which are padded to a multiple of 4.
        first = header[:, 0] + (header[:, 2] + 3) // 4 * 4 if coarse else header[:, 0]
        # A header that was tampered with cannot make the loop endless.
        trips = jnp.minimum((count.max() + size - 1) // size, longest)

        def on_chunk(t: Any, state: Any) -> Any:
            rows, keys = state
            return step(rows, keys, lanes, self._chunk(lanes, first, count, t * size, size, coarse))

        if longest == 1:
            return on_chunk(0, state)
        if not self.differentiable:
            return lax.fori_loop(0, trips, on_chunk, state)
        recomputed = jax.checkpoint(on_chunk, prevent_cse=False)

        def maybe(state: Any, t: Any) -> Any:
            return lax.cond(t < trips, lambda s: recomputed(t, s), lambda s: s, state), None

        return lax.scan(maybe, state, jnp.arange(longest, dtype=jnp.int32))[0]

    def _lanes(self, item: jax.Array) -> Lanes:
        tiles, lists = self.grid.tiles, self.grid.lists
        chunk = item // tiles % lists
        return Lanes(
            item=item,
            batch=item // (tiles * lists),
            list=chunk,
            tile=item % tiles,
            kv_head=chunk // self.grid.lists_per_kv_head,
        )

    def _chunk(
        self, lanes: Lanes, first: jax.Array, count: jax.Array, start: Any, size: int, coarse: bool
    ) -> Chunk:
        """Entries `start` and up of lists that begin at `first` and have `count`."""
        entries = self.operands[Slot.LIST_ENTRIES]
        offset = start + jnp.arange(size, dtype=jnp.int32)
        at = first[:, None] + offset
        words = _pick(entries, _batch_of(entries, lanes)[:, None], lanes.list[:, None], at)
        if coarse:
            rows, available = words & jnp.uint32((1 << 20) - 1), self.grid.coarse_rows
            counts = (words >> 20).astype(jnp.int32) + 1
        else:
            rows, available = words // GRANULE, self.grid.granules
            counts = jnp.ones(words.shape, jnp.int32)
        listed = (offset < count[:, None]) & (rows < available)
        rows = jnp.minimum(rows, available - 1).astype(jnp.int32)
        return Chunk(coarse, rows, listed, counts)

    def take(self, slot: Slot, i: Lanes, j: Chunk) -> jax.Array:
        """See `TiledCall.take`."""
        if slot in _FINE:
            slot = self.key_slot(slot, j)
        x = self.operands[slot]
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype)
        batch = _batch_of(x, i)
        if slot in (Slot.Q_LENGTHS, Slot.KV_LENGTHS):
            return _pick(x, batch)[:, None, None, None, None]
        if slot is Slot.Q_SEGMENTS:
            return _pick(x, batch, i.tile)[:, None, None, :, None]
        if slot is Slot.KV_SEGMENTS:
            return _pick(x, batch[:, None], j.rows).reshape(LANES, 1, 1, 1, -1)
        if slot in _FINE:
            x = _pick(x, batch[:, None], j.rows, slice(None), i.kv_head[:, None])
            return x.reshape(LANES, -1, 1, x.shape[-1])
        if slot in _COARSE:
            return _pick(x, batch[:, None], j.rows, i.kv_head[:, None])[:, :, None]
        if slot in _LOGIT_LIKE:
            index, axes = self._logit_index(x, i, j)
            x = jnp.transpose(_pick(x, *index), axes)
            return x.reshape(LANES, 1, *x.shape[1:3], -1)
        x = _pick(x, batch, i.tile, slice(None), i.list)
        if slot in _QUERY_LIKE:
            return x[:, :, None]
        x = jnp.moveaxis(x, 1, 2)[:, None]
        if slot in _ROW_LIKE:
            return x
        return jnp.where(self._is_super(j)[:, None, None, None], x[..., 1:], x[..., :1])

    def _logit_index(self, x: jax.Array, i: Lanes, j: Chunk) -> tuple[Any, tuple[int, ...]]:
        """Index of a pair's part of [batch, L, G, I, P, granules, 16], and the axes of that.

        What is taken lies, by these axes, as [Z, G, P, rows] or [Z, G, P, granules, 16]. A coarse
        row takes what its first key has.
        """

        def known(axis: int, index: jax.Array) -> jax.Array:
            return index if x.shape[axis] != 1 else jnp.zeros_like(index)

        heads = (known(0, i.batch)[:, None], known(1, i.list)[:, None], slice(None))
        queries = (known(3, i.tile)[:, None], slice(None))
        if x.shape[5] == 1 and x.shape[6] == 1:
            only = jnp.zeros((LANES, 1), jnp.int32)
            return (*heads, *queries, only, slice(None)), (0, 2, 3, 1, 4)
        if not j.coarse:
            return (*heads, *queries, j.rows, slice(None)), (0, 2, 3, 1, 4)
        granules = self.grid.granules
        ahead = (j.rows - granules) * self.grid.super_tile_granules
        firsts = jnp.where(self._is_super(j), ahead, j.rows)
        return (*heads, *queries, firsts, jnp.zeros_like(firsts)), (0, 2, 3, 1)

    def _is_super(self, j: Chunk) -> jax.Array:
        """Which coarse rows are those of super-tiles, [Z, n]."""
        return j.rows >= self.grid.granules

    def rows_of(self, x: jax.Array, i: Lanes) -> jax.Array:
        """See `TiledCall.rows_of`."""
        return x[i.item]

    def grouped_rows(self, slot: Slot) -> jax.Array:
        """See `TiledCall.grouped_rows`."""
        x = self.operands[slot].astype(self.dtype)
        x = jnp.broadcast_to(x, (self._batch, *x.shape[1:]))
        x = jnp.moveaxis(x, (3, 4), (1, 3))
        return x.reshape(*self.row_shape, *x.shape[5:])

    def positions(self, i: Lanes, j: Chunk) -> tuple[jax.Array, jax.Array]:
        """See `TiledCall.positions`."""
        size = self.grid.positions
        query = i.tile[:, None] * size + jnp.arange(size)
        key = j.rows[..., None] * GRANULE + jnp.arange(GRANULE)
        return query[:, None, None, :, None], key.reshape(LANES, 1, 1, 1, -1)

    def visible(self, i: Lanes, j: Chunk) -> jax.Array:
        """See `TiledCall.visible`; of coarse rows queries see all that are listed."""
        listed = j.listed if j.coarse else jnp.repeat(j.listed, GRANULE, axis=1)
        listed = listed[:, None, None, None]
        if not j.coarse:
            seen = super().visible(i, j)
            return listed if seen is None else listed & seen
        query, _ = self.positions(i, j)
        if self.padded_queries != self.extents.queries:
            listed &= query < self.extents.queries
        if Slot.Q_LENGTHS in self.operands:
            listed &= query < self.take(Slot.Q_LENGTHS, i, j)
        return listed

    def is_coarse(self, j: Chunk) -> bool:
        """See `TiledCall.is_coarse`."""
        return j.coarse

    def mass(self, j: Chunk) -> jax.Array:
        """See `TiledCall.mass`."""
        return jnp.log(j.counts.astype(self.dtype))[:, None, None, None]

    def by_level(self, x: jax.Array, j: Chunk) -> jax.Array:
        """See `TiledCall.by_level`."""
        level = jnp.stack([~self._is_super(j), self._is_super(j)], -1)
        return self.product("kgts,sa->kgta", x, level.astype(x.dtype))

    def _zeros(self, slot: Slot, shape: tuple[int, ...]) -> jax.Array:
        """A gradient along keys of a shape that `_arranged` would bring it from."""
        axes = len(shape) - slot.core_ndim
        batch = self._batch if any(size != 1 for size in shape[:axes]) else 1
        like = jax.eval_shape(
            lambda: self._arranged(slot, jnp.zeros((*(1,) * axes, *shape[axes:])))
        )
        return self.filled((batch, *like.shape[1:]), 0)

    def add(self, slot: Slot, x: jax.Array, i: Lanes, j: Chunk, part: jax.Array) -> jax.Array:
        """See `TiledCall.add`; sums over the axes where the gradient has size 1."""
        batch = _batch_of(x, i)[:, None]
        if slot in _FINE:
            part = part.reshape(LANES, -1, GRANULE, part.shape[-1])
            return x.at[batch, j.rows, :, i.kv_head[:, None]].add(part)
        if slot in _COARSE:
            return x.at[batch, j.rows, i.kv_head[:, None]].add(part[:, :, 0])
        index, axes = self._logit_index(x, i, j)
        _, _, heads, _, positions, granules, keys = x.shape
        part = part[:, 0]
        if granules == keys == 1:
            part = part.sum(-1, keepdims=True)[..., None]
        elif not j.coarse:
            part = part.reshape(*part.shape[:3], -1, GRANULE)
        part = sum_to(part, (LANES, heads, positions, *part.shape[3:]))
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return x.at[index].add(jnp.transpose(part, order))

    def _uncut(self, slot: Slot, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A gradient along keys in its shape, without padding, summed where it has size 1."""
        core = shape[len(shape) - slot.core_ndim :]
        if slot in _FINE:
            x = x.reshape(x.shape[0], -1, *x.shape[3:])
        elif slot is Slot.DBIAS:
            pairs = zip(x.shape[1::2], x.shape[2::2], strict=True)
            x = x.reshape(x.shape[0], *(a * b for a, b in pairs))
        x = x[(slice(None), *(slice(size) for size in core))]
        batch = self.extents.batch if x.shape[0] == self._batch else shape[: -len(core)]
        return sum_to(x.reshape(*batch, *core), shape)

    def result(self, slot: Slot, x: jax.Array) -> jax.Array:
        """See `TiledCall.result`."""
        primal = PRIMAL_OF.get(slot, slot)
        if slot in (*_QUERY_LIKE, *_ROW_LIKE, *_SHARE_LIKE):
            grid = self.grid
            x = x.reshape(
                *(self._batch, grid.lists, grid.tiles, grid.tile_heads, grid.positions),
                *x.shape[4:],
            )
            x = jnp.moveaxis(x, (1, 3), (3, 4))
            x = x.reshape(self._batch, self.padded_queries, grid.heads, *x.shape[5:])
            x = x[:, : grid.queries].reshape(self.extents.shape(slot))
        if primal in _QUERY_LIKE:
            primal = Slot.Q
        return x.astype(self.operands[primal].dtype) if primal in self.operands else x


def _cut(x: jax.Array, axis: int, sizes: tuple[int, int]) -> jax.Array:
    """Splits an axis in two, padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, math.prod(sizes) - x.shape[axis])
    return jnp.pad(x, padding).reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def _batch_of(x: jax.Array, lanes: Lanes) -> jax.Array:
    """Batch index of each lane in an operand that may broadcast."""
    return lanes.batch if x.shape[0] != 1 else jnp.zeros_like(lanes.batch)


def _pick(x: jax.Array, *index: Any) -> jax.Array:
    """x[index], every index clamped."""
    return x.at[index].get(mode="clip")
