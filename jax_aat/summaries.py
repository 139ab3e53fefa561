"""What the router judges by: sub-queries of some positions, statistics of keys and values."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_aat.levels import GRANULE, KEY_TILE, Grid
from jax_aat.problem import Operands, Options, Slot
from jax_aat.pyramid import Blocks

SUB_QUERY = 16
"""Positions of a sub-query in stage 1."""
FINE = 4
"""Positions of a sub-query in stage 2, and keys of a part of a granule."""

_COUNTS = ("log_count", "fine_log_count", "key_tile_log_count")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """Sub-queries; A of 16 positions a tile, each of F finer ones.

    Attributes:
      mean: Of queries times scale, [I, B, L, A, F, H].
      square: Mean square of each component, likewise.
      weight: Share of the positions that are queries, [I, B, L, A, F].
    """

    mean: jax.Array
    square: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, operands: Operands, options: Options, grid: Grid) -> "Queries":
        """Sub-queries of all tiles."""
        q = operands[Slot.Q].astype(jnp.float32) * options.scale
        batch, _, _, head_dim = q.shape
        size = min(SUB_QUERY, grid.positions)
        fine = min(FINE, size)
        whole = grid.tiles * grid.positions
        q = jnp.pad(q, ((0, 0), (0, whole - grid.queries), (0, 0), (0, 0)))
        position = jnp.arange(whole)
        valid = (position < grid.queries)[None]
        if Slot.Q_LENGTHS in operands:
            valid &= position < operands[Slot.Q_LENGTHS][:, None]
        valid = jnp.broadcast_to(valid, (batch, whole))
        q = jnp.where(valid[..., None, None], q, 0)
        cut = (batch, grid.tiles, grid.positions // size, size // fine, fine)
        count = valid.reshape(cut).sum(-1).astype(jnp.float32)[..., None, None]
        parts = q.reshape(*cut, grid.lists, grid.tile_heads, head_dim)
        mean, square = (
            cls._ordered(x.sum(4) / jnp.maximum(count, 1)[..., None])
            for x in (parts, jnp.square(parts))
        )
        weight = jnp.broadcast_to(count / fine, (*cut[:-1], grid.lists, grid.tile_heads))
        return cls(mean, square, cls._ordered(weight[..., None])[..., 0])

    @staticmethod
    def _ordered(x: jax.Array) -> jax.Array:
        """[B, I, blocks, F, L, G, H] as [I, B, L, blocks * G, F, H]."""
        x = jnp.transpose(x, (1, 0, 4, 2, 5, 3, 6))
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    def at(self, tiles: jax.Array) -> "Queries":
        """Those of some tiles, with the batch axis first: [B, L, n, A, F, ...]."""
        return Queries(
            *(jnp.moveaxis(x[tiles], 0, 2) for x in (self.mean, self.square, self.weight))
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Statistics of keys and values, [B, K, granules, ...], float32.

    Attributes:
      mean: Of the keys of a granule.
      variance: Of each component.
      fine_mean: Of each 4 keys, [B, K, granules, 4, H].
      fine_variance: Likewise.
      log_count: Logarithm of the number of keys, [B or 1, granules].
      fine_log_count: Of each 4 keys, [B or 1, granules, 4]; -inf where there are none.
      super_mean: Mean of the keys of super-tiles, [B, K, super-tiles, H].
      key_tile_mean: Mean of the keys of key tiles, [B, K, key tiles, H].
      key_tile_variance: Of each component, likewise.
      key_tile_log_count: Logarithm of the number of keys, [B or 1, key tiles].
      scatter: Mean squared distance of values from their granule's mean, over their mean square.
      apart: Squared distance of a granule's mean value from its super-tile's, over the same.
      size: Mean squared value of a granule, over the same.
    """

    mean: jax.Array
    variance: jax.Array
    fine_mean: jax.Array
    fine_variance: jax.Array
    log_count: jax.Array
    fine_log_count: jax.Array
    super_mean: jax.Array
    key_tile_mean: jax.Array
    key_tile_variance: jax.Array
    key_tile_log_count: jax.Array
    scatter: jax.Array
    apart: jax.Array
    size: jax.Array

    @classmethod
    def of(cls, operands: Operands, grid: Grid) -> "Keys":
        """Statistics of all keys and values."""
        lengths = operands.get(Slot.KV_LENGTHS)
        k, v = (operands[slot].astype(jnp.float32) for slot in (Slot.K, Slot.V))
        granules, fine = Blocks.of(k, GRANULE, lengths), Blocks.of(k, FINE, lengths)
        super_keys, super_values = (Blocks.of(x, grid.super_tile, lengths) for x in (k, v))
        key_tiles, values = Blocks.of(k, KEY_TILE, lengths), Blocks.of(v, GRANULE, lengths)

        def by_head(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 2, 1)

        def in_granules(x: jax.Array) -> jax.Array:
            parts = GRANULE // FINE
            missing = grid.granules * parts - x.shape[1]
            x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
            return x.reshape(x.shape[0], grid.granules, parts, *x.shape[2:])

        square = values.variance.sum(-1) + jnp.square(values.mean).sum(-1)
        count = granules.count[..., None]
        total = (square * count).sum(1, keepdims=True) / jnp.maximum(count.sum(1, keepdims=True), 1)
        unit = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        apart = jnp.square(values.mean - super_values.mean[:, grid.super_tile_of]).sum(-1)
        return cls(
            mean=by_head(granules.mean),
            variance=by_head(granules.variance),
            fine_mean=jnp.moveaxis(in_granules(fine.mean), 3, 1),
            fine_variance=jnp.moveaxis(in_granules(fine.variance), 3, 1),
            log_count=jnp.log(jnp.maximum(granules.count, 1)),
            fine_log_count=jnp.log(in_granules(fine.count)),
            super_mean=by_head(super_keys.mean),
            key_tile_mean=by_head(key_tiles.mean),
            key_tile_variance=by_head(key_tiles.variance),
            key_tile_log_count=jnp.log(jnp.maximum(key_tiles.count, 1)),
            scatter=by_head(values.variance.sum(-1) / unit),
            apart=by_head(apart / unit),
            size=by_head(square / unit),
        )

    def by_key_tile(self, grid: Grid) -> "Keys":
        """With granules split by key tile, and an axis of lists [B, L, ...] for that of heads.

        Super-tiles, too, are by key tile then: each has those of its own.
        """

        def split(name: str, x: jax.Array) -> jax.Array:
            axis = 1 if name in _COUNTS else 2
            if name.startswith("super"):
                x = x[:, :, grid.super_tile_of_key_tile]
            elif not name.startswith("key_tile"):
                missing = grid.key_tiles * (KEY_TILE // GRANULE) - x.shape[axis]
                padding = [(0, 0)] * x.ndim
                padding[axis] = (0, missing)
                # Granules that do not exist have no key.
                empty = -jnp.inf if name == "fine_log_count" else 0
                x = jnp.pad(x, padding, constant_values=empty)
                x = x.reshape(*x.shape[:axis], grid.key_tiles, -1, *x.shape[axis + 1 :])
            if name in _COUNTS:
                return jnp.broadcast_to(x[:, None], (x.shape[0], grid.lists, *x.shape[1:]))
            return jnp.repeat(x, grid.lists_per_kv_head, axis=1)

        return Keys(**{name: split(name, x) for name, x in vars(self).items()})

    def gathered(self, chosen: Callable[[jax.Array], jax.Array]) -> "Keys":
        """Some key tiles of those of one list.

        Args:
          chosen: Turns [B or 1, key tiles, 8, ...] into [B, 1, some * 8, ...].
        """

        def of(name: str, x: jax.Array) -> jax.Array:
            x = chosen(x[:, :, None] if name.startswith(("super", "key_tile")) else x)
            return x[:, 0] if name in _COUNTS else x

        return Keys(**{name: of(name, x) for name, x in vars(self).items()})


def subqueries(grid: Grid) -> tuple[int, int]:
    """Sub-queries of a tile in stage 1 and in stage 2."""
    size = min(SUB_QUERY, grid.positions)
    coarse = math.ceil(grid.positions / size) * grid.tile_heads
    return coarse, coarse * (size // min(FINE, size))
