"""Measures the shapes of attention kernels on a device and chooses among them.

The shapes that fit come from the planner (`csrc/attention/kernels.h`), the first of them runs where
there is no tuning. A tuning names one for a kernel, dtype and head_dim, of exact or of adaptive
calls. The device's context holds it, every call is planned by it, and later processes read it from
a file.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat import vulkan
from jax_aat.adaptation import Adaptation
from jax_aat.attention import plan_tiles, tiled_attention
from jax_aat.reference import TOLERANCE, relative_error

KERNELS = ("forward", "tangent", "backward_dq", "backward_dkv")
ROUNDS = 7
"""Timed runs of each shape."""
GAIN = 0.03
"""Share of the time that a shape must save to replace the first one: less may be noise."""
WINS = 6
"""Rounds in which it must be faster."""
MIN_LENGTH = 128
"""From here on a call has room for every shape."""

_HEADS = 8
_WARM_UP = 1
_SHORTEST, _LONGEST = 128, 4096
_CALL_MILLISECONDS = 20.0
# The query tiles of long calls, which have room for the tiles of all kernels.
_ADAPTATION = Adaptation(budget=0.25, query_tile=128)


class Kernel(NamedTuple):
    """What a shape is chosen for.

    Attributes:
      name: One of `KERNELS`.
      dtype: Of the operands.
      head_dim: Of the operands.
      planned: Whether it is that of adaptive calls.
    """

    name: str
    dtype: str
    head_dim: int
    planned: bool

    def words(self) -> tuple[str, str, str, str]:
        """The attributes as tables have them."""
        calls = "adaptive" if self.planned else "exact"
        return self.name, self.dtype, str(self.head_dim), calls


class Shape(NamedTuple):
    """How a kernel is run.

    Attributes:
      tile_rows: Rows of the tile that a workgroup owns.
      block_rows: Rows that it takes from the work list a step.
      thread_rows: Rows of the tile that a thread multiplies; 0: matrix units do.
      slice_columns: Columns of head_dim in shared memory at once; 0: all.
      threads: Of a workgroup.
    """

    tile_rows: int
    block_rows: int
    thread_rows: int
    slice_columns: int
    threads: int

    def __str__(self) -> str:
        parts = [f"{self.tile_rows} x {self.block_rows} rows"]
        if self.thread_rows:
            parts.append(f"{self.thread_rows} a thread, slices of {self.slice_columns}")
        return ", ".join([*parts, f"{self.threads} threads"])


@dataclass(frozen=True)
class Measured:
    """What was measured of a kernel.

    Attributes:
      kernel: The kernel.
      shapes: Its shapes, the one that runs without a tuning first.
      milliseconds: Median time of each; None for those that are refused.
      chosen: Index of the best.
      refused: Why shapes are refused, in words.
    """

    kernel: Kernel
    shapes: tuple[Shape, ...]
    milliseconds: tuple[float | None, ...]
    chosen: int
    refused: tuple[str, ...]


def computing_device() -> vulkan.Device:
    """The device that calls compute on, on JAX's own platform.

    Raises:
      RuntimeError: Vulkan cannot be used; says why.
    """
    from jax_aat import _native

    if problem := vulkan.problem():
        raise RuntimeError(f"Vulkan cannot be used: {problem}")
    one = jnp.ones((1, 1, 1, 1))
    jax.block_until_ready(tiled_attention(one, one, one, implementation="vulkan"))
    if jax.default_backend() not in ("cpu", "gpu") or (last := _native.last_dispatch()) is None:
        raise RuntimeError(f"JAX computes on {jax.default_backend()} here, not by Vulkan")
    return vulkan.devices()[last["device_index"]]


def shapes_of(device: vulkan.Device, kernel: Kernel) -> tuple[Shape, ...]:
    """The shapes of a kernel that fit a device, the one that runs without a tuning first."""
    from jax_aat import _native

    return tuple(Shape(*numbers) for numbers in _native.kernel_shapes(device.index, *kernel))


def tuning(device: vulkan.Device) -> dict[Kernel, Shape]:
    """The tuning that calls on a device use."""
    from jax_aat import _native

    return {
        Kernel(name, dtype, head_dim, planned): Shape(*numbers)
        for name, dtype, head_dim, planned, numbers in _native.tuning(device.index)
    }


def set_tuning(device: vulkan.Device, shapes: dict[Kernel, Shape], *, save: bool = False) -> None:
    """Makes later calls on a device use another tuning, and later processes too if it is saved.

    Raises:
      RuntimeError: It cannot be saved; says why.
      ValueError: A shape does not fit the device.
    """
    from jax_aat import _native

    _native.set_tuning(device.index, [(*kernel, shape) for kernel, shape in shapes.items()])
    if save:
        _native.save_tuning(device.index)


def file_of(device: vulkan.Device) -> Path | None:
    """Where the tuning of a device is kept, if it has one; None: there is no folder for it."""
    from jax_aat import _native

    path = _native.tuning_path(device.index)
    return Path(path) if path else None


def representative_length(device: vulkan.Device, dtype: str, head_dim: int) -> int:
    """Length of calls of about 20 ms on a device, or less: at least 128, at most 4,096."""
    kernel = Kernel("forward", dtype, head_dim, planned=False)
    length = _SHORTEST
    with _measuring(device):
        while length < _LONGEST:
            run = _call(kernel, length)
            _timed(run, kernel)
            # Twice the length takes four times as long.
            if 4 * _timed(run, kernel)[1] > _CALL_MILLISECONDS:
                break
            length *= 2
    return length


def measure(
    device: vulkan.Device, kernel: Kernel, length: int, step: Callable[[], object]
) -> Measured:
    """Measures the shapes of a kernel and chooses.

    Shapes take turns, so that what else the device does, and how warm it is, hits all alike.

    Args:
      device: The device that calls compute on.
      kernel: The kernel.
      length: Of the calls.
      step: Called when a shape has been run: `steps_of` says how often at most.

    Raises:
      RuntimeError: The kernel cannot be run in its first shape, or the device has no timestamps.
    """
    shapes = shapes_of(device, kernel)
    times: dict[int, list[float]] = {0: []}
    refused = []
    with _measuring(device) as use:
        run = _call(kernel, length)
        use({kernel: shapes[0]})
        expected, _ = _timed(run, kernel)
        step()
        for index, shape in enumerate(shapes[1:], 1):
            if fault := _fault(use, run, kernel, shape, expected):
                refused.append(f"{shape}: {fault}")
            else:
                times[index] = []
            step()
        for index in (index for _ in range(_WARM_UP + ROUNDS) for index in list(times)):
            use({kernel: shapes[index]})
            times[index].append(_timed(run, kernel)[1])
            step()
    timed = {index: rounds[_WARM_UP:] for index, rounds in times.items()}
    medians = [statistics.median(timed[i]) if i in timed else None for i in range(len(shapes))]
    best = list(timed)[choose(list(timed.values()))]
    return Measured(kernel, shapes, tuple(medians), best, tuple(refused))


def steps_of(shapes: Sequence[Shape]) -> int:
    """How many steps `measure` takes, at most, of so many shapes."""
    return len(shapes) * (1 + _WARM_UP + ROUNDS)


def choose(times: Sequence[Sequence[float]]) -> int:
    """Index of the fastest of those that are clearly faster than the first; 0 where none is.

    Args:
      times: Of each shape those of its rounds.
    """
    first = times[0]

    def is_clear(rounds: Sequence[float]) -> bool:
        wins = sum(mine < others for mine, others in zip(rounds, first, strict=True))
        gain = 1 - statistics.median(rounds) / statistics.median(first)
        return gain >= GAIN and wins >= WINS

    clear = [index for index, rounds in enumerate(times) if is_clear(rounds)]
    return min(clear, key=lambda index: statistics.median(times[index]), default=0)


@contextmanager
def _measuring(device: vulkan.Device) -> Iterator[Callable[[dict[Kernel, Shape]], None]]:
    """Times kernels and lets other tunings be tried; afterwards the tuning is that of before."""
    before = tuning(device)
    vulkan.set_timing(True)
    try:
        set_tuning(device, {})
        yield partial(set_tuning, device)
    finally:
        vulkan.set_timing(False)
        set_tuning(device, before)


def _call(kernel: Kernel, length: int) -> Callable[[], Any]:
    """A function that runs the kernel, in a call of its own, and returns its results."""
    generator = np.random.default_rng(0)

    def normal() -> jax.Array:
        size = (1, length, _HEADS, kernel.head_dim)
        return jnp.asarray(generator.standard_normal(size, np.float32), kernel.dtype)

    q, k, v, cotangent, *tangents = (normal() for _ in range(7))
    attention = partial(tiled_attention, implementation="vulkan")
    if kernel.planned:
        plan = plan_tiles(q, k, v, _ADAPTATION, implementation="vulkan")
        attention = partial(attention, plan=plan)
    if kernel.name == "forward":
        return partial(jax.jit(attention), q, k, v)
    if kernel.name == "tangent":
        _, move = jax.linearize(attention, q, k, v)
        return partial(jax.jit(lambda move, tangents: move(*tangents)), move, tangents)
    if kernel.name == "backward_dq":
        _, pull = jax.vjp(lambda q: attention(q, k, v), q)
    else:
        _, pull = jax.vjp(lambda k, v: attention(q, k, v), k, v)
    return partial(jax.jit(lambda pull, cotangent: pull(cotangent)), pull, cotangent)


def _timed(run: Callable[[], Any], kernel: Kernel) -> tuple[Any, float]:
    """Results of a run and the milliseconds of the kernel."""
    results = jax.block_until_ready(run())
    last = vulkan.last_dispatch()
    if last is None or last.kernel_milliseconds is None:
        raise RuntimeError("the device has no timestamps, by which shapes are measured")
    names = (name.startswith(f"attend_{kernel.name}") for name in last.kernels)
    times = zip(names, last.kernel_milliseconds, strict=True)
    return results, sum(time for is_it, time in times if is_it)


def _fault(
    use: Callable[[dict[Kernel, Shape]], None],
    run: Callable[[], Any],
    kernel: Kernel,
    shape: Shape,
    expected: Any,
) -> str:
    """Why a shape must not be used, in words; empty where it computes what the first one does."""
    use({kernel: shape})
    try:
        results, _ = _timed(run, kernel)
    except Exception as error:
        return f"it fails: {str(error).splitlines()[0]}"
    errors = jax.tree.leaves(jax.tree.map(relative_error, results, expected))
    allowed = TOLERANCE[kernel.dtype][kernel.name != "forward"]
    # What is not a number is worse than any number.
    worst = max(np.nan_to_num(errors, nan=np.inf))
    if worst <= allowed:
        return ""
    return f"it computes wrong results (relative error {worst:.1e}, {allowed:.1e} is allowed)"
