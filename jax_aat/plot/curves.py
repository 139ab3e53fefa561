"""`quality`: what is lost for the FLOPs that are saved."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from jax_aat.plot.style import COLOURS, drawing_area
from jax_aat.report import Report

Point = Report | Sequence[float]
"""(relative FLOPs, value), (relative FLOPs, value, low, high), or a report."""

# One more than colours, so that no two of 56 curves look the same.
_MARKERS = "osD^vPXp"
_SHOWN = 10
"""How many times above and below the values intervals are shown."""


def quality(
    curves: Mapping[str, Sequence[Point]],
    *,
    value: str = "relative error of the output",
    axes: Axes | None = None,
) -> Figure | SubFigure:
    """Draws an error, a loss or the like against FLOPs.

    FLOPs are a fraction of those of exact attention, on a logarithmic axis; so is the other axis
    where all values are above 0. Intervals are drawn as bands and bars; of those that reach more
    than 10 times above or below all values, as where too few rows were audited, the ends lie
    outside a logarithmic axis. The first curve is solid, those after it are dashed. A label without
    points is not drawn and keeps its colour and marker, so that pictures of the same labels share
    them.

    A report stands for `Report.relative_flops`, the mean over heads, against the audited
    `Report.relative_error` with its 95% interval, both of all heads together.

    Args:
      curves: Points by label, in any order; a point is (FLOPs, value), (FLOPs, value, low end of
        its interval, high end) or a `Report` of one call that audited rows.
      value: What the values are, with their unit: the label of their axis.
      axes: Where to draw; None: in a new figure.

    Returns:
      The figure drawn into.

    Raises:
      ValueError: There are no points, a point has neither 2 nor 4 numbers, one that is not finite,
        FLOPs that are not above 0 or an interval that ends before it starts, or a report is of
        several calls or has no audit.
    """
    points = {label: _points(label, given) for label, given in curves.items()}
    everything = np.array([point for of_curve in points.values() for point in of_curve])
    if everything.size == 0:
        raise ValueError(f"curves: got no points of {list(curves)}, expected at least one")
    figure, axes = drawing_area(axes, 7.5, 4.2)
    for i, (label, of_curve) in enumerate(points.items()):
        if not of_curve:
            continue
        flops, values, low, high = np.array(of_curve).T
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(
            flops,
            values,
            color=colour,
            linestyle="-" if i == 0 else "--",
            linewidth=1.8 if i == 0 else 1.2,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            label=label,
        )
        if (low < high).any():
            axes.fill_between(flops, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.vlines(flops, low, high, color=colour, linewidth=1)
    if (everything[:, 1] > 0).all():
        axes.set_yscale("log")
        values, low, high = everything[:, 1:].T
        axes.set_ylim(
            max(low.min() / 1.3, values.min() / _SHOWN),
            min(1.3 * high.max(), _SHOWN * values.max()),
        )
    else:
        axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    # From one power of two to another, with room for markers; what spends a little more or less
    # than one, as contenders of one budget do, does not reach for the next.
    octaves = np.log2(everything[:, 0])
    first, last = math.floor(octaves.min() + 0.1), math.ceil(octaves.max() - 0.1)
    axes.set_xlim(2 ** (first - 0.2), 2 ** (last + 0.2))
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in range(first, last + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g}%"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="FLOPs, of those of exact attention", ylabel=value)
    axes.grid(alpha=0.3)
    # Beside the curves, which may be anywhere.
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return figure


def _points(label: str, given: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """(FLOPs, value, low, high) in the order of FLOPs; low and high are the value without one."""
    points = []
    for i, point in enumerate(given):
        where = f"curves[{label!r}][{i}]"
        if isinstance(point, Report):
            numbers = _of_report(where, point)
        else:
            numbers = tuple(float(x) for x in point)
        if len(numbers) not in (2, 4):
            raise ValueError(
                f"{where}: got {len(numbers)} numbers, expected (FLOPs, value) or "
                "(FLOPs, value, low, high)"
            )
        flops, y, low, high = numbers if len(numbers) == 4 else (*numbers, numbers[1], numbers[1])
        if not np.isfinite(numbers).all() or flops <= 0 or low > high:
            raise ValueError(
                f"{where}: got {numbers}, expected finite numbers, FLOPs above 0 and low <= high"
            )
        points.append((flops, y, low, high))
    return sorted(points)


def _of_report(where: str, report: Report) -> tuple[float, ...]:
    """The point of a report."""
    if report.flops.ndim != 1:
        raise ValueError(
            f"{where}: got reports of shape {list(report.flops.shape[:-1])}, expected that of one "
            "call: jax.tree.map(lambda x: x[0], report)"
        )
    if not (np.asarray(report.audit.rows) > 0).all():
        raise ValueError(f"{where}: got a report without audited rows, which knows no error")
    audit = report.audit.joined(report.flops.shape[-1])
    flops = np.asarray(report.relative_flops, np.float64).mean()
    return (float(flops), float(audit.relative_error[0]), *map(float, audit.interval[0]))
