"""`TilePlan`: the levels of a call with the work lists made from them."""

import dataclasses
import functools
import io
import json
import os
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.adaptation import Adaptation, grid_of
from jax_aat.arguments import WIDEST_WINDOW, is_integer, same_type
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
from jax_aat.problem import Operands, Options, Slot
from jax_aat.pytrees import exportable, is_known
from jax_aat.router import route

_LISTS = {
    Slot.LIST_HEADERS: "list_headers",
    Slot.LIST_ENTRIES: "list_entries",
    Slot.KEY_LIST_HEADERS: "key_list_headers",
    Slot.KEY_LIST_ENTRIES: "key_list_entries",
}
_ARRAYS = ("levels", *_LISTS.values(), "log_lambda")
_FIXED = ("grid", "adaptation", "causal", "window", "hides")
_HIDING = (Slot.Q_LENGTHS, Slot.KV_LENGTHS, Slot.Q_SEGMENTS, Slot.MASK)
"""Operands that hide keys from queries, besides causality and window."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(_ARRAYS),
    meta_fields=list(_FIXED),
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
      hides: Whether lengths, segments or a mask may have hidden more than causality and window do.
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
    hides: bool

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
            return cls.of_results(made, operands, options, adaptation)
        levels, log_lambda = route(operands, options, grid, adaptation, log_lambda, previous)
        return cls.of_levels(levels, log_lambda, operands, options, adaptation)

    @classmethod
    def of_results(
        cls, made: Operands, operands: Operands, options: Options, adaptation: Adaptation
    ) -> "TilePlan":
        """The plan that shaders made of a call's operands, by `jax_aat.primitives.plan`."""
        return cls(
            levels=made[Slot.LEVELS],
            log_lambda=jnp.log(made[Slot.LAMBDA]),
            grid=grid_of(operands, adaptation),
            adaptation=adaptation,
            causal=options.causal,
            window=options.window,
            hides=_hides(operands),
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
        return cls(
            *(levels, *lists, log_lambda, grid, adaptation),
            causal=options.causal,
            window=options.window,
            hides=_hides(operands),
        )

    @classmethod
    def unfilled(
        cls,
        grid: Grid,
        adaptation: Adaptation,
        causal: bool,
        window: tuple[int, int],
        batch: int,
        hides: bool = False,
    ) -> "TilePlan":
        """A plan that hides everything, in the shapes of those of a call; to be replaced.

        Args:
          grid: That of the plan that replaces it, as are the others but `batch`.
          adaptation: Likewise.
          causal: Likewise.
          window: Likewise.
          batch: Batch size.
          hides: Likewise: whether the call has lengths, segments or a mask.
        """
        empty = {"list_headers": 0, "key_list_headers": 0, "log_lambda": 0}
        arrays = {
            name: jnp.full((batch, *x.shape), empty.get(name, 0xFFFFFFFF), x.dtype)
            for name, x in _types(grid, causal, window).items()
        }
        return cls(
            **arrays, grid=grid, adaptation=adaptation, causal=causal, window=window, hides=hides
        )

    def check_call(self, operands: Operands, options: Options, name: str = "plan") -> None:
        """Checks, when a call is traced, that the plan has its shapes, causality and window.

        Args:
          operands: Those of the call.
          options: Those of the call.
          name: What errors call the plan.

        Raises:
          ValueError: Shapes, causality or window are others, or an array has a wrong shape or
            dtype.
        """
        for what, mine, theirs in (
            ("a grid", self.grid, grid_of(operands, self.adaptation)),
            ("is_causal", self.causal, options.causal),
            ("local_window_size", self.window, options.window),
            ("batch axes", jnp.shape(self.levels)[:-3], operands[Slot.Q].shape[:1]),
        ):
            if mine != theirs:
                raise ValueError(f"{name}: was made for {what} of {mine}, the call has {theirs}")
        self._check_types(name)

    def _check_types(self, name: str = "plan") -> None:
        batch = self.levels.shape[:-3]
        for field, core in _types(self.grid, self.causal, self.window).items():
            expected = jax.ShapeDtypeStruct((*batch, *core.shape), core.dtype)
            same_type(f"{name}.{field}", getattr(self, field), expected)

    def _check_fixed(self) -> None:
        """Checks what is no array, before anything is computed of it."""
        grid, window = self.grid, self.window
        sizes = dataclasses.astuple(grid)
        if not all(is_integer(size) and size > 0 for size in sizes) or grid.heads % grid.kv_heads:
            raise ValueError(
                f"plan.grid: got {grid}, expected positive integers, heads a multiple of kv_heads"
            )
        expected = self.adaptation.grid(*sizes[:4])
        if grid != expected:
            raise ValueError(f"plan.grid: got {grid}, expected that of its adaptation, {expected}")
        for name in ("causal", "hides"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"plan.{name}: got {getattr(self, name)!r}, expected True or False"
                )
        is_pair = isinstance(window, tuple) and len(window) == 2
        if not is_pair or not all(is_integer(x) and -1 <= x <= WIDEST_WINDOW for x in window):
            raise ValueError(
                f"plan.window: got {window!r}, expected two integers from -1 to {WIDEST_WINDOW}"
            )
        # Alone and first: the other shapes are found by arrays as long as the grid says.
        tiles = (grid.lists, grid.tiles, grid.words)
        if self.levels.shape[-3:] != tiles:
            raise ValueError(
                f"plan.levels: got shape {list(self.levels.shape)}, expected it to end in "
                f"{list(tiles)}"
            )

    def for_call(self, operands: Operands, options: Options) -> "TilePlan":
        """The plan for a call, which must have the shapes, causality and window of its own.

        What lengths, segments, mask and bias of that call do not let a tile see is hidden, what
        they do not let it see by a mean row is exact, and so is what the plan has hidden and the
        call shows. Where the plan is to drop what is not exact, it does not know one from the
        other: all that it has hidden remains so.

        Raises:
          ValueError: Shapes, causality or window are others, or an array has a wrong shape or
            dtype.
        """
        self.check_call(operands, options)
        moves = any(slot in operands for slot in (*_HIDING, Slot.BIAS))
        if not moves and not self.hides:
            return self
        level = unpack_levels(self.levels, self.grid.granules)
        levels = pack_levels(boundary(operands, options, self.grid).applied(level, self._drops))
        return self.of_levels(levels, self.log_lambda, operands, options, self.adaptation)

    @property
    def _drops(self) -> bool:
        """Whether what is not exact is hidden."""
        return self.adaptation.levels == (EXACT,)

    def operands(self) -> Operands:
        """The plan as operands of a primitive."""
        lists = {slot: getattr(self, name) for slot, name in _LISTS.items()}
        return {Slot.LEVELS: self.levels} | lists

    def validate(self) -> "TilePlan":
        """Checks a plan of concrete arrays, on the host, for example one that was read from a file.

        Returns:
          The plan itself.

        Raises:
          ValueError: An array is traced or abstract, the grid is not that of the adaptation,
            causality or window are none, an array has a wrong shape or dtype, a level is not in
            use, levels let a tile see what causality and window hide or hide what nothing hides, a
            list does not say what the levels say, or a log lambda is not a number (infinite it may
            be: where everything is exact, and where a budget leaves no room).
        """
        if not is_known(self):
            raise ValueError("plan: its arrays have no values here, expected ones to check")
        self._check_fixed()
        self._check_types()
        batch = self.levels.ndim - 3
        flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[batch:])), self)
        packed, level, allowed, lists = _expected(flat)
        _require(flat.levels, packed, "levels", "a level of a granule past the last")
        used = np.isin(level, (*self.adaptation.levels, HIDDEN))
        _require(used, True, "levels", "a level that its adaptation does not use")
        _require(level, allowed, "levels", "a level that causality or window forbids")
        for name, expected in zip(_LISTS.values(), lists, strict=True):
            _require(getattr(flat, name), expected, name, "something else than the levels say")
        _require(jnp.isnan(flat.log_lambda), False, "log_lambda", "what is not a number")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a plan of concrete arrays to a file, which is that of `numpy.savez_compressed`.

        Raises:
          OSError: The file cannot be written.
          ValueError: An array is traced or abstract.
        """
        if not is_known(self):
            raise ValueError("plan: its arrays have no values here, expected ones to write")
        content = io.BytesIO()
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        fixed = _to_json(tuple(getattr(self, name) for name in _FIXED))
        np.savez_compressed(content, fixed=np.array(fixed), **arrays)
        # Only now, so that what cannot be written does not destroy a file; and opened here, as
        # NumPy would put .npz behind a name.
        with open(path, "wb") as file:
            file.write(content.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TilePlan":
        """Reads a plan that `save` wrote and validates it.

        Raises:
          OSError: The file cannot be read.
          ValueError: It is not a plan, or it is corrupted; says what is wrong.
        """
        with open(path, "rb") as file:
            content = file.read()
        try:
            return cls._read(content).validate()
        except ValueError as error:
            raise ValueError(f"{path}: is not a plan that TilePlan.save wrote: {error}") from error

    @classmethod
    def _read(cls, content: bytes) -> "TilePlan":
        try:
            # What is no archive NumPy takes for a pickle.
            with (
                zipfile.ZipFile(io.BytesIO(content)),
                np.load(io.BytesIO(content), allow_pickle=False) as file,
            ):
                arrays: list[Any] = [jnp.asarray(file[name]) for name in _ARRAYS]
                return cls(*arrays, *_of_json(str(file["fixed"])))
        # A broken file makes NumPy, zipfile, json and tokenize raise errors of a dozen types.
        except Exception as error:
            raise ValueError(str(error) or type(error).__name__) from error

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
        if not is_known((self.levels, self.log_lambda)):
            return f"TilePlan({shape}; its arrays have no values here)"
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


def _hides(operands: Operands) -> bool:
    return any(slot in operands for slot in _HIDING)


def _types(grid: Grid, causal: bool, window: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, without batch axes, and dtypes of a plan's arrays by name."""
    capacity = Capacity.of(grid, causal, window)
    tiles = (grid.lists, grid.tiles)
    key_tiles = grid.key_tiles + grid.coarse_tiles
    words = {
        "levels": (*tiles, grid.words),
        "list_headers": (*tiles, 4),
        "list_entries": (grid.lists, capacity.entries),
        "key_list_headers": (grid.kv_heads, key_tiles, 4),
        "key_list_entries": (grid.kv_heads, capacity.key_entries),
    }
    types = {name: jax.ShapeDtypeStruct(shape, jnp.uint32) for name, shape in words.items()}
    return types | {"log_lambda": jax.ShapeDtypeStruct((grid.lists,), jnp.float32)}


