"""`estimate`: what a call will take, from shorter calls that are measured.

The same call is profiled at two lengths that take little time, and the time of each of its kernels
is extrapolated by what that kernel's work grows with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat import vulkan
from jax_aat.adaptation import Adaptation
from jax_aat.adaptive import plans_in_one_submission
from jax_aat.arguments import describe, is_integer
from jax_aat.attention import tiled_attention
from jax_aat.hierarchy import judged_key_tiles
from jax_aat.levels import GRANULE, KEY_TILE, Grid
from jax_aat.problem import Operands, Options, Slot, problem_words
from jax_aat.profiling import ProfiledCall, profile
from jax_aat.router import (
    candidate_share,
    has_state,
    judged_share,
    list_capacity,
    planning_flops,
)
from jax_aat.visible_pairs import dense_flops, hidden_rows

ENOUGH = 5e-3
"""Seconds of the device after which a call tells what longer ones take."""
RUNS = 3
"""Of which the fastest counts; one before them compiles."""

_BY_TILE_AND_GRANULE = ("plan_levels", "plan_lists", "plan_key_lists", "work_lists")


@dataclass(frozen=True)
class Lengths:
    """Of the calls that are measured.

    Attributes:
      shortest: That of the first one.
      shortest_planned: The same with a plan, which has nothing to choose from among fewer keys.
      longest: None is longer.
      factor: From one to the next.
    """

    shortest: int
    shortest_planned: int
    longest: int
    factor: int


ON_PROCESSORS = Lengths(512, 1024, 8192, 2)
ON_GPUS = Lengths(4096, 4096, 65536, 4)
"""Shorter calls leave a GPU half empty and tell little of longer ones."""


@dataclass(frozen=True)
class Estimate:
    """What a call is expected to take on a device.

    Attributes:
      device: Name of the device.
      problem: Sizes in words.
      seconds: Time on the device, of the forward and, if asked for, the backward pass.
      flops: FLOPs of attention's products and of planning, of the same passes.
      relative_flops: FLOPs of the forward pass over those of exact attention.
      operand_bytes: Memory of operands and results.
      scratch_bytes: Memory that the pass which takes most takes besides.
      kernels: Seconds by shader module.
      measured_lengths: Queries of the two calls that this is extrapolated from.
    """

    device: str
    problem: str
    seconds: float
    flops: float
    relative_flops: float
    operand_bytes: int
    scratch_bytes: int
    kernels: Mapping[str, float]
    measured_lengths: tuple[int, int]

    def __str__(self) -> str:
        memory = (self.operand_bytes + self.scratch_bytes) / 2**20
        return (
            f"{self.problem} on {self.device}: {1e3 * self.seconds:.3g} ms, "
            f"{self.flops / 1e9:.4g} GFLOP ({self.relative_flops:.1%} of exact attention forward), "
            f"{memory:.4g} MiB"
        )


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call, and what its work grows with."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    adaptation: Adaptation | None

    def of_length(self, queries: int) -> Sizes:
        """A shorter call, with keys in proportion, planned by the same tiles and stages."""
        keys = max(1, round(self.keys * queries / self.queries))
        adaptation = self.adaptation and dataclasses.replace(
            self.adaptation,
            query_tile=self._grid.query_tile,
            super_tile=self._grid.super_tile,
            stages=self.adaptation.stages_for(self.keys, self.causal),
        )
        return dataclasses.replace(self, queries=queries, keys=keys, adaptation=adaptation)

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of query, key and value."""
        key = (self.batch, self.keys, self.kv_heads, self.head_dim)
        return (self.batch, self.queries, self.heads, self.head_dim), key, key

    @property
    def _grid(self) -> Grid:
        adaptation = self.adaptation or Adaptation(budget=1.0, query_tile=128, super_tile=1024)
        return adaptation.grid(self.queries, self.keys, self.heads, self.kv_heads)

    @property
    def _operands(self) -> Operands:
        slots = (Slot.Q, Slot.K, Slot.V)
        shapes: Any = {
            slot: jax.ShapeDtypeStruct(shape, self.dtype)
            for slot, shape in zip(slots, self.shapes, strict=True)
        }
        return shapes  # type: ignore[no-any-return]

    def dense_flops(self) -> float:
        """FLOPs of exact attention forward."""
        return float(dense_flops(self._operands, self._options, self._grid).sum())

    def planning_flops(self) -> float:
        """FLOPs of planning; 0 without an adaptation."""
        if self.adaptation is None:
            return 0.0
        arguments = (self._operands, self._options, self._grid, self.adaptation)
        return float(planning_flops(*arguments).sum())

    @property
    def _options(self) -> Options:
        return Options(scale=1.0, causal=self.causal)

    def row_flops(self, share: float) -> float:
        """FLOPs forward of the rows that are read: all that a budget has after planning.

        Args:
          share: Of all rows, where there is no budget.
        """
        dense = self.dense_flops()
        if self.adaptation is None or self.adaptation.budget is None:
            return share * dense
        hidden = float(hidden_rows(self._operands, self._options, self._grid).sum())
        a_row = 4 * self.head_dim * self._grid.query_tile
        left = max(self.adaptation.budget * dense - self.planning_flops(), 0.0)
        return left + a_row * hidden

    def work(self, kernel: str, row_flops: float) -> float:
        """What the time of a kernel grows with, up to a factor.

        Args:
          kernel: Name of its shader module.
          row_flops: FLOPs forward of the rows that are read.
        """
        family = kernel.split(".")[0].removesuffix("_coopmat")
        grid = self._grid
        tiles = self.batch * grid.lists * grid.tiles
        if family == "plan_price":
            return float(tiles * self._judged_keys)
        if family == "cross_tile_router":
            judged = self._judged_keys
            seen = np.arange(1, self.queries + 1) if self.causal else np.array([self.keys])
            granules = np.minimum(seen, judged).mean()
            key_tiles = seen.mean() * GRANULE / KEY_TILE if judged < self.keys else 0.0
            return float(tiles * (granules + key_tiles))
        if family in _BY_TILE_AND_GRANULE:
            return float(tiles * grid.granules)
        if family.startswith("attend_") and family != "attend_backward_delta":
            return row_flops
        return float(self.queries * self.heads + self.keys * self.kv_heads)

    def operand_bytes(self, gradients: bool) -> int:
        """Of operands and results; with gradients also of the cotangent and of these."""
        query, key = (self.batch * rows * self.head_dim for rows in self._rows)
        size = jnp.dtype(self.dtype).itemsize
        passes = 2 if gradients else 1
        return size * passes * (2 * query + 2 * key) + 4 * self.batch * self._rows[0]

    def scratch_bytes(self, direction: str, gradients: bool) -> int:
        """Memory that a pass takes besides, as it is planned for the default device.

        Args:
          direction: "plan", where a plan is made apart, "forward" or "backward".
          gradients: Whether a backward pass follows, which needs the plan.
        """
        from jax_aat import _native

        device = vulkan.default_device()
        assert device is not None
        plan: dict[str, Any] = {}
        if self.adaptation is not None:
            apart = self._plans_apart
            kept = gradients or apart
            makes_plan = direction == ("plan" if apart else "forward")
            plan = {
                "query_tile": self._grid.query_tile,
                "super_tile": self._grid.super_tile,
                "level_count": len(self.adaptation.levels) if makes_plan else 0,
                "candidate_share": candidate_share(self.adaptation, self._options, self._grid),
                "judged_key_tiles": self._judged_key_tiles,
                "list_capacity": 0 if kept else self._list_capacity,
                "corrects": has_state(self._operands, self._options, self.adaptation),
            }
        sizes = (self.batch, self.queries, self.keys, self.heads, self.kv_heads, self.head_dim)
        return _native.scratch_bytes(
            device.index, direction, self.dtype, sizes, self.causal, **plan
        )

    def directions(self, gradients: bool) -> tuple[str, ...]:
        """The passes that follow each other, each as a submission of its own."""
        plan = ("plan",) if self._plans_apart else ()
        return *plan, *("forward", "backward")[: 1 + gradients]

    @property
    def _plans_apart(self) -> bool:
        adaptation = self.adaptation
        return adaptation is not None and not plans_in_one_submission(self._operands, adaptation)

    @property
    def _list_capacity(self) -> int:
        assert self.adaptation is not None
        return list_capacity(self._operands, self._options, self._grid, self.adaptation)

    @property
    def _judged_key_tiles(self) -> int:
        assert self.adaptation is not None
        return judged_key_tiles(self._operands, self._grid, judged_share(self.adaptation))

    @property
    def _judged_keys(self) -> int:
        return min(self.keys, self._judged_key_tiles * KEY_TILE)

    @property
    def _rows(self) -> tuple[int, int]:
        return self.queries * self.heads, self.keys * self.kv_heads

    @property
    def problem(self) -> str:
        """In words."""
        sizes = (self.batch, self.queries, self.keys, self.heads, self.kv_heads, self.head_dim)
        return problem_words(*sizes, self.dtype, self.causal)


