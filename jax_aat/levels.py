"""The levels map: at which resolution each tile of queries sees each granule of keys.

A granule at level 0 is read key by key, at level 1 as its own mean row, at level 2 as part of the
mean row of its super-tile; at level 3 it is never read. The map holds two bits a granule: granule g
of a tile lies in bits 2 (g % 16) and up of word g // 16. What the levels mean for the result stands
in `docs/architecture.md`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GRANULE = 16
"""Keys of a granule, the unit of routing."""
KEY_TILE = 128
"""Keys, or coarse rows, that share one transposed list; keys that a tile of a long sequence looks
into together."""

EXACT, MEAN, SUPER_MEAN, HIDDEN = range(4)

_FIELDS = 16  # granules of a word
_GRANULES_OF_KEY_TILE = KEY_TILE // GRANULE


def tile_heads_of(groups: int) -> int:
    """Query heads of a tile: the largest power of two that divides N / K, at most 16."""
    return math.gcd(groups, 16)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a call is cut into query tiles, granules and super-tiles.

    Attributes:
      queries: T.
      keys: S.
      heads: N, of the queries.
      kv_heads: K, of keys and values.
      query_tile: Rows of a query tile: positions times heads.
      super_tile: Keys of a super-tile, the unit of the coarsest level and of the state.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    query_tile: int
    super_tile: int

    @property
    def tile_heads(self) -> int:
        """Query heads of a tile; they share a key/value head."""
        return tile_heads_of(self.heads // self.kv_heads)

    @property
    def positions(self) -> int:
        """P: consecutive query positions of a tile."""
        return self.query_tile // self.tile_heads

    @property
    def lists(self) -> int:
        """L: chunks of `tile_heads` query heads; each has a list for every tile of positions."""
        return self.heads // self.tile_heads

    @property
    def lists_per_kv_head(self) -> int:
        """Chunks of query heads that share a key/value head."""
        return self.lists // self.kv_heads

    @property
    def tiles(self) -> int:
        """I: tiles along the queries."""
        return -(-self.queries // self.positions)

    @property
    def granules(self) -> int:
        """Granules along the keys; the last one may be ragged."""
        return -(-self.keys // GRANULE)

    @property
    def super_tiles(self) -> int:
        """Super-tiles along the keys; the last one may be ragged."""
        return -(-self.keys // self.super_tile)

    @property
    def super_tile_granules(self) -> int:
        """Granules of a super-tile."""
        return self.super_tile // GRANULE

    @property
    def coarse_rows(self) -> int:
        """R: mean rows, those of granules first, then those of super-tiles."""
        return self.granules + self.super_tiles

    @property
    def words(self) -> int:
        """W: words of the levels map of one tile."""
        return -(-self.granules // _FIELDS)

    @property
    def key_tiles(self) -> int:
        """Key tiles along the keys; each has a transposed list, and those of coarse rows follow."""
        return -(-self.keys // KEY_TILE)

    @property
    def coarse_tiles(self) -> int:
        """Transposed lists of tiles of coarse rows."""
        return -(-self.coarse_rows // KEY_TILE)

    @property
    def granule_sizes(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Keys of each granule, [granules] int32."""
        starts = np.arange(self.granules) * GRANULE
        return np.minimum(GRANULE, self.keys - starts).astype(np.int32)

    @property
    def super_tile_of(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Super-tile of each granule, [granules] int32."""
        return (np.arange(self.granules) // self.super_tile_granules).astype(np.int32)

    @property
    def super_tile_of_key_tile(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Super-tile of each key tile, [key tiles] int32."""
        return (np.arange(self.key_tiles) // (self.super_tile // KEY_TILE)).astype(np.int32)

    def by_super_tile(self, x: jax.Array) -> jax.Array:
        """Splits the last axis, along granules, into [super-tiles, granules], padded with 0."""
        return _split(x, self.super_tiles, self.super_tile_granules)

    def by_key_tile(self, x: jax.Array) -> jax.Array:
        """Splits the last axis, along granules, into [key tiles, 8], padded with 0."""
        return _split(x, self.key_tiles, _GRANULES_OF_KEY_TILE)


def _split(x: jax.Array, parts: int, size: int) -> jax.Array:
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, parts * size - x.shape[-1])])
    return jnp.reshape(padded, (*x.shape[:-1], parts, size))


def pack_levels(levels: jax.Array) -> jax.Array:
    """[..., granules] integers as [..., W] uint32; fields past the last granule are hidden."""
    words = -(-levels.shape[-1] // _FIELDS)
    missing = words * _FIELDS - levels.shape[-1]
    padding = [(0, 0)] * (levels.ndim - 1) + [(0, missing)]
    fields = jnp.pad(levels.astype(jnp.uint32), padding, constant_values=HIDDEN)
    fields = fields.reshape(*levels.shape[:-1], words, _FIELDS)
    return (fields << _shifts()).sum(-1, dtype=jnp.uint32)


def unpack_levels(words: jax.Array, granules: int) -> jax.Array:
    """The inverse of `pack_levels`: [..., granules] uint32."""
    fields = (words[..., None] >> _shifts()) & jnp.uint32(3)
    return jnp.reshape(fields, (*words.shape[:-1], -1))[..., :granules]


def count_levels(words: jax.Array) -> list[jax.Array]:
    """How many granules of a tile are at level 0, at level 1 and at level 2: [...] int32 each.

    Args:
      words: [..., W] uint32, as `pack_levels` makes them.
    """
    first = jnp.uint32(0x55555555)
    low, high = words & first, (words >> 1) & first
    fields = (first & ~(low | high), low & ~high, high & ~low)
    return [lax.population_count(x).astype(jnp.int32).sum(-1) for x in fields]


def exact_keys(count: jax.Array, words: jax.Array, grid: Grid) -> jax.Array:
    """Keys of the granules that a tile sees at level 0, [...] int32.

    Args:
      count: How many granules these are, [...].
      words: [..., W] uint32, as `pack_levels` makes them.
      grid: How the call is cut; the last granule may have fewer keys than others.
    """
    last = grid.granules - 1
    level = words[..., last // _FIELDS] >> 2 * (last % _FIELDS) & 3
    missing = GRANULE * grid.granules - grid.keys
    return GRANULE * count - jnp.where(level == EXACT, missing, 0)


def without_means(words: jax.Array) -> jax.Array:
    """A levels map, [..., W] uint32, in which levels 1 and 2 are hidden."""
    low, high = words & jnp.uint32(0x55555555), words & jnp.uint32(0xAAAAAAAA)
    return jnp.bitwise_or(words, low << 1 | high >> 1)


def settled(
    finer: jax.Array, level: jax.Array, coarser: jax.Array, previous: jax.Array
) -> jax.Array:
    """Levels with hysteresis.

    Args:
      finer: Levels [...] at a price somewhat lower.
      level: Levels at the price.
      coarser: Levels at one somewhat higher.
      previous: Levels of the last call; what was hidden has no say.
    """
    previous = previous.astype(level.dtype)
    kept = jnp.clip(previous, jnp.minimum(finer, coarser), jnp.maximum(finer, coarser))
    return jnp.where(previous == HIDDEN, level, kept)


def _shifts() -> jax.Array:
    return 2 * jnp.arange(_FIELDS, dtype=jnp.uint32)
