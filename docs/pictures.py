"""Draws the pictures of `docs/pictures.md` into `docs/pictures/`: ``python docs/pictures.py``.

The first two show the idea, the others real plans for synthetic inputs, computed by XLA.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

import jax_aat
from jax_aat.levels import EXACT, GRANULE, MEAN, SUPER_MEAN, Grid, unpack_levels

FOLDER = Path(__file__).parent / "pictures"
# From dark to light, so that they can be told apart in grey, too.
COLOURS = {EXACT: "#08306b", MEAN: "#4a90c9", SUPER_MEAN: "#c3daee"}
NAMES = {EXACT: "exact", MEAN: "mean of 16 keys", SUPER_MEAN: "part of the mean of 1,024 keys"}
PLANNING = "#e08214"
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def topics(length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query [1, T, N, H], key and value [1, T, K, H] of a text that comes back to its topics.

    Runs of 128 positions are about one of 24 topics; queries look for keys of their own topic.
    """
    draw = jax.random.split(jax.random.key(3), 4)
    about = jnp.repeat(jax.random.randint(draw[0], (length // 128,), 0, 24), 128)
    topic = jax.random.normal(draw[1], (24, KV_HEADS, HEAD_DIM))[about]
    key, value = topic + 0.7 * jax.random.normal(draw[2], (2, 1, *topic.shape))
    query = jnp.repeat(topic, HEADS // KV_HEADS, axis=1)
    return 0.5 * query + 0.5 * jax.random.normal(draw[3], (1, *query.shape)), key, value


def draw_reading(axes: Axes) -> None:
    """The keys of two super-tiles as boxes, and below them the rows that one tile reads."""
    axes.set(xlim=(-0.2, 24), ylim=(-2.2, 2.9))
    axes.axis("off")
    levels = [MEAN, EXACT] + [SUPER_MEAN] * 6
    levels += [MEAN, MEAN, EXACT, MEAN, MEAN, EXACT, EXACT, EXACT]
    starts = np.arange(16) + np.where(np.arange(16) < 8, 0, 1)
    super_row = 4.96
    arrow = {"arrowstyle": "->", "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
    for start, level in zip(starts, levels, strict=True):
        axes.add_patch(
            Rectangle((start, 1), 0.92, 0.8, facecolor=COLOURS[level], edgecolor="black", lw=0.5)
        )
        middle = start + 0.46
        if level == SUPER_MEAN:
            axes.plot([middle, super_row], [0.95, -0.25], color="black", linewidth=0.6)
            continue
        axes.annotate("", (middle, 0.15), (middle, 0.95), arrowprops=arrow)
        if level == EXACT:
            axes.vlines(
                np.linspace(start + 0.02, start + 0.9, GRANULE), -0.6, 0.05, "black", lw=0.6
            )
        else:
            axes.vlines(middle, -0.6, 0.05, "black", linewidth=3)
    axes.vlines(super_row, -0.95, -0.25, "black", linewidth=6)
    for first, last, text in ((0, 7, "super-tile 0"), (8, 15, "super-tile 1, of the queries")):
        left, right = starts[first], starts[last] + 0.92
        axes.plot([left, left, right, right], [2.0, 2.15, 2.15, 2.0], color="black", linewidth=0.8)
        axes.text((left + right) / 2, 2.35, text, ha="center")
    axes.text(8.46, 1.4, "...", ha="center", va="center")
    axes.text(17.3, 1.4, "keys, in granules of 16\n(8 of the 64 of a super-tile)", va="center")
    axes.text(17.3, -0.6, "rows that the tile reads,\nin one softmax", va="center")
    handles = [
        Patch(facecolor=COLOURS[level], edgecolor="black", label=f"level {level}: {name}")
        for level, name in NAMES.items()
    ]
    axes.legend(
        handles=handles, loc="lower left", ncols=3, frameon=False, bbox_to_anchor=(0, -0.05)
    )


def draw_coarse_row(figure: Figure) -> None:
    """The weights of 16 keys and of the mean row in their place, for near and for far keys."""
    draw = np.random.default_rng(2).normal(size=(GRANULE, 2))
    draw -= draw.mean(0)
    query = np.array([1.2, 0.9])
    tops = figure.subplots(2, 2, width_ratios=(1, 1.7))
    for (plane, bars), spread, name in zip(
        tops, (0.25, 1.1), ("keys near their mean", "keys far apart"), strict=True
    ):
        keys = np.array([0.8, -0.4]) + spread * draw
        plane.scatter(*keys.T, s=14, color=COLOURS[MEAN], label="key")
        plane.scatter(*keys.mean(0), s=90, marker="X", color="black", label="their mean")
        plane.annotate("", query, (0, 0), arrowprops={"arrowstyle": "->", "color": PLANNING})
        plane.scatter(0, 0, s=12, color=PLANNING)
        plane.annotate("q", query, color=PLANNING, fontsize=11)
        plane.set(xlim=(-2, 3.4), ylim=(-3, 2), xticks=[], yticks=[], title=name)
        plane.set_aspect("equal")
        weights, mean_weight = np.exp(keys @ query), np.exp(keys.mean(0) @ query)
        bars.bar(range(GRANULE), weights, color=COLOURS[MEAN])
        bars.axhline(mean_weight, color="black", linewidth=2, label="exp(q . mean)")
        bars.set(xticks=range(GRANULE), xlim=(-0.6, 15.6), ylabel="exp(q . k)")
        bars.set_title(
            f"all keys: {weights.sum():.1f}; 16 times their mean: {16 * mean_weight:.1f}"
        )
    tops[0, 0].legend(loc="lower right", fontsize=8, handletextpad=0.1)
    tops[0, 1].legend(loc="upper right", fontsize=8)
    tops[1, 1].set_xlabel("key of the granule")


def draw_levels(figure: Figure, plans: dict[float, jax_aat.TilePlan]) -> None:
    """The levels maps of the first heads under some budgets."""
    colours = ListedColormap([*COLOURS.values(), "white"])
    tops = figure.subplots(1, len(plans), sharey=True)
    for axes, (budget, plan) in zip(tops, plans.items(), strict=True):
        axes.imshow(
            unpack_levels(plan.levels, plan.grid.granules)[0, 0],
            cmap=colours,
            vmin=0,
            vmax=3,
            extent=(0, plan.grid.keys, plan.grid.queries, 0),
            interpolation="none",
        )
        axes.set(title=f"budget={budget:g}", xlabel="key")
        ticks = range(1024, plan.grid.keys, 1024)
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.set_yticks(ticks, [f"{x:,}" for x in ticks])
    tops[0].set_ylabel("query")
    names = {**NAMES, 3: "not seen (causality)"}
    handles = [
        Patch(facecolor=colours(level), edgecolor="black", label=name)
        for level, name in names.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def split(plan: jax_aat.TilePlan, report: jax_aat.Report) -> dict[str, float]:
    """What the parts of a call take, in percent of the FLOPs of exact attention."""
    grid: Grid = plan.grid
    level = np.asarray(unpack_levels(plan.levels, grid.granules))
    rows = {EXACT: GRANULE * (level == EXACT).sum(), MEAN: (level == MEAN).sum()}
    rows[SUPER_MEAN] = int(plan.rows().sum()) - sum(rows.values())
    hidden = float(report.hidden_flops.sum() / report.flops.sum()) * sum(rows.values())
    rows[EXACT] -= hidden
    a_row = float(report.flops.sum()) / float(plan.rows().sum())
    dense = float(report.dense_flops.sum())
    parts = {NAMES[at]: float(100 * count * a_row / dense) for at, count in rows.items()}
    parts["planning and state"] = float(100 * report.planning_flops.sum() / dense)
    return parts


def draw_budget(axes: Axes, splits: dict[float, dict[str, float]]) -> None:
    """Bars of what budgets are spent on."""
    names = list(next(iter(splits.values())))
    left = np.zeros(len(splits))
    labels = [f"budget={budget:g}" for budget in splits]
    for name, colour in zip(names, [*COLOURS.values(), PLANNING], strict=True):
        parts = np.array([parts[name] for parts in splits.values()])
        axes.barh(labels, parts, left=left, color=colour, edgecolor="black", lw=0.5, label=name)
        for y, (start, part) in enumerate(zip(left, parts, strict=True)):
            dark = colour == COLOURS[EXACT]
            if part > 1.2:
                axes.text(
                    start + part / 2,
                    y,
                    f"{part:.1f}",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    fontsize=8,
                )
        left += parts
    axes.invert_yaxis()
    axes.set(xlabel="% of the FLOPs of exact attention")
    axes.legend(loc="lower right")


def save(figure: Figure, name: str) -> None:
    """Writes the figure as ``name``.svg, the same bytes for the same picture."""
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Draws all of them."""
    mpl.rcParams.update({"svg.hashsalt": "jax_aat", "font.size": 9, "axes.titlesize": 9})
    FOLDER.mkdir(exist_ok=True)

    figure = Figure(figsize=(8, 2.2), layout="constrained")
    draw_reading(figure.subplots())
    save(figure, "reading")

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    draw_coarse_row(figure)
    save(figure, "coarse_row")

    @jax.jit
    def attend(plan: jax_aat.TilePlan, *arrays: jax.Array) -> jax_aat.Report:
        return jax_aat.tiled_attention(
            *arrays, is_causal=True, plan=plan, implementation="xla", return_report=True
        )[1]

    plans, splits = {}, {}
    arrays = topics(4096)
    for budget in (0.5, 0.25, 0.125):
        plan = jax_aat.plan_tiles(
            *arrays,
            jax_aat.Adaptation(budget=budget, query_tile=128, super_tile=1024),
            is_causal=True,
            implementation="xla",
        )
        plans[budget] = plan
        splits[budget] = split(plan, attend(plan, *arrays))
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    draw_levels(figure, plans)
    save(figure, "levels")
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    draw_budget(figure.subplots(), splits)
    save(figure, "budget")
    print(splits)


if __name__ == "__main__":
    main()
