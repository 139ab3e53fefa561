"""`profile`: where the time of the custom calls goes, by call and by kernel.

While a profile is taken, the device writes timestamps around every kernel and counts from the work
lists what the kernels of planned calls multiply. Nobody waits for these before the profile ends.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jax_aat import vulkan
from jax_aat.insights import Insight, default_ceilings, insights
from jax_aat.problem import count_pairs, problem_words
from jax_aat.roofline import Ceilings, rate

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class KernelTime:
    """One dispatch of a shader.

    Attributes:
      name: Shader module, such as 'attend_forward_coopmat.bf16'.
      start: Seconds since the profile began.
      seconds: Time by the device's timestamps.
      flops: Floating-point operations of its matrix products, two for a multiplication and
        addition, over the pairs of query and key that causality and window leave, or, in planned
        calls, that the work lists hold. 0: it has no such products; NaN: they are not counted.
      bytes: Bytes of the operands and the scratch that it reads and writes, each once: what it has
        to move at least. NaN: not counted (kernels that make lists).
    """

    name: str
    start: float
    seconds: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class ProfiledCall:
    """One custom call.

    Attributes:
      sequence: Counts the calls of the process, from 1.
      direction: 'forward', 'tangent', 'backward' or 'plan'.
      path: Family of kernels: 'portable' or 'coopmat'.
      platform: Platform of JAX that called: 'cpu' or 'cuda'.
      device: Name of the Vulkan device.
      queue: Queue of the device.
      thread: Thread of the host, counted from 0.
      problem: Sizes in words, such as 'B1 T4096 S4096 N8 K2 H64 bfloat16 causal'.
      dtype: Of the query.
      query_rows: Rows of queries of all heads and batch entries.
      dense_pairs: Pairs of a row of queries and a key that exact attention multiplies, by
        causality alone; a window leaves fewer.
      host_start: When the handler was called, seconds since the profile began.
      host_seconds: How long it took; under JAX's CPU platform it waits for the device.
      submitted: When the work was handed to the device, seconds since the profile began.
      start: Start of the first kernel, seconds since the profile began; NaN where the device has no
        timestamps, or was lost before they were read.
      seconds: From there to the end of the last kernel.
      stream_seconds: Under JAX's CUDA platform: how long the call holds up XLA's stream, by CUDA's
        own events: the kernels, the hand-over to Vulkan and back, and copies. NaN: no such stream.
      kernels: Empty where calls are timed as a whole or the device has no timestamps.
      imported_bytes: Operands and results used where they lay.
      staged_bytes: Operands and results that were copied.
      scratch_bytes: Memory of the device that it took for itself.
      lent_bytes: What of that XLA lent, which does not show in `memory_stats`.
      exact_pairs: Of a planned call: pairs of a row of queries and an exact row of keys that its
        work lists hold; None: it has no plan.
      coarse_pairs: Likewise with coarse rows.
      most_rows: Rows that the query tile with the longest list reads; None likewise.
    """

    sequence: int
    direction: str
    path: str
    platform: str
    device: str
    queue: int
    thread: int
    problem: str
    dtype: str
    query_rows: int
    dense_pairs: float
    host_start: float
    host_seconds: float
    submitted: float
    start: float
    seconds: float
    stream_seconds: float
    kernels: tuple[KernelTime, ...]
    imported_bytes: int
    staged_bytes: int
    scratch_bytes: int
    lent_bytes: int
    exact_pairs: float | None
    coarse_pairs: float | None
    most_rows: int | None


@dataclass(frozen=True)
class Annotation:
    """A stretch of the profile that the user named; seconds since the profile began."""

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class KernelSummary:
    """All dispatches of a shader.

    Attributes:
      name: Shader module.
      calls: Number of dispatches.
      seconds: Their time together.
      flops: FLOP/s over those whose FLOPs are known; NaN: of none.
      bandwidth: Bytes a second over those whose bytes are known; NaN: of none.
    """

    name: str
    calls: int
    seconds: float
    flops: float
    bandwidth: float


@dataclass(eq=False)
class Profile:
    """What `profile` saw; complete when its block has ended.

    Attributes:
      device: The default device when it began; None: there was none.
      seconds: Duration of the block.
      calls: Custom calls in the order in which their handlers ended.
      annotations: What `annotate` named.
    """

    device: vulkan.Device | None = None
    seconds: float = 0.0
    calls: tuple[ProfiledCall, ...] = ()
    annotations: tuple[Annotation, ...] = ()
    _origin: float = dataclasses.field(default_factory=time.monotonic, repr=False)

    @contextmanager
    def annotate(self, name: str) -> Iterator[None]:
        """Names what runs inside, here and in JAX's own profiler.

        Calls that JAX dispatches asynchronously may run after the block: wait for results inside
        it to see their calls beneath the name.
        """
        start = time.monotonic()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            annotation = Annotation(name, start - self._origin, time.monotonic() - start)
            self.annotations = (*self.annotations, annotation)

    def kernels(self) -> tuple[KernelSummary, ...]:
        """Times by kernel, longest first."""
        found: dict[str, list[KernelTime]] = {}
        for call in self.calls:
            for kernel in call.kernels:
                found.setdefault(kernel.name, []).append(kernel)
        summaries = [
            KernelSummary(
                name=name,
                calls=len(kernels),
                seconds=sum(kernel.seconds for kernel in kernels),
                flops=rate(kernels, "flops"),
                bandwidth=rate(kernels, "bytes"),
            )
            for name, kernels in found.items()
        ]
        return tuple(sorted(summaries, key=lambda summary: -summary.seconds))

    def table(self) -> Table:
        """Times by kernel as a table of `rich`.

        Raises:
          ImportError: `rich` is not installed.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("Profile.table needs rich: pip install rich") from error
        table = Table(title=self._title())
        columns = ("kernel", "calls", "ms", "share", "µs a call", "TFLOP/s", "GB/s")
        for column in columns:
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        rows = [("kernel", "calls", "ms", "share", "µs a call", "TFLOP/s", "GB/s"), *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )
        return "\n".join((self._title(), *lines))

    def _title(self) -> str:
        device = self.device.name if self.device is not None else "no device"
        busy = sum(call.seconds for call in self.calls if call.seconds == call.seconds)
        return (
            f"{len(self.calls)} calls on {device}, {1e3 * busy:.3f} ms of "
            f"{1e3 * self.seconds:.3f} ms"
        )

    def _rows(self) -> Iterator[tuple[str, ...]]:
        total = sum(summary.seconds for summary in self.kernels())
        for kernel in self.kernels():
            yield (
                kernel.name,
                str(kernel.calls),
                f"{1e3 * kernel.seconds:.3f}",
                f"{kernel.seconds / total:.1%}" if total else "",
                f"{1e6 * kernel.seconds / kernel.calls:.1f}",
                _number(kernel.flops / 1e12),
                _number(kernel.bandwidth / 1e9),
            )

    def insights(self, ceilings: Ceilings | None = None) -> tuple[Insight, ...]:
        """What limits the calls and what to do about it, most time first.

        Args:
          ceilings: Of the device that ran the calls; None: those of `jax_aat.ceilings`, which are
            measured if they never were.
        """
        return insights(self, default_ceilings(self) if ceilings is None else ceilings)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON; NaN becomes null. Written to `path` if one is given."""
        content = {
            "device": self.device.name if self.device is not None else None,
            "driver": self.device.driver if self.device is not None else None,
            "jax": jax.__version__,
            "seconds": self.seconds,
            "annotations": [dataclasses.asdict(annotation) for annotation in self.annotations],
            "calls": [dataclasses.asdict(call) for call in self.calls],
        }
        text = json.dumps(_without_nan(content), indent=1)
        if path is not None:
            Path(path).write_text(text)
        return text

    def to_trace(self, path: str | Path) -> None:
        """Writes a trace in the Chrome trace event format, which Perfetto opens.

        Handlers and annotations are slices of the host, calls with their kernels inside slices of
        the device, by queue; an arrow leads from each handler to its call.
        """
        from jax_aat.trace import trace_events

        events = {"traceEvents": trace_events(self), "displayTimeUnit": "ms"}
        Path(path).write_text(json.dumps(events))


@contextmanager
def profile(*, by_kernel: bool = True) -> Iterator[Profile]:
    """Profiles the custom calls of all threads while its block runs.

    ```python
    with jax_aat.profile() as prof:
        step(parameters, batch)
    print(prof)
    ```

    When the block ends, all arrays that live are waited for; calls whose results were dropped may
    still be under way then, and are missed. Programs that XLA compiles for implementation='xla'
    leave no trace here.

    Args:
      by_kernel: Whether to time each kernel, for which it waits for the one before it; else calls
        as a whole, which then run as they do unprofiled.

    Raises:
      RuntimeError: There is no native module, or another profile is being taken.
    """
    vulkan.require_native()
    from jax_aat import _native

    profiled = Profile(vulkan.default_device())
    _native.start_profile(by_kernel)
    try:
        yield profiled
        for array in jax.live_arrays():
            if not array.is_deleted():
                array.block_until_ready()
    finally:
        calls = _native.stop_profile()
        profiled.seconds = time.monotonic() - profiled._origin
        if profiled.device is not None:
            # Its first call has probed what a device does not tell.
            profiled.device = vulkan.devices()[profiled.device.index]
        profiled.calls = tuple(_call(call, profiled._origin, by_kernel) for call in calls)


def _call(record: Mapping[str, Any], origin: float, by_kernel: bool) -> ProfiledCall:
    stamps = [stamp - origin for stamp in record["stamps"]]
    kernels: tuple[KernelTime, ...] = ()
    if by_kernel and stamps:
        kernels = tuple(
            KernelTime(name, start, end - start, flops, size)
            for name, start, end, flops, size in zip(
                record["shaders"],
                stamps[::2],
                stamps[1::2],
                record["flops"],
                record["bytes"],
                strict=True,
            )
        )
    stream_seconds = record["stream_seconds"]
    heads = record["batch"] * record["query_heads"]
    names = ("batch", "queries", "keys", "query_heads", "kv_heads", "head_dim", "dtype", "causal")
    return ProfiledCall(
        sequence=record["sequence"],
        direction=record["pass"],
        path=record["path"],
        platform=record["platform"],
        device=record["device"],
        queue=record["queue"],
        thread=record["thread"],
        problem=problem_words(*(record[name] for name in names)),
        dtype=record["dtype"],
        query_rows=heads * record["queries"],
        dense_pairs=heads * count_pairs(record["queries"], record["keys"], record["causal"]),
        host_start=record["arrived"] - origin,
        host_seconds=record["ended"] - record["arrived"],
        submitted=record["submitted"] - origin,
        start=stamps[0] if stamps else float("nan"),
        seconds=stamps[-1] - stamps[0] if stamps else float("nan"),
        stream_seconds=float("nan") if stream_seconds is None else stream_seconds,
        kernels=kernels,
        imported_bytes=record["imported_bytes"],
        staged_bytes=record["staged_bytes"],
        scratch_bytes=record["scratch_bytes"],
        lent_bytes=record["lent_bytes"],
        exact_pairs=record["exact_pairs"],
        coarse_pairs=record["coarse_pairs"],
        most_rows=record["most_rows"],
    )


def _number(value: float) -> str:
    return "" if value != value else f"{value:.4g}"


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
