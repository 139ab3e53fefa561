r"""Makes tables and pictures of what `evaluate.py` measured.

    python benchmarks/quality/summary.py build/quality/evaluation*.json --name h200-quality

Intervals are of 95%, from a bootstrap that draws seeds, then texts of each, with replacement; the
change of a text's loss is paired with that text under exact attention, and ours with another's.
Writes NAME.md, NAME.json (without single texts) and pictures to ``--output``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from changes import PLACES, Rows, changes_by_place, loss_changes, shares
from matplotlib.figure import Figure
from tabulate import tabulate

from jax_aat import plot

FACTS = ("jax_device", "jax", "commit", "changed_files", "command")
"""What the head of a record names of every file."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--name", default="quality")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    return parser.parse_args(arguments)


def fidelities(rows: Rows) -> Rows:
    """One row a length, attention and fraction: relative error of o and IFQ by layer."""
    cases = defaultdict(list)
    for row in rows:
        if row["fidelity"]:
            cases[row["length"], row["name"], row["fraction"]].append(row)
    table = []
    for (length, name, fraction), found in sorted(cases.items()):
        error = np.mean([row["error_by_head"] for row in found], 0)
        quality = np.mean([row["ifq_by_head"] for row in found], 0)
        described = {"length": length, "name": name, "fraction": fraction}
        described |= {"error": float(error.mean()), "error_by_layer": error.mean(1).tolist()}
        described |= {"ifq": float(quality.mean()), "ifq_by_layer": quality.mean(1).tolist()}
        table.append(described)
    return table


def pivot(table: Rows, cell: Any) -> str:
    """Attentions down, fractions across, a table a length."""
    texts = []
    for length in sorted({row["length"] for row in table}):
        cells = {
            (row["name"], row["fraction"]): cell(row) for row in table if row["length"] == length
        }
        fractions = sorted({fraction for _, fraction in cells}, reverse=True)
        names = sorted({name for name, _ in cells}, key=lambda name: (name != "jax_aat", name))
        lines = [[name, *(cells.get((name, x), "") for x in fractions)] for name in names]
        headers = [f"S = {length}", *(f"{x:.4g}" for x in fractions)]
        texts.append(tabulate(lines, headers, tablefmt="github", disable_numparse=True))
    return "\n\n".join(texts)


def change_cell(row: dict[str, Any]) -> str:
    """A change of loss with its interval."""
    return with_interval(row["change"], *row["interval"])


def with_interval(mean: float, low: float, high: float) -> str:
    """A change and the ends of its interval, as text."""
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def draw_changes(table: Rows, path: Path) -> None:
    """Change of loss against the fraction of the operations, a picture a length."""
    lengths = sorted({row["length"] for row in table})
    names = sorted({row["name"] for row in table}, key=lambda name: (name != "jax_aat", name))
    figure = Figure(figsize=(6 * len(lengths), 4.5), layout="constrained")
    for axes, length in zip(
        figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True
    ):
        curves: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
        for row in table:
            if row["length"] == length:
                curves[row["name"]].append((row["spent"], row["change"], *row["interval"]))
        plot.quality(curves, value="change of loss, nats a byte", axes=axes)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_title(f"{length} bytes")
    figure.savefig(path, dpi=130)


def draw_layers(table: Rows, path: Path) -> None:
    """Relative error of o, layer by layer, at the fraction most attentions were measured at."""
    if not table:
        return
    cases = [(row["length"], row["fraction"]) for row in table]
    case = max(sorted(set(cases)), key=cases.count)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in table:
        if (row["length"], row["fraction"]) == case:
            style = "o-" if row["name"] == "jax_aat" else "s--"
            axes.plot(row["error_by_layer"], style, label=row["name"], markersize=4)
    axes.set(xlabel="layer", ylabel="relative error of o", ylim=(0, None))
    axes.set_title(f"{case[0]} bytes, {case[1]:.4g} of the operations")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def places(table: Rows) -> str:
    """Changes by the place in a tile of queries, ours first, as text."""

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["length"], row["name"] != "jax_aat", row["name"], -row["fraction"]

    lines = [
        [
            *(row["length"], row["name"], row["tile"], f"{row['fraction']:.4g}"),
            *map(with_interval, row["changes"], *row["intervals"]),
        ]
        for row in sorted(table, key=order)
    ]
    headers = ["S", "", "tile", "fraction", *PLACES]
    return tabulate(lines, headers, "github", disable_numparse=True)


def kept_shares(table: Rows) -> str:
    """What our change is of the others', and whether it is at most a third, as text."""
    lines = []
    for row in table:
        line = [row["length"], f"{row['fraction']:.4g}", row["name"]]
        for found in (row[what] for what in ("all", "last") if what in row):
            share, excess = found["share"], with_interval(found["excess"], *found["interval"])
            line += ["" if share is None else f"{share:.3f}", f"{found['kept']}: {excess}"]
        lines.append(line)
    headers = ["S", "fraction", "of"]
    headers += ["jax_aat / its change", "at most a third: jax_aat less a third of it"]
    headers += ["of last places", "at most a third of that"]
    width = max(map(len, lines), default=len(headers))
    return tabulate(lines, headers[:width], "github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the measurements, writes the tables and pictures."""
    args = parse_arguments(arguments)
    measured = [json.loads(file.read_text()) for file in args.files]
    rows = [row for part in measured for row in part["rows"]]
    changes, errors, thirds = loss_changes(rows), fidelities(rows), shares(rows)
    by_place = changes_by_place(rows)
    exact = [row for row in rows if row["name"] == "exact"]
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / args.name
    facts = [{name: part[name] for name in FACTS if name in part} for part in measured]
    heads = [f"{name}: {fact}  " for part in facts for name, fact in part.items()]
    lines = list(dict.fromkeys(heads))
    lines += [
        f"exact loss, seed {row['seed']}, S = {row['length']}: {np.mean(row['losses']):.4f} nats, "
        f"{len(row['losses']) * row['length']} bytes  "
        for row in exact
    ]
    lines += ["", "## Change of held-out loss, nats a byte, all layers replaced", ""]
    lines += [pivot(changes, change_cell), "", kept_shares(thirds), ""]
    if by_place:
        lines += ["By the place in a tile of positions, whose queries choose together:", ""]
        lines += [places(by_place), ""]
    lines += ["Operations spent:", "", pivot(changes, lambda row: f"{row['spent']:.4f}"), ""]
    lines += ["## Relative error of o, on the exact operands of each layer", ""]
    lines += [pivot(errors, lambda row: f"{row['error']:.4f}"), "", "IFQ:", ""]
    lines += [pivot(errors, lambda row: f"{row['ifq']:.4f}"), ""]
    stem.with_suffix(".md").write_text("\n".join(lines))
    result = {"runs": facts, "changes": changes, "by_place": by_place, "shares": thirds}
    result["errors"] = errors
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw_changes(changes, args.output / f"{args.name}-loss.png")
    draw_layers(errors, args.output / f"{args.name}-layers.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