def _to_json(fixed: tuple[Any, ...]) -> str:
    """What of a plan is no array, in the order of `_FIXED`."""
    return json.dumps(dict(zip(_FIXED, fixed, strict=True)), default=dataclasses.asdict)


def _of_json(text: str) -> tuple[Any, ...]:
    """The inverse of `_to_json`."""
    fixed = json.loads(text)
    adaptation = fixed["adaptation"] | {"levels": tuple(fixed["adaptation"]["levels"])}
    return (
        Grid(**fixed["grid"]),
        Adaptation(**adaptation),
        fixed["causal"],
        tuple(fixed["window"]),
        fixed["hides"],
    )


exportable(TilePlan, _to_json, _of_json)


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
    options = Options(1.0, plan.causal, plan.window).planned(grid)
    whole = boundary({}, options, grid)
    if plan.hides:
        # Lengths, segments and masks may have hidden anything.
        allowed = _possible(level, whole, options, grid).applied(level, drops=True)
        allowed = jnp.where(level == HIDDEN, HIDDEN, allowed)
    else:
        allowed = whole.applied(level, plan._drops)
    # They, and a bias, decide on which granules are full, and the plan does not hold them: full
    # ones are listed first, in ascending order, whichever of those they are that may be.
    full = _full_of(plan.list_headers, plan.list_entries, level, grid) & whole.full
    lists = pack(plan.levels, full, grid, Capacity.of(grid, plan.causal, plan.window))
    return pack_levels(level), level, allowed, lists


def _possible(level: jax.Array, found: Boundary, options: Options, grid: Grid) -> Boundary:
    """The most that tiles may see, whatever the lengths of the call were, by what levels show.

    Args:
      level: Levels of a plan.
      found: What a call without lengths lets tiles see.
      options: Those of the call.
      grid: How the plan cuts it.
    """
    shown = level != HIDDEN
    queries, keys = (
        jnp.max(jnp.where(shown.any(axes), jnp.arange(shown.shape[axis]), -1), -1)
        for axis, axes in ((2, (1, 3)), (3, (1, 2)))
    )
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