def estimate(
    query_shape: Sequence[int],
    key_shape: Sequence[int] | None = None,
    dtype: Any = "bfloat16",
    *,
    is_causal: bool = False,
    adaptation: Adaptation | None = None,
    gradients: bool = False,
) -> Estimate:
    """Predicts time, FLOPs and memory of a call of `tiled_attention` by Vulkan, before it runs.

    Shorter calls of the same kind are run, on random operands, until one takes 5 ms, of up to 8,192
    queries on a processor and 65,536 on a GPU; so the answer is of this device, and takes as long
    as compiling those calls.

    Args:
      query_shape: (B, T, N, H).
      key_shape: (B, S, K, H); None: that of the query.
      dtype: Of the operands.
      is_causal: As of `tiled_attention`.
      adaptation: Likewise; a budget or a threshold. With a threshold the share of rows that is read
        is taken to be that of the calls that are measured.
      gradients: Whether the backward pass is wanted, too.

    Returns:
      The estimate for the device that such calls use.

    Raises:
      RuntimeError: Vulkan cannot be used.
      TypeError: It does not serve the dtype.
      ValueError: It does not serve the head_dim, shapes do not have four sizes or do not fit each
        other, the adaptation has a tolerance, which only a state can keep, or the device cannot
        compute a call of this size.
    """
    sizes = _sizes(query_shape, key_shape, dtype, is_causal, adaptation)
    vulkan.choose_implementation("vulkan", sizes.dtype, sizes.head_dim)
    measured = _measure(sizes, gradients)
    (short, short_calls), (long, long_calls) = measured
    short_rows, long_rows = (_row_flops(calls) for calls in (short_calls, long_calls))
    rows = sizes.row_flops(long_rows / long.dense_flops())
    kernels = {}
    for name, (before, after) in _seconds_by_kernel(short_calls, long_calls).items():
        works = (
            short.work(name, short_rows),
            long.work(name, long_rows),
            sizes.work(name, rows),
        )
        kernels[name] = _extrapolate(works, before, after)

    products = rows / long_rows * sum(_known_flops(call) for call in long_calls)
    planning = sizes.planning_flops()
    return Estimate(
        device=long_calls[0].device,
        problem=sizes.problem,
        seconds=sum(kernels.values()),
        flops=products + planning,
        relative_flops=(rows + planning) / sizes.dense_flops(),
        operand_bytes=sizes.operand_bytes(gradients),
        scratch_bytes=max(
            sizes.scratch_bytes(direction, gradients) for direction in sizes.directions(gradients)
        ),
        kernels=kernels,
        measured_lengths=(short.queries, long.queries),
    )


