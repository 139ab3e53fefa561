"""Random levels maps and the work lists of them, by the words of docs/architecture.md, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_aat.levels import EXACT, GRANULE, HIDDEN, MEAN, SUPER_MEAN, Grid
from jax_aat.problem import Slot

Array = np.ndarray[Any, Any]

PADDING = 0xFFFFFFFF
KEY_TILE = 128


@dataclass(frozen=True)
class Tile:
    """What one query tile sees: granules by kind, and coarse rows with their numbers of keys."""

    full: list[int]
    mixed: list[int]
    coarse: dict[int, int]


def random_levels(rng: np.random.Generator, grid: Grid, visible: Array, full: Array) -> Array:
    """Levels [B, L, I, granules] that a plan may hold.

    Args:
      rng: Where they come from.
      grid: How the call is cut.
      visible: [B, N, T, S], which query sees which key.
      full: [B, N, T, S], true too where a query past its length sees nothing.
    """
    levels = np.full((visible.shape[0], grid.lists, grid.tiles, grid.granules), HIDDEN)
    whole_super_tile = np.zeros_like(levels, bool)
    for index in np.ndindex(levels.shape):
        some = rows_of(grid, visible, index)
        every = rows_of(grid, full, index).all()
        choices = [HIDDEN, EXACT] + ([MEAN] if every else [])
        levels[index] = rng.choice(choices) if some.any() else HIDDEN
        whole_super_tile[index] = every
    for batch, chunk, tile in np.ndindex(levels.shape[:-1]):
        for start in range(0, grid.granules, grid.super_tile_granules):
            part = slice(start, start + grid.super_tile_granules)
            if not whole_super_tile[batch, chunk, tile, part].all():
                continue
            own = levels[batch, chunk, tile, part]
            own[rng.random(own.shape) < 0.4] = SUPER_MEAN
    mix_first_tile(levels, whole_super_tile)
    return levels


def mix_first_tile(levels: Array, whole: Array) -> None:
    """Gives one tile an exact and a coarse granule: else the derivative of all shares could be 0.

    Nothing can be compared with 0 by relative error.
    """
    for index in np.ndindex(levels.shape[:-1]):
        possible = np.flatnonzero(whole[index])
        if len(possible) > 1:
            levels[index][possible[:2]] = EXACT, MEAN
            return


def rows_of(grid: Grid, x: Array, index: tuple[int, ...]) -> Array:
    """The part of [B, N, T, S] that one query tile and one granule share."""
    batch, chunk, tile, granule = index
    heads = slice(chunk * grid.tile_heads, (chunk + 1) * grid.tile_heads)
    rows = slice(tile * grid.positions, (tile + 1) * grid.positions)
    return x[batch, heads, rows, granule * GRANULE : (granule + 1) * GRANULE]


def tiles_of(grid: Grid, levels: Array, visible: Array) -> dict[tuple[int, int, int], Tile]:
    """What each query tile [B, L, I] sees."""
    tiles = {}
    for at in np.ndindex(levels.shape[:-1]):
        exact = np.flatnonzero(levels[at] == EXACT).tolist()
        full = [g for g in exact if rows_of(grid, visible, (*at, g)).all()]
        keys_of = grid.granule_sizes
        coarse = {int(g): int(keys_of[g]) for g in np.flatnonzero(levels[at] == MEAN)}
        size = grid.super_tile_granules
        for j in range(grid.super_tiles):
            part = slice(j * size, (j + 1) * size)
            keys = int(keys_of[part][levels[at][part] == SUPER_MEAN].sum())
            if keys:
                coarse[grid.granules + j] = keys
        tiles[at] = Tile(full, [g for g in exact if g not in full], coarse)
    return tiles


def packed(levels: Array) -> Array:
    """Levels as words, [B, L, I, W] uint32."""
    missing = -levels.shape[-1] % 16
    fields = np.pad(levels, [(0, 0)] * 3 + [(0, missing)], constant_values=HIDDEN)
    fields = fields.reshape(*levels.shape[:-1], -1, 16).astype(np.uint64)
    return (fields << (2 * np.arange(16, dtype=np.uint64))).sum(-1).astype(np.uint32)


def _rounded(entries: list[int], step: int) -> list[int]:
    return entries + [PADDING] * (-len(entries) % step)


def plan_of(grid: Grid, levels: Array, visible: Array) -> dict[Slot, Array]:
    """The operands of a plan."""
    tiles = tiles_of(grid, levels, visible)
    batch = levels.shape[0]
    headers = np.zeros((batch, grid.lists, grid.tiles, 4), np.uint32)
    lists: dict[tuple[int, int], list[int]] = {}
    for (b, chunk, i), tile in tiles.items():
        entries = lists.setdefault((b, chunk), [])
        exact = [g * GRANULE for g in tile.full + tile.mixed]
        headers[b, chunk, i] = (len(entries), len(tile.full), len(exact), len(tile.coarse))
        entries += _rounded(exact, 4)
        entries += _rounded([row | (n - 1) << 20 for row, n in sorted(tile.coarse.items())], 64)

    key_tiles = -(-grid.keys // KEY_TILE)
    key_headers = np.zeros(
        (batch, grid.kv_heads, key_tiles + -(-grid.coarse_rows // KEY_TILE), 4), np.uint32
    )
    key_lists: dict[tuple[int, int], list[int]] = {}
    for b, kv_head, number in np.ndindex(key_headers.shape[:-1]):
        own = key_lists.setdefault((b, kv_head), [])
        first = len(own)
        for chunk, i in np.ndindex(grid.lists_per_kv_head, grid.tiles):
            tile = tiles[b, kv_head * grid.lists_per_kv_head + chunk, i]
            if number < key_tiles:
                found = any(g * GRANULE // KEY_TILE == number for g in tile.full + tile.mixed)
            else:
                found = any(row // KEY_TILE == number - key_tiles for row in tile.coarse)
            if found:
                own.append(chunk * grid.tiles + i)
        key_headers[b, kv_head, number, :2] = (first, len(own) - first)
    return {
        Slot.LEVELS: packed(levels),
        Slot.LIST_HEADERS: headers,
        Slot.LIST_ENTRIES: _as_array(lists, (batch, grid.lists)),
        Slot.KEY_LIST_HEADERS: key_headers,
        Slot.KEY_LIST_ENTRIES: _as_array(key_lists, (batch, grid.kv_heads)),
    }


def _as_array(lists: dict[tuple[int, int], list[int]], shape: tuple[int, int]) -> Array:
    capacity = max(4, *map(len, lists.values()))
    result = np.full((*shape, capacity), PADDING, np.uint32)
    for at, entries in lists.items():
        result[at][: len(entries)] = entries
    return result
