"""`resolution_map`: at which level a plan lets each tile of queries see the keys."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator, StrMethodFormatter

from jax_aat.boundary import boundary
from jax_aat.levels import EXACT, GRANULE, HIDDEN, Grid, unpack_levels
from jax_aat.plan import TilePlan
from jax_aat.problem import Options
from jax_aat.report import LEVEL_NAMES

NOT_VISIBLE = len(LEVEL_NAMES)
# The more of the keys is read, the darker, so that the order survives in grey.
COLOURS = ("#16285c", "#d1603d", "#f3c969", "#c3d0dc", "#ffffff")
LABELS = (
    "exact",
    f"mean of {GRANULE} keys",
    "super-tile: mean of up to {super_tile:,} keys",
    "left out",
    "not visible",
)
MOST_CELLS = 256
"""Most cells along each axis of a panel; more of them cannot be told apart in print."""
_PANEL = 3.4  # inches
_COLUMNS = 3  # panels side by side

Array = np.ndarray[Any, Any]


def resolution_map(
    plan: TilePlan,
    *,
    batch: int = 0,
    heads: Sequence[int] | None = None,
    axes: Axes | Sequence[Axes] | None = None,
) -> Figure | SubFigure:
    """Draws the levels of a plan: tiles of queries downwards, keys to the right.

    Query heads that share their tiles share a panel, whose title says which part of the granules
    that its tiles see is at which level. A cell is a tile by a granule of 16 keys; where there are
    more than 256 along an axis it joins as many of them as make 256 or fewer, a power of two, and
    shows the level of most of its granules that are visible (of equally many: the finest).

    'Left out' is what a plan with ``levels=(0,)`` does not read; other plans read all that is
    visible. A plan does not hold lengths, segments and masks: what these hide counts as left out in
    a plan with ``levels=(0,)``, and as not visible in others.

    Args:
      plan: A plan of concrete arrays, with one batch axis.
      batch: Which batch entry.
      heads: Query heads to draw, those that share tiles once; None: all.
      axes: Where to draw, as many as there are panels; None: in a new figure. A figure that has no
        legend yet gets one.

    Returns:
      The figure drawn into.

    Raises:
      TypeError: `plan` is no `TilePlan`.
      ValueError: The plan is a stack of plans, `batch` or `heads` are out of range, no head is
        asked for, or there are more or fewer axes than panels.
    """
    if not isinstance(plan, TilePlan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a jax_aat.TilePlan")
    if plan.levels.ndim != 4:
        raise ValueError(
            f"plan: got levels of shape {list(plan.levels.shape)}, expected [B, L, I, W]; of "
            "stacked plans take one: jax.tree.map(lambda x: x[0], plan)"
        )
    if not 0 <= batch < plan.levels.shape[0]:
        raise ValueError(f"batch: got {batch}, the plan has entries 0 to {len(plan.levels) - 1}")
    grid = plan.grid
    lists = _lists(grid, heads)
    shown = _shown(plan, batch)
    panels = _panels(len(lists), axes)
    rows, columns = (_joined(count) for count in (grid.tiles, grid.granules))
    for panel, index in zip(panels, lists, strict=True):
        _draw(panel, shown[index], grid, rows, columns)
        panel.set_title(_title(grid, index, shown[index]), fontsize="small")
    figure = panels[0].figure
    if not figure.legends:
        cell = f"{columns * GRANULE} keys x {rows * grid.positions} queries"
        levels = plan.adaptation.levels
        figure.legend(
            handles=[
                Patch(
                    facecolor=COLOURS[level],
                    edgecolor="black",
                    linewidth=0.5,
                    label=LABELS[level].format(super_tile=grid.super_tile),
                )
                for level in (*levels, *((HIDDEN,) if levels == (EXACT,) else ()), NOT_VISIBLE)
            ],
            title=f"{'level' if rows * columns == 1 else 'most frequent level'} in {cell}",
            loc="outside lower center",
            ncols=2 if len(panels) == 1 else len(LABELS),
            fontsize="small",
            title_fontsize="small",
            handlelength=1.2,
        )
    return figure


def _lists(grid: Grid, heads: Sequence[int] | None) -> list[int]:
    """The lists of some query heads, each once."""
    heads = range(grid.heads) if heads is None else heads
    for head in heads:
        if not 0 <= head < grid.heads:
            raise ValueError(f"heads: got {head}, the plan has heads 0 to {grid.heads - 1}")
    if len(heads) == 0:
        raise ValueError("heads: got none, expected at least one")
    return list(dict.fromkeys(head // grid.tile_heads for head in heads))


def _shown(plan: TilePlan, batch: int) -> Array:
    """Levels of a batch entry, `NOT_VISIBLE` where hidden from its tiles: [L, I, granules]."""
    level = np.asarray(unpack_levels(plan.levels[batch], plan.grid.granules))
    hidden = level == HIDDEN
    if plan.adaptation.levels == (EXACT,):
        options = Options(1.0, plan.causal, plan.window).planned(plan.grid)
        hidden = hidden & ~np.asarray(boundary({}, options, plan.grid).seen[0])
    return np.where(hidden, NOT_VISIBLE, level)


def _panels(count: int, axes: Axes | Sequence[Axes] | None) -> Sequence[Axes]:
    if axes is not None:
        given = [axes] if isinstance(axes, Axes) else list(axes)
        if len(given) != count:
            raise ValueError(f"axes: got {len(given)}, expected one for each of {count} panels")
        return given
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    size = (_PANEL * max(columns, 1.2), _PANEL * rows + 0.6)
    grid = Figure(figsize=size, layout="constrained").subplots(
        rows, columns, squeeze=False, subplot_kw={"box_aspect": 1}
    )
    for unused in grid.flat[count:]:
        unused.remove()
    return list(grid.flat[:count])


def _joined(count: int) -> int:
    """How many neighbours along an axis make a cell."""
    return 1 << max(0, math.ceil(math.log2(count / MOST_CELLS)))


def _draw(axes: Axes, shown: Array, grid: Grid, rows: int, columns: int) -> None:
    """Draws the levels [I, granules] of a list, by cells of tiles x granules."""
    cells = _most_frequent(shown, rows, columns)
    bottom, right = (size * cell for size, cell in zip(cells.shape, (rows, columns), strict=True))
    axes.imshow(
        cells,
        cmap=ListedColormap(COLOURS),
        vmin=-0.5,
        vmax=len(COLOURS) - 0.5,
        extent=(0, right * GRANULE, bottom * grid.positions, 0),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set(xlim=(0, grid.keys), ylim=(grid.queries, 0))
    axes.set(xlabel="key position", ylabel="query position")
    for axis, size in ((axes.xaxis, grid.keys), (axes.yaxis, grid.queries)):
        axis.set_major_locator(MultipleLocator(max(1, 2 ** math.floor(math.log2(size / 3)))))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize="small")


def _most_frequent(shown: Array, rows: int, columns: int) -> Array:
    """The level of most of the visible granules in every cell of rows x columns."""
    padding = [(0, -size % cell) for size, cell in zip(shown.shape, (rows, columns), strict=True)]
    padded = np.pad(shown, padding, constant_values=NOT_VISIBLE)
    cells = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
    counts = np.stack([(cells == level).sum((1, 3)) for level in range(NOT_VISIBLE)])
    return np.where(counts.any(0), counts.argmax(0), NOT_VISIBLE)


def _title(grid: Grid, index: int, shown: Array) -> str:
    first = index * grid.tile_heads
    last = first + grid.tile_heads - 1
    which = f"query head {first}" if first == last else f"query heads {first} to {last}"
    visible = max(int((shown != NOT_VISIBLE).sum()), 1)
    shares = [
        f"{(shown == level).sum() / visible:.1%} {name}"
        for level, name in enumerate(LEVEL_NAMES)
        if (shown == level).any()
    ]
    return f"{which}\n{', '.join(shares)}"
