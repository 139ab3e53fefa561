"""`TilePlan`: the levels of a call with the work lists made from them."""

import dataclasses
import functools
import json
import os
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.adaptation import Adaptation
from jax_aat.boundary import Boundary, boundary
from jax_aat.levels import (
    EXACT,
    GRANULE,
    HIDDEN,
    MEAN,
    SUPER_MEAN,
    Grid,
    pack_levels,
    unpack_levels,
)
from jax_aat.lists import Capacity, pack
from jax_aat.primitives.plan import make_plan, serves, shader_goal
from jax_aat.problem import Operands, Options, Slot, extents
from jax_aat.router import route

_LISTS = {
    Slot.LIST_HEADERS: "list_headers",
    Slot.LIST_ENTRIES: "list_entries",
    Slot.KEY_LIST_HEADERS: "key_list_headers",
    Slot.KEY_LIST_ENTRIES: "key_list_entries",
}
_ARRAYS = ("levels", *_LISTS.values(), "log_lambda")
_NOT_A_PLAN = (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a file that holds something else raises."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(_ARRAYS),
    meta_fields=["grid", "adaptation", "causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """At which level every tile of queries sees every granule of keys, and the lists of that.

    A pytree of arrays whose sizes depend on shapes and options only, so that plans are carried
    through loops, stacked, stored and reused; it has no gradient. Layouts stand in
    `docs/architecture.md`.

    Attributes:
      levels: [B, L, I, W] uint32, two bits a granule.
      list_headers: [B, L, I, 4] uint32.
      list_entries: [B, L, capacity] uint32.
      key_list_headers: [B, K, tiles of keys and of coarse rows, 4] uint32.
      key_list_entries: [B, K, key capacity] uint32.
      log_lambda: Natural logarithm of the price of a row, [B, L] float32.
      grid: How the call is cut.
      adaptation: What was aimed at.
      causal: Whether the call is causal.
      window: That of the call.
    """

    levels: jax.Array
    list_headers: jax.Array
    list_entries: jax.Array
    key_list_headers: jax.Array
    key_list_entries: jax.Array
    log_lambda: jax.Array
    grid: Grid
    adaptation: Adaptation
    causal: bool
    window: tuple[int, int]

    @classmethod
    def choose(
        cls,
        operands: Operands,
        options: Options,
        adaptation: Adaptation,
        log_lambda: jax.Array | None = None,
        previous: jax.Array | None = None,
        implementation: str = "xla",
    ) -> "TilePlan":
        """Plans a call.

        Args:
          operands: As those of `jax_aat.router.route`.
          options: Likewise.
          adaptation: Likewise.
          log_lambda: Likewise.
          previous: Likewise.
          implementation: 'vulkan': by shaders, where they serve the call; 'xla': in jax.numpy.
        """
        grid = grid_of(operands, adaptation)
        if implementation == "vulkan" and serves(operands, adaptation):
            goal = shader_goal(operands, options, grid, adaptation, log_lambda, previous)
            made = make_plan(operands | goal, options, adaptation)
            return cls.of_results(made, grid, options, adaptation)
        levels, log_lambda = route(operands, options, grid, adaptation, log_lambda, previous)
        return cls.of_levels(levels, log_lambda, operands, options, adaptation)

    @classmethod
    def of_results(
        cls, made: Operands, grid: Grid, options: Options, adaptation: Adaptation
    ) -> "TilePlan":
        """The plan that shaders made, by `jax_aat.primitives.plan`."""
        return cls(
            levels=made[Slot.LEVELS],
            log_lambda=jnp.log(made[Slot.LAMBDA]),
            grid=grid,
            adaptation=adaptation,
            causal=options.causal,
            window=options.window,
            **{name: made[slot] for slot, name in _LISTS.items()},
        )

    @classmethod
    def of_levels(
        cls,
        levels: jax.Array,
        log_lambda: jax.Array,
        operands: Operands,
        options: Options,
        adaptation: Adaptation,
    ) -> "TilePlan":
        """The plan of given levels, [B, L, I, W], which must keep to the boundary of the call."""
        grid = grid_of(operands, adaptation)
        capacity = Capacity.of(grid, options.causal, options.window)
        lists = pack(levels, boundary(operands, options, grid).full, grid, capacity)
        return cls(levels, *lists, log_lambda, grid, adaptation, options.causal, options.window)

    @classmethod
    def unfilled(
        cls,
        grid: Grid,
        adaptation: Adaptation,
        causal: bool,
        window: tuple[int, int],
        batch: int,
    ) -> "TilePlan":
        """A plan that hides everything, in the shapes of those of a call; to be replaced."""
        capacity = Capacity.of(grid, causal, window)
        tiles = (batch, grid.lists, grid.tiles)
        key_tiles = grid.key_tiles + grid.coarse_tiles

        def filled(*shape: int, value: int = 0) -> jax.Array:
            return jnp.full(shape, value, jnp.uint32)

        return cls(
            filled(*tiles, grid.words, value=0xFFFFFFFF),
            filled(*tiles, 4),
            filled(batch, grid.lists, capacity.entries, value=0xFFFFFFFF),
            filled(batch, grid.kv_heads, key_tiles, 4),
            filled(batch, grid.kv_heads, capacity.key_entries, value=0xFFFFFFFF),
            jnp.zeros((batch, grid.lists), jnp.float32),
            *(grid, adaptation, causal, window),
        )

    def for_call(self, operands: Operands, options: Options) -> "TilePlan":
        """The plan for a call, which must have the shapes, causality and window of its own.

        What lengths, segments, mask and bias of that call do not let a tile see is hidden, what
        they do not let it see by a mean row is exact, and so is what the plan has hidden and they
        show.

        Raises:
          ValueError: Shapes, causality or window are others.
        """
        grid = grid_of(operands, self.adaptation)
        batch = operands[Slot.Q].shape[0]
        for name, mine, theirs in (
            ("a grid", self.grid, grid),
            ("is_causal", self.causal, options.causal),
            ("local_window_size", self.window, options.window),
            ("a batch size", self.levels.shape[0], batch),
        ):
            if mine != theirs:
                raise ValueError(f"plan: was made for {name} of {mine}, the call has {theirs}")
        moving = (Slot.Q_LENGTHS, Slot.KV_LENGTHS, Slot.Q_SEGMENTS, Slot.MASK, Slot.BIAS)
        if not any(slot in operands for slot in moving):
            return self
        level = unpack_levels(self.levels, grid.granules)
        drops = self.adaptation.levels == (EXACT,)
        levels = pack_levels(boundary(operands, options, grid).applied(level, drops))
        return self.of_levels(levels, self.log_lambda, operands, options, self.adaptation)

    def operands(self) -> Operands:
        """The plan as operands of a primitive."""
        lists = {slot: getattr(self, name) for slot, name in _LISTS.items()}
        return {Slot.LEVELS: self.levels} | lists

    def validate(self) -> "TilePlan":
        """Checks a plan of concrete arrays, on the host, for example one that was read from a file.

        Returns:
          The plan itself.

        Raises:
          ValueError: An array has a wrong shape or dtype, levels let a tile see what causality and
            window hide, or a list does not say what the levels say.
        """
        batch = self.levels.shape[:-3]
        grid, capacity = self.grid, Capacity.of(self.grid, self.causal, self.window)
        tiles = (grid.lists, grid.tiles)
        key_tiles = grid.key_tiles + grid.coarse_tiles
        for name, core, dtype in (
            ("levels", (*tiles, grid.words), "uint32"),
            ("list_headers", (*tiles, 4), "uint32"),
            ("list_entries", (grid.lists, capacity.entries), "uint32"),
            ("key_list_headers", (grid.kv_heads, key_tiles, 4), "uint32"),
            ("key_list_entries", (grid.kv_heads, capacity.key_entries), "uint32"),
            ("log_lambda", (grid.lists,), "float32"),
        ):
            x = getattr(self, name)
            if x.shape != (*batch, *core) or x.dtype.name != dtype:
                raise ValueError(
                    f"plan.{name}: got {x.dtype.name}{list(x.shape)}, "
                    f"expected {dtype}{[*batch, *core]}"
                )
        flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[len(batch) :])), self)
        packed, level, allowed, lists = _expected(flat)
        _require(flat.levels, packed, "levels", "a level of a granule past the last")
        _require(level, allowed, "levels", "a level that causality or window forbids")
        for name, expected in zip(_LISTS.values(), lists, strict=True):
            _require(getattr(flat, name), expected, name, "something else than the levels say")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a plan of concrete arrays to a file, which is that of `numpy.savez_compressed`.

        Raises:
          OSError: The file cannot be written.
        """
        fixed = {
            "grid": dataclasses.asdict(self.grid),
            "adaptation": dataclasses.asdict(self.adaptation),
            "causal": self.causal,
            "window": self.window,
        }
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        # Given a name, NumPy would put .npz behind it.
        with open(path, "wb") as file:
            np.savez_compressed(file, fixed=np.array(json.dumps(fixed)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TilePlan":
        """Reads a plan that `save` wrote and validates it.

        Raises:
          OSError: The file cannot be read.
          ValueError: It is not a plan, or it is corrupted; says what is wrong.
        """
        try:
            # What is no archive NumPy takes for a pickle.
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
                fixed = json.loads(str(file["fixed"]))
                arrays = {name: jnp.asarray(file[name]) for name in _ARRAYS}
            adaptation = fixed["adaptation"] | {"levels": tuple(fixed["adaptation"]["levels"])}
            return cls(
                **arrays,
                grid=Grid(**fixed["grid"]),
                adaptation=Adaptation(**adaptation),
                causal=bool(fixed["causal"]),
                window=tuple(fixed["window"]),
            ).validate()
        except _NOT_A_PLAN as error:
            raise ValueError(f"{path}: is not a plan that TilePlan.save wrote: {error}") from error

    def rows(self) -> jax.Array:
        """Keys and coarse rows that each tile reads, [B, L, I] float32."""
        level = unpack_levels(self.levels, self.grid.granules)
        exact = jnp.where(level == EXACT, self.grid.granule_sizes, 0).sum(-1)
        return (exact + self.list_headers[..., 3].astype(exact.dtype)).astype(jnp.float32)

    def row_flops(self, head_dim: int) -> jax.Array:
        """FLOPs of reading them, by batch entry: [B] float32."""
        return 4.0 * head_dim * self.grid.query_tile * self.rows().sum((-2, -1))

    def __str__(self) -> str:
        grid = self.grid
        shape = (
            f"{grid.queries} queries x {grid.keys} keys, {grid.heads} heads over {grid.kv_heads}, "
            f"tiles of {grid.positions} positions x {grid.tile_heads} heads"
        )
        if isinstance(self.levels, jax.core.Tracer):
            return f"TilePlan({shape}; traced)"
        level = np.asarray(unpack_levels(self.levels, grid.granules))
        shown = (level != HIDDEN).sum()
        shares = (
            f"{name} {(level == which).sum() / max(shown, 1):.1%}"
            for which, name in ((EXACT, "exact"), (MEAN, "mean"), (SUPER_MEAN, "super-tile"))
        )
        prices = np.asarray(self.log_lambda)
        return (
            f"TilePlan({shape}; {', '.join(shares)} of the granules seen; "
            f"log lambda {prices.min():.2f} to {prices.max():.2f})"
        )


def grid_of(operands: Operands, adaptation: Adaptation) -> Grid:
    """How an adaptive call is cut.

    Raises:
      ValueError: A length is symbolic.
    """
    sizes = extents(operands)
    for name, size in (("query", sizes.queries), ("key", sizes.keys)):
        if not isinstance(size, int):
            raise ValueError(f"{name}: got symbolic length {size}, adaptation needs a known one")
    return Grid(sizes.queries, sizes.keys, sizes.heads, sizes.kv_heads, adaptation.query_tile)


def _require(actual: Any, expected: Any, name: str, what: str) -> None:
    wrong = np.argwhere(np.asarray(actual) != np.asarray(expected))
    if len(wrong):
        raise ValueError(
            f"plan.{name}: the plan is corrupted, it has {what}, first at {wrong[0].tolist()}"
        )


@jax.jit
def _expected(plan: TilePlan) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """What the levels of a plan with one batch axis allow to stand in it.

    Returns:
      The levels map and the levels that it holds, those that causality and window let them be, and
      the lists that say the same.
    """
    grid = plan.grid
    level = unpack_levels(plan.levels, grid.granules)
    options = Options(1.0, plan.causal, plan.window, query_tile=grid.query_tile)
    allowed = _possible(level, options, grid).applied(level, drops=True)
    # Lengths, segments and masks may have hidden anything.
    allowed = jnp.where(level == HIDDEN, HIDDEN, allowed)
    # Whether a granule is full depends on operands that the plan does not hold: full ones are
    # listed first, in ascending order, whichever they are.
    full = _full_of(plan.list_headers, plan.list_entries, level, grid)
    lists = pack(plan.levels, full, grid, Capacity.of(grid, plan.causal, plan.window))
    return pack_levels(level), level, allowed, lists


def _possible(level: jax.Array, options: Options, grid: Grid) -> Boundary:
    """The most that tiles may see, whatever the lengths of the call were, by what levels show."""
    shown = level != HIDDEN
    queries, keys = (
        jnp.max(jnp.where(shown.any(axes), jnp.arange(shown.shape[axis]), -1), -1)
        for axis, axes in ((2, (1, 3)), (3, (1, 2)))
    )
    found = boundary({}, options, grid)
    # The last granule that is shown may be cut by the length, or whole.
    for length in (GRANULE * keys + 1, GRANULE * keys + GRANULE):
        lengths = {Slot.Q_LENGTHS: grid.positions * queries + 1, Slot.KV_LENGTHS: length}
        shorter = boundary(lengths, options, grid)
        found = dataclasses.replace(
            found,
            whole=found.whole | shorter.whole,
            super_whole=found.super_whole | shorter.super_whole,
        )
    return found


def _full_of(headers: jax.Array, entries: jax.Array, level: jax.Array, grid: Grid) -> jax.Array:
    """Which granules at level 0 lists name among the full ones, [B, L, I, granules]."""
    first, count = (headers[..., i].astype(jnp.int32) for i in (0, 1))
    offset = jnp.arange(grid.granules)
    at = jnp.clip(first[..., None] + offset, 0, entries.shape[-1] - 1)
    listed = jnp.take_along_axis(entries[:, :, None], at, axis=-1) // 16
    listed = jnp.where(offset < count[..., None], listed, grid.granules).astype(jnp.int32)
    full = jnp.zeros((*level.shape[:-1], grid.granules + 1), bool)
    index = jnp.ogrid[tuple(slice(size) for size in level.shape)][:-1]
    full = full.at[(*index, jnp.minimum(listed, grid.granules))].set(True)
    return full[..., :-1] & (level == EXACT)
