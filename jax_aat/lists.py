"""Work lists of a plan: made from its levels map, of sizes that shapes alone decide.

Their layout stands in `docs/architecture.md`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.levels import EXACT, GRANULE, KEY_TILE, MEAN, SUPER_MEAN, Grid, unpack_levels

NOTHING = np.uint32(0xFFFFFFFF)
"""What pads a list."""
_EXACT_ALIGNMENT = 4
_COARSE_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Entries that the lists have room for, whatever the levels are.

    Attributes:
      entries: Of one list of all tiles of a chunk of query heads.
      granules: Those of them that granules take; the rest is for super-tiles and padding.
      key_entries: Of one transposed list of all tiles of a key/value head.
    """

    entries: int
    granules: int
    key_entries: int

    @classmethod
    def of(cls, grid: Grid, causal: bool, window: tuple[int, int]) -> "Capacity":
        """Room for every granule and super-tile that causality and window let a tile see."""
        first = np.arange(grid.tiles) * grid.positions
        last = np.minimum(first + grid.positions, grid.queries) - 1
        right = min([0] * causal + [window[1]] * (window[1] >= 0), default=grid.keys)
        left = window[0] if window[0] >= 0 else grid.keys + grid.queries
        low = np.clip(first - left, 0, grid.keys)
        high = np.clip(last + right + 1, 0, grid.keys)
        seen = high > low

        def touched(size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.where(seen, -(-high // size) - low // size, 0)

        granules, super_tiles = int(touched(GRANULE).sum()), int(touched(grid.super_tile).sum())
        padding = grid.tiles * ((_EXACT_ALIGNMENT - 1) + (_COARSE_ALIGNMENT - 1))
        of_keys = touched(KEY_TILE).sum() + grid.tiles * grid.coarse_tiles
        entries = granules + super_tiles + padding
        return cls(entries, granules, int(of_keys) * grid.lists_per_kv_head)


def pack(
    levels: jax.Array, full: jax.Array, grid: Grid, capacity: Capacity
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Makes the work lists of a levels map.

    Args:
      levels: [*batch, L, I, W] uint32.
      full: Which granules every row of a tile sees entirely, broadcasts to
        [*batch, L, I, granules]; bool.
      grid: How the call is cut.
      capacity: Sizes of the lists.

    Returns:
      List headers [*batch, L, I, 4] and entries [*batch, L, capacity.entries], key list headers
      [*batch, K, key tiles + coarse tiles, 4] and entries [*batch, K, capacity.key_entries];
      uint32.
    """
    level = unpack_levels(levels, grid.granules)
    exact = level == EXACT
    counts = jnp.concatenate(
        [
            jnp.where(level == MEAN, grid.granule_sizes, 0),
            grid.by_super_tile(jnp.where(level == SUPER_MEAN, grid.granule_sizes, 0)).sum(-1),
        ],
        axis=-1,
    )
    listed = counts > 0
    headers, entries = _lists(exact, full & exact, counts, listed, capacity.entries)
    by_key = jnp.concatenate(
        [_any_of_tile(exact, KEY_TILE // GRANULE), _any_of_tile(listed, KEY_TILE)], axis=-1
    )
    # [*batch, L, I, tiles of keys] to [*batch, K, tiles of keys, query tiles of all chunks].
    by_key = jnp.moveaxis(by_key, -1, -3)
    batch = by_key.shape[:-3]
    by_key = by_key.reshape(
        *batch, by_key.shape[-3], grid.kv_heads, grid.lists_per_kv_head * grid.tiles
    )
    return headers, entries, *_key_lists(jnp.moveaxis(by_key, -2, -3), capacity.key_entries)


def _lists(
    exact: jax.Array, full: jax.Array, counts: jax.Array, listed: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    mixed = exact & ~full
    full_count, exact_count, row_count = (_count(x) for x in (full, exact, listed))
    exact_room = _rounded(exact_count, _EXACT_ALIGNMENT)
    room = exact_room + _rounded(row_count, _COARSE_ALIGNMENT)
    first = jnp.cumsum(room, -1) - room
    headers = jnp.stack([first, full_count, exact_count, row_count], -1).astype(jnp.uint32)

    at = jnp.where(full, _rank(full), full_count[..., None] + _rank(mixed))
    at = jnp.where(exact, first[..., None] + at, capacity)
    starts = jnp.arange(exact.shape[-1], dtype=jnp.uint32) * GRANULE
    row_at = jnp.where(listed, (first + exact_room)[..., None] + _rank(listed), capacity)
    rows = jnp.arange(listed.shape[-1], dtype=jnp.uint32)
    row_words = rows | (jnp.maximum(counts, 1) - 1).astype(jnp.uint32) << 20
    at = jnp.concatenate([at, row_at], -1)
    words = jnp.concatenate([jnp.broadcast_to(starts, exact.shape), row_words], -1)
    return headers, _scattered(at, words, capacity)


def _key_lists(member: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Headers and entries of lists of what is true of [..., lists, members]."""
    count = _count(member)
    first = jnp.cumsum(count, -1) - count
    zero = jnp.zeros_like(count)
    headers = jnp.stack([first, count, zero, zero], -1).astype(jnp.uint32)
    at = jnp.where(member, first[..., None] + _rank(member), capacity)
    words = jnp.broadcast_to(jnp.arange(member.shape[-1], dtype=jnp.uint32), member.shape)
    return headers, _scattered(at, words, capacity)


def _scattered(at: jax.Array, words: jax.Array, capacity: int) -> jax.Array:
    """[..., capacity]: words [..., lists, members] at their places, but for those past the end."""
    batch = at.shape[:-2]

    def one(at: jax.Array, words: jax.Array) -> jax.Array:
        empty = jnp.full(capacity, NOTHING)
        return empty.at[at].set(words, mode="drop", unique_indices=False)

    flat = jax.vmap(one)(
        at.reshape(-1, at.shape[-2] * at.shape[-1]), words.reshape(-1, at.shape[-2] * at.shape[-1])
    )
    return flat.reshape(*batch, capacity)


def _any_of_tile(x: jax.Array, size: int) -> jax.Array:
    """Whether any of `size` neighbours along the last axis is true."""
    tiles = -(-x.shape[-1] // size)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tiles * size - x.shape[-1])])
    return padded.reshape(*x.shape[:-1], tiles, size).any(-1)


def _count(x: jax.Array) -> jax.Array:
    return x.sum(-1, dtype=jnp.int32)


def _rank(x: jax.Array) -> jax.Array:
    """How many before each along the last axis are true."""
    return jnp.cumsum(x, -1, dtype=jnp.int32) - x


def _rounded(x: jax.Array, alignment: int) -> jax.Array:
    return (x + alignment - 1) // alignment * alignment