_Measured = tuple[Sizes, tuple[ProfiledCall, ...]]


def _sizes(
    query_shape: Sequence[int],
    key_shape: Sequence[int] | None,
    dtype: Any,
    is_causal: bool,
    adaptation: Adaptation | None,
) -> Sizes:
    key_shape = query_shape if key_shape is None else key_shape
    for name, shape in (("query_shape", query_shape), ("key_shape", key_shape)):
        if not isinstance(shape, Sequence) or not all(is_integer(size) for size in shape):
            raise TypeError(f"{name}: got {describe(shape)}, expected a tuple of integers")
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"{name}: got {tuple(shape)}, expected four sizes of at least 1")
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = query_shape, key_shape
    if key_shape[0] != batch or key_shape[3] != head_dim or heads % kv_heads:
        raise ValueError(
            f"key_shape: got {tuple(key_shape)} with query_shape {tuple(query_shape)}, expected "
            "the same batch and head_dim and a divisor of the number of heads"
        )
    if adaptation is not None and adaptation.tolerance is not None:
        raise ValueError(
            "adaptation: got a tolerance, which a state keeps by changing the price of a row: "
            "estimate a budget or a threshold"
        )
    name = jnp.dtype(dtype).name
    return Sizes(batch, queries, keys, heads, kv_heads, head_dim, name, is_causal, adaptation)


