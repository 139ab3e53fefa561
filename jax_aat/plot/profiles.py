"""`timeline` and `roofline`: when kernels ran, and how near to what the device can do."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from jax_aat.plot.style import drawing_area, spread

if TYPE_CHECKING:
    from jax_aat.profiling import KernelTime, Profile, ProfiledCall
    from jax_aat.roofline import Ceilings

# Their order of brightness survives in grey.
_DIRECTIONS = {
    "plan": "#f3c969",
    "forward": "#3f7fb5",
    "tangent": "#d1603d",
    "backward": "#16285c",
}
_TERA = 1e12
_LABEL = 8
"""Size of the labels of rows and points, in points."""
_NUMBER = 6.5
"""Size of the numbers in the bars of calls, in points."""
_AREA = 1500
"""Area of the marker of a kernel that takes all of the time, in points^2."""


def timeline(profile: Profile, *, axes: Axes | None = None) -> Figure | SubFigure:
    """Draws when handlers ran on the host, and calls and their kernels on the device.

    Host and device have a row each for handlers and, by queue, for calls and each name of a kernel,
    with the sum of its times beside it; time is in milliseconds since the profile began. Behind the
    kernels of a call its time is shaded, and its number is written where there is room. To draw a
    few calls of many: ``dataclasses.replace(profile, calls=profile.calls[:10])``.

    Args:
      profile: What was profiled.
      axes: Where to draw; None: in a new figure.

    Returns:
      The figure drawn into.

    Raises:
      ValueError: The profile has no calls.
    """
    calls = _calls(profile)
    queues = sorted({call.queue for call in calls})
    rows = [("host: handlers", [(c.host_start, c.host_seconds, c.direction) for c in calls])]
    spans: list[tuple[ProfiledCall, int, int]] = []
    for queue in queues:
        own = [call for call in calls if call.queue == queue]
        first = len(rows)
        rows.append((f"queue {queue}: calls", [(c.start, c.seconds, c.direction) for c in own]))
        started = sorted(((k.start, k, c) for c in own for k in c.kernels), key=lambda x: x[0])
        for name in dict.fromkeys(kernel.name for _, kernel, _ in started):
            bars = [(k.start, k.seconds, c.direction) for _, k, c in started if k.name == name]
            rows.append((name, bars))
        spans += [(call, first, len(rows) - 1) for call in own]

    figure, axes = drawing_area(axes, 7.5, 1.3 + 0.24 * len(rows))
    for y, (_, bars) in enumerate(rows):
        colours = [_DIRECTIONS[direction] for *_, direction in bars]
        # Edges keep bars visible that are narrower than a line.
        axes.broken_barh(
            [(1e3 * start, 1e3 * seconds) for start, seconds, _ in bars],
            (y - 0.35, 0.7),
            facecolors=colours,
            edgecolors=colours,
            linewidth=0.4,
        )
        total = 1e3 * sum(seconds for _, seconds, _ in bars)
        axes.text(
            1.01,
            y,
            f"{total:,.0f} ms" if total >= 1000 else f"{total:.3g} ms",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=_LABEL,
        )
    starts = [min(call.host_start, call.start) for call in calls]
    ends = [max(c.host_start + c.host_seconds, c.start + c.seconds) for c in calls]
    begin, end = 1e3 * min(starts), 1e3 * max(ends)
    for call, top, bottom in spans:
        _mark(axes, call, top, bottom, end - begin)
    margin = 0.01 * (end - begin)
    axes.set(xlim=(begin - margin, end + margin), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=_LABEL)
    for y in {0, *(first for _, first, _ in spans)}:
        axes.get_yticklabels()[y].set_fontweight("bold")
    axes.set_xlabel("time since the profile began (ms)")
    axes.set_title(_device_name(profile), loc="left", fontsize="small")
    found = {call.direction for call in calls}
    axes.legend(
        handles=[Patch(color=colour, label=x) for x, colour in _DIRECTIONS.items() if x in found],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(found),
        frameon=False,
        fontsize="small",
        handlelength=1.2,
    )
    return figure


def _mark(axes: Axes, call: ProfiledCall, top: int, bottom: int, shown: float) -> None:
    """Shades the time of a call behind its kernels and writes its number into its bar."""
    start, width = 1e3 * call.start, 1e3 * call.seconds
    height = bottom - top + 0.8
    axes.add_patch(
        Rectangle((start, top - 0.4), width, height, facecolor="black", alpha=0.08, zorder=0)
    )
    number = str(call.sequence)
    points = axes.bbox.width * 72 / axes.figure.dpi * width / shown
    if points > 0.9 * _NUMBER * len(number):
        axes.text(
            start + width / 2,
            top,
            number,
            color="white" if call.direction == "backward" else "black",
            ha="center",
            va="center_baseline",
            fontsize=_NUMBER,
        )


@dataclass(frozen=True)
class _Total:
    """Sums over the kernels of a name."""

    name: str
    seconds: float
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """TFLOP/s."""
        return self.flops / self.seconds / _TERA


def roofline(
    profile: Profile, ceilings: Ceilings | None = None, *, axes: Axes | None = None
) -> Figure | SubFigure:
    """Draws the roofline of a device and the kernels of a profile below it.

    Each name of a kernel is a point: FLOPs over bytes against FLOPs over time, both axes
    logarithmic, its area the share of the time of all kernels. Below the slanted line, which is
    the bandwidth, and the level ones, which are the rates of matrix products, lies what the device
    can do (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785). Bytes count
    operands and scratch once: a kernel that reads them more often lies lower for it.

    Kernels without products, and those whose FLOPs or bytes are not known or whose time was too
    short to be measured, have no place in the picture: their shares of the time are noted below it.

    Args:
      profile: What was profiled.
      ceilings: What the device can do; None: no lines are drawn.
      axes: Where to draw; None: in a new figure.

    Returns:
      The figure drawn into.

    Raises:
      ValueError: The profile has no calls, no kernel has a place, or a ceiling is not above 0.
    """
    calls = _calls(profile)
    kernels = [kernel for call in calls for kernel in call.kernels]
    points = _totals(kernel for kernel in kernels if _has_place(kernel))
    others = _totals(kernel for kernel in kernels if not _has_place(kernel))
    time = sum(kernel.seconds for kernel in kernels)
    if not points:
        raise ValueError(
            "profile: no kernel of it has FLOPs, bytes and a time that are known and above 0; it "
            f"has {', '.join(x.name for x in others) or 'none'}"
        )
    lines = _lines(ceilings)
    bandwidth = ceilings.bandwidth / _TERA if ceilings is not None else math.nan
    figure, axes = drawing_area(axes, 7.5, max(4.6, 1.2 + 0.2 * len(points)))

    x, y = ([getattr(point, name) for point in points] for name in ("intensity", "rate"))
    ridges = [rate / bandwidth for rate in lines]
    axes.set(xscale="log", yscale="log", xlim=(min(x + ridges) / 4, max(x + ridges) * 6))
    axes.set_ylim(min(y) / 4, max([*y, *lines]) * 2.5)
    if ceilings is not None:
        _draw_ceilings(axes, lines, bandwidth)
    areas = [_AREA * point.seconds / time for point in points]
    axes.scatter(x, y, s=areas, color="#3f7fb5", alpha=0.6, edgecolor="black", zorder=3)
    axes.scatter(x, y, s=3, color="black", zorder=4)

    for point, height in zip(points, _heights(axes, y, 1.5), strict=True):
        axes.annotate(
            f"{point.seconds / time:.1%}  {point.name}",
            (point.intensity, point.rate),
            xytext=(1.03, height),
            textcoords=axes.transAxes,
            va="center",
            fontsize=_LABEL,
            arrowprops={
                "arrowstyle": "-",
                "color": "grey",
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
            },
        )
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if others:
        shares = ", ".join(f"{other.name} {other.seconds / time:.1%}" for other in others)
        axes.annotate(
            textwrap.fill(f"not drawn, for want of products or of known FLOPs: {shares}", 95),
            (0, 0),
            xycoords="axes fraction",
            xytext=(0, -42),
            textcoords="offset points",
            va="top",
            fontsize=_LABEL,
        )
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel("TFLOP/s of matrix products")
    axes.set_title(f"{_device_name(profile)}: kernels by share of their time", fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def _lines(ceilings: Ceilings | None) -> dict[float, str]:
    """Label of each matrix rate, TFLOP/s; dtypes of one rate share a line."""
    if ceilings is None:
        return {}
    for name, rate in (*ceilings.matrix_flops.items(), ("bandwidth", ceilings.bandwidth)):
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"ceilings: got {rate} for {name}, expected a number above 0")
    rates: dict[float, list[str]] = {}
    for name, rate in ceilings.matrix_flops.items():
        rates.setdefault(rate / _TERA, []).append(name)
    return {rate: f"{', '.join(names)}: {rate:.3g} TFLOP/s" for rate, names in rates.items()}


def _draw_ceilings(axes: Axes, lines: dict[float, str], bandwidth: float) -> None:
    """Draws what limits kernels: rates in TFLOP/s from their ridges on, bandwidth in TB/s."""
    left, right = axes.get_xlim()
    corner = max(lines, default=bandwidth * right) / bandwidth
    slanted = [left, corner], [bandwidth * left, bandwidth * corner]
    level = [([rate / bandwidth, right], [rate, rate]) for rate in lines]
    for x, y in (slanted, *level):
        axes.plot(x, y, color="black", linewidth=1.2)
    for label, height in zip(lines.values(), _heights(axes, lines, 1.3), strict=True):
        axes.text(
            0.99,
            height + 0.005,
            label,
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=_LABEL,
        )
    bottom = axes.get_ylim()[0]
    # A third of the way up what is seen of the line.
    low = max(left, bottom / bandwidth)
    middle = low * (corner / low) ** (1 / 3)
    above = 1.2 * bandwidth * middle
    axes.text(
        middle,
        above,
        f"bandwidth: {1e3 * bandwidth:,.0f} GB/s",
        rotation=math.degrees(math.atan2(above, middle)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        ha="center",
        va="bottom",
        fontsize=_LABEL,
    )


def _heights(axes: Axes, values: Iterable[float], lines: float) -> list[float]:
    """Heights of labels of values on the logarithmic vertical axis, `lines` of text apart.

    They are fractions of the length of the axis.
    """
    bottom, top = np.log(axes.get_ylim())
    wanted = [float((math.log(value) - bottom) / (top - bottom)) for value in values]
    return spread(wanted, lines * _LABEL / (axes.bbox.height * 72 / axes.figure.dpi))


def _has_place(kernel: KernelTime) -> bool:
    """Whether a kernel has an arithmetic intensity and a rate; NaN is not above 0."""
    return kernel.flops > 0 and kernel.bytes > 0 and kernel.seconds > 0


def _totals(kernels: Iterable[KernelTime]) -> list[_Total]:
    """Sums by name, those of most time first."""
    by_name: dict[str, list[KernelTime]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    totals = [
        _Total(name, *(sum(getattr(k, x) for k in own) for x in ("seconds", "flops", "bytes")))
        for name, own in by_name.items()
    ]
    return sorted(totals, key=lambda total: -total.seconds)


def _calls(profile: Profile) -> tuple[ProfiledCall, ...]:
    if not profile.calls:
        raise ValueError("profile: it has no calls, so there is nothing to draw")
    return profile.calls


def _device_name(profile: Profile) -> str:
    return profile.calls[0].device if profile.device is None else profile.device.name
