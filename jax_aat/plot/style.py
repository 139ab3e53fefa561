"""Colours that differ in print, in grey and for the colour-blind, and figures to draw into."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Qualitative colours of Okabe and Ito, without yellow, which paper swallows."""


def drawing_area(axes: Axes | None, width: float, height: float) -> tuple[Figure | SubFigure, Axes]:
    """The axes given and their figure, or those of a new figure of a size in inches."""
    if axes is not None:
        return axes.figure, axes
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions near the ones that are wanted, in their order, at least `gap` apart.

    Where there is room, all lie between 0 and 1.
    """
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(order))
    # Less the offsets, positions `gap` apart are merely ascending.
    free = np.maximum.accumulate(np.asarray(wanted, float)[order] - offsets)
    free = np.maximum(np.minimum(free, 1 - gap * max(len(order) - 1, 0)), 0)
    placed = np.empty(len(order))
    placed[order] = free + offsets
    return [float(x) for x in placed]