def _measure(sizes: Sizes, gradients: bool) -> tuple[_Measured, _Measured]:
    """Profiled calls of two lengths, the longer one last."""
    device = vulkan.default_device()
    lengths = ON_PROCESSORS if device is None or device.kind == "cpu" else ON_GPUS
    longest = min(lengths.longest, sizes.queries)
    first = lengths.shortest if sizes.adaptation is None else lengths.shortest_planned
    length = min(first, longest)
    found = [_profiled(sizes.of_length(length), gradients)]
    while _seconds(found[-1]) < ENOUGH and length < longest:
        length = min(lengths.factor * length, longest)
        found.append(_profiled(sizes.of_length(length), gradients))
    if len(found) == 1:
        found.insert(0, _profiled(sizes.of_length(-(-length // 2)), gradients))
    return found[-2], found[-1]


def _profiled(sizes: Sizes, gradients: bool) -> _Measured:
    """The fastest of some runs."""
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [
        jax.random.normal(key, shape, sizes.dtype)
        for key, shape in zip(keys, sizes.shapes, strict=True)
    ]

    def attend(*operands: jax.Array) -> jax.Array:
        out = tiled_attention(
            *operands,
            is_causal=sizes.causal,
            adaptation=sizes.adaptation,
            implementation="vulkan",
        )
        assert isinstance(out, jax.Array)
        return out

    call: Any = attend
    if gradients:

        def call(*operands: jax.Array) -> Any:
            out, pull = jax.vjp(attend, *operands)
            return pull(out)

    call = jax.jit(call)
    jax.block_until_ready(call(*operands))
    runs = []
    for _ in range(RUNS):
        with profile() as prof:
            jax.block_until_ready(call(*operands))
        runs.append((sizes, prof.calls))
    return min(runs, key=_seconds)


def _seconds(measured: _Measured) -> float:
    return sum(kernel.seconds for call in measured[1] for kernel in call.kernels)


def _seconds_by_kernel(
    short: Sequence[ProfiledCall], long: Sequence[ProfiledCall]
) -> dict[str, tuple[float, float]]:
    """Of the kernels of the longer call; what counts work for profiles is no part of the call."""

    def total(calls: Sequence[ProfiledCall], name: str) -> float:
        return sum(k.seconds for call in calls for k in call.kernels if k.name == name)

    names = dict.fromkeys(kernel.name for call in long for kernel in call.kernels)
    names.pop("count_work.f32", None)
    return {name: (total(short, name), total(long, name)) for name in names}


def _extrapolate(works: tuple[float, float, float], before: float, after: float) -> float:
    """From seconds at two amounts of work to those at a third: a + b work, neither negative."""
    short, long, wanted = works
    slope = max(after - before, 0.0) / (long - short) if long > short else 0.0
    base = after - slope * long
    if base < 0:
        return after * wanted / long
    return base + slope * wanted


def _row_flops(calls: Sequence[ProfiledCall]) -> float:
    return sum(_known_flops(call) for call in calls if call.direction == "forward")


def _known_flops(call: ProfiledCall) -> float:
    return sum(kernel.flops for kernel in call.kernels if kernel.flops == kernel.flops)
