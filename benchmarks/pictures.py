"""The picture of a benchmark of speed: time against length, a line a contender."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

_COLUMNS = 2
_STYLES = ("-", "--", "-.", ":")
_MARKS = "osD^vPX*<>"
# Okabe and Ito: told apart by the colour-blind and, with the marks, in grey.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C564B")


def draw(path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draws a panel for each title and its rows; contenders look alike in all of them.

    Time is that of calls in a row; a row has ``keys``, ``contender`` and ``pipelined``.
    """
    if not panels:
        return
    names = list(dict.fromkeys(row["contender"] for rows in panels.values() for row in rows))
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * lines + 0.3 * len(names) / columns), dpi=150)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    handles: dict[str, Any] = {}
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        for index, name in enumerate(names):
            points = sorted((x["keys"], x["pipelined"]) for x in rows if x["contender"] == name)
            if points:
                (handles[name],) = axis.plot(
                    *zip(*points, strict=True),
                    color=_COLOURS[index % len(_COLOURS)],
                    marker=_MARKS[index % len(_MARKS)],
                    linestyle=_STYLES[index // len(_COLOURS) % len(_STYLES)],
                    linewidth=2.2 if name.startswith("jax_aat") else 1.2,
                    markersize=5,
                )
        _label(axis, title, sorted({row["keys"] for row in rows}))
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=2 * columns - 1
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path)


def _label(axis: Any, title: str, lengths: Sequence[int]) -> None:
    first, _, rest = title.partition(", batch")
    axis.set_title(f"{first}\nbatch{rest}", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("positions")
    axis.set_ylabel("milliseconds a call")
    axis.grid(True, which="major", color="#d0d0d0", linewidth=0.6)
    axis.grid(True, which="minor", axis="y", color="#ececec", linewidth=0.4)
