"""``python -m jax_aat show``: the resolution map of a saved plan, or of one for a demonstration."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.adaptation import Adaptation
from jax_aat.attention import plan_tiles
from jax_aat.boundary import boundary
from jax_aat.commands import terminal
from jax_aat.levels import EXACT, GRANULE, HIDDEN, unpack_levels
from jax_aat.plan import TilePlan
from jax_aat.problem import Options, Slot
from jax_aat.report import LEVEL_NAMES
from jax_aat.visible_pairs import dense_flops, hidden_rows

_CHARACTERS = "#+. "
"""What levels 0 to 3 look like."""
_MOST_LINES = 48
_LEFT_MARGIN = 9  # columns of the positions beside the map
_DEMONSTRATION = Adaptation(budget=0.25)

Array = np.ndarray[Any, Any]


def add_to(commands: Any) -> None:
    """Adds the parser of ``show``."""
    parser = terminal.add_command(
        commands,
        "show",
        run,
        help="show at which resolution a plan lets queries see keys",
        description=(
            "Prints the levels of a plan by head, the FLOPs of the rows that are read over those\n"
            "of exact attention, and a map: query tiles downwards, keys to the right. Without a\n"
            "file the plan is one for synthetic keys in clusters, the same every time.\n\n"
            "Plans are saved by TilePlan.save: jax_aat.plan_tiles(...).save('plan.npz')"
        ),
        examples=["", "plan.npz --head 3", "plan.npz --output plan.png"],
    )
    parser.add_argument("plan", nargs="?", type=Path, metavar="PLAN_FILE", help="a saved plan")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.png",
        help="also draw the map as a picture; needs the extra 'plot'",
    )
    parser.add_argument(
        "--head", type=int, metavar="N", help="query head to show; default: 0, in pictures all"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the plan and draws it."""
    console = terminal.console()
    draw = None if options.output is None else _resolution_map()
    plan = demonstration() if options.plan is None else _read(options.plan)
    heads = plan.grid.heads
    if options.head is not None and not 0 <= options.head < heads:
        raise terminal.UsageError(
            f"--head: got {options.head}, the plan has heads 0 to {heads - 1}"
        )
    if options.plan is None:
        console.print("a plan for synthetic keys in clusters", soft_wrap=True)
    console.print(f"{plan}\n{plan.adaptation}", soft_wrap=True)
    console.print(_table(plan))
    for line in text_map(plan, options.head or 0, console.width):
        console.print(line, soft_wrap=True)
    if draw is not None:
        figure = draw(plan, heads=None if options.head is None else [options.head])
        try:
            figure.savefig(options.output)
        except (OSError, ValueError) as error:
            raise terminal.UnusableError(f"--output: {error}") from error
        console.print(f"written: {options.output}", soft_wrap=True)
    return terminal.GOOD


def demonstration() -> TilePlan:
    """A plan for queries that look for topics, made by XLA."""
    length, heads, kv_heads, head_dim, topics = 2048, 4, 2, 32, 24
    generator = np.random.default_rng(0)
    centres = 1.5 * generator.normal(size=(topics, head_dim))

    def noise(count: int) -> Array:
        return 0.3 * generator.normal(size=(1, length, count, head_dim))

    # Topics last for 64 positions; queries ask for other ones.
    told, asked = (
        np.repeat(generator.integers(0, topics, (1, length // 64, kv_heads)), 64, axis=1)
        for _ in range(2)
    )
    query = 2 * np.repeat(centres[asked], heads // kv_heads, axis=2) + noise(heads)
    key, value = centres[told] + noise(kv_heads), centres[told] + noise(kv_heads)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    choose = jax.jit(
        lambda q, k, v: plan_tiles(q, k, v, _DEMONSTRATION, is_causal=True, implementation="xla")
    )
    plan: TilePlan = choose(*arrays)
    return plan


def text_map(plan: TilePlan, head: int, width: int) -> Iterator[str]:
    """The lines of a map of the first batch entry.

    A character joins several tiles and granules where not all fit, and shows the finest level that
    a quarter of them reach.

    Args:
      plan: Of concrete arrays.
      head: Query head to show.
      width: Columns that there are.
    """
    grid = plan.grid
    level = np.asarray(unpack_levels(plan.levels[0], grid.granules))[head // grid.tile_heads]
    tiles = -(-grid.tiles // _MOST_LINES)
    granules = -(-grid.granules // max(width - _LEFT_MARGIN, 1))
    names = "  ".join(f"{c} {name}" for c, name in zip(_CHARACTERS, LEVEL_NAMES[:3], strict=False))
    yield (
        f"head {head}: {names}  blank: not read; a character stands for "
        f"{tiles * grid.positions} queries x {granules * GRANULE} keys"
    )
    for start in range(0, grid.tiles, tiles):
        rows = level[start : start + tiles]
        cells = (rows[:, i : i + granules].ravel() for i in range(0, grid.granules, granules))
        text = "".join(_CHARACTERS[np.sort(cell)[(len(cell) + 3) // 4 - 1]] for cell in cells)
        yield f"{start * grid.positions:>{_LEFT_MARGIN - 2}} |{text}".rstrip()


def _read(path: Path) -> TilePlan:
    try:
        return TilePlan.load(path)
    except OSError as error:
        raise terminal.UnusableError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise terminal.UnusableError(str(error)) from error


def _table(plan: TilePlan) -> Any:
    """Shares of levels and FLOPs, by heads that share tiles."""
    grid = plan.grid
    options = Options(1.0, plan.causal, plan.window).planned(grid)
    level = np.asarray(unpack_levels(plan.levels, grid.granules))
    seen = level != HIDDEN
    drops = plan.adaptation.levels == (EXACT,)
    if drops:
        seen = seen | np.asarray(boundary({}, options, grid).seen)
    names = LEVEL_NAMES if drops else LEVEL_NAMES[:3]
    flops = "FLOPs without planning"
    table = terminal.table("heads", *names, flops, numbers=(*names, flops))
    # Only the shape is looked at, and a head_dim of 1 cancels out.
    operands: Any = {
        Slot.Q: jax.ShapeDtypeStruct((len(level), grid.queries, grid.heads, 1), jnp.float32)
    }
    exact = float(dense_flops(operands, options, grid).sum()) / grid.lists
    hidden = 4 * grid.query_tile * float(hidden_rows(operands, options, grid).sum()) / grid.lists
    read = 4 * grid.query_tile * np.asarray(plan.rows()).sum((0, 2))
    for i in range(grid.lists):
        shares = [(level[:, i] == which)[seen[:, i]].mean() for which in range(len(names))]
        heads = range(i * grid.tile_heads, (i + 1) * grid.tile_heads)
        table.add_row(
            ", ".join(map(str, heads)),
            *(f"{share:.1%}" for share in shares),
            f"{(read[i] - hidden) / exact:.1%}",
        )
    return table


def _resolution_map() -> Callable[..., Any]:
    """`jax_aat.plot.resolution_map`.

    Raises:
      UnusableError: matplotlib is not installed.
    """
    try:
        drawn: Callable[..., Any] = importlib.import_module("jax_aat.plot").resolution_map
    except (ImportError, AttributeError) as error:
        raise terminal.UnusableError(f"--output: {error}") from error
    return drawn
