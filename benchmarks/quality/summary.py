r"""Makes tables and pictures of what `evaluate.py` measured.

    python benchmarks/quality/summary.py build/quality/evaluation*.json --name h200-quality

Intervals are of 95%, from a bootstrap that draws seeds, then texts of each, with replacement; the
change of a text's loss is paired with that text under exact attention. Writes NAME.md, NAME.json
(without single texts) and pictures to ``--output``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from jax_aat import plot

Rows = list[dict[str, Any]]
_RESAMPLES = 4000
_AIM = 1 / 3
"""The share of the loss change of block top-k and MRA that is aimed at."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--name", default="quality")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    return parser.parse_args(arguments)


def bootstrap(groups: list[np.ndarray]) -> tuple[float, float]:
    """Interval of 95% of the mean over groups of the means of each, both drawn anew."""
    generator = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        drawn = generator.integers(len(groups), size=len(groups))
        means.append(np.mean([generator.choice(groups[i], len(groups[i])).mean() for i in drawn]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def by_case(rows: Rows) -> tuple[dict[tuple[int, int], dict[str, Any]], dict[Any, Rows]]:
    """Exact attention by seed and length, the others by length, name and fraction."""
    exact = {(row["seed"], row["length"]): row for row in rows if row["name"] == "exact"}
    cases = defaultdict(list)
    for row in rows:
        if not row["fidelity"] and row["name"] != "exact":
            cases[row["length"], row["name"], row["fraction"]].append(row)
    return exact, cases


def changes_of(row: dict[str, Any], exact: dict[Any, Any], what: str = "losses") -> np.ndarray:
    """Of every text, what changes against exact attention."""
    found = np.array(row[what])
    return found - np.array(exact[row["seed"], row["length"]][what])[: len(found)]


PLACES = ("1st quarter", "2nd", "3rd", "4th", "last position")


def changes_by_place(rows: Rows) -> Rows:
    """One row a length, attention and fraction: changes by the place in a query tile, intervals."""
    exact, cases = by_case(rows)
    table = []
    for (length, name, fraction), found in sorted(cases.items()):
        changes = [changes_of(row, exact, "losses_by_place") for row in found]
        table.append(
            {
                "length": length,
                "name": name,
                "fraction": fraction,
                "changes": np.mean([x.mean(0) for x in changes], 0).tolist(),
                "intervals": [bootstrap([x[:, i] for x in changes]) for i in range(len(PLACES))],
            }
        )
    return table


def places(table: Rows) -> str:
    """Changes by the place in a query tile, as text."""
    lines = [
        [
            *(row["length"], row["name"], f"{row['fraction']:.4g}"),
            *(
                f"{change:.4f} [{low:.4f}, {high:.4f}]"
                for change, (low, high) in zip(row["changes"], row["intervals"], strict=True)
            ),
        ]
        for row in table
    ]
    return tabulate(lines, ["S", "", "fraction", *PLACES], "github", disable_numparse=True)


def loss_changes(rows: Rows) -> Rows:
    """One row a length, attention and fraction: mean change of the loss, in nats, and interval."""
    exact, cases = by_case(rows)
    table = []
    for (length, name, fraction), found in sorted(cases.items()):
        changes = [changes_of(row, exact) for row in found]
        table.append(
            {
                "length": length,
                "name": name,
                "fraction": fraction,
                "spent": float(np.mean([row["spent"] for row in found])),
                "change": float(np.mean([change.mean() for change in changes])),
                "interval": bootstrap(changes),
                "by_seed": {
                    row["seed"]: float(x.mean()) for row, x in zip(found, changes, strict=True)
                },
                "tokens": int(sum(change.size for change in changes) * length),
                "spent_by_layer": np.mean([row["spent_by_layer"] for row in found], 0).tolist(),
            }
        )
    return table


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
    low, high = row["interval"]
    return f"{row['change']:.4f} [{low:.4f}, {high:.4f}]"


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


def ratios(rows: Rows) -> str:
    """What our loss change is of the others', and how far it is from the share aimed at.

    The interval is that of our change less that share of the other's, text by text.
    """
    exact, cases = by_case(rows)
    lines = []
    for (length, name, fraction), found in sorted(cases.items()):
        ours = {row["seed"]: row for row in cases.get((length, "jax_aat", fraction), ())}
        pairs = [(ours[row["seed"]], row) for row in found if row["seed"] in ours]
        if name not in ("block top-k", "MRA") or not pairs:
            continue
        changes = [[changes_of(row, exact) for row in pair] for pair in pairs]
        mean, other = (float(np.mean([pair[i].mean() for pair in changes])) for i in range(2))
        excess = [a[: len(b)] - _AIM * b[: len(a)] for a, b in changes]
        low, high = bootstrap(excess)
        answer = "yes" if high <= 0 else "no" if low > 0 else "not told"
        line = [length, f"{fraction:.4g}", name, f"{mean / other:.3f}" if other > 0 else ""]
        excess_mean = np.mean([x.mean() for x in excess])
        lines.append([*line, f"{excess_mean:.4f} [{low:.4f}, {high:.4f}]", answer])
    headers = ["S", "fraction", "of", "jax_aat / its change"]
    headers += ["jax_aat less a third of it, nats", "at most a third"]
    return tabulate(lines, headers, "github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the measurements, writes the tables and pictures."""
    args = parse_arguments(arguments)
    measured = [json.loads(file.read_text()) for file in args.files]
    rows = [row for part in measured for row in part["rows"]]
    changes, errors = loss_changes(rows), fidelities(rows)
    by_place = changes_by_place(rows)
    exact = [row for row in rows if row["name"] == "exact"]
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / args.name
    facts = {name: measured[0][name] for name in ("jax_device", "jax", "commit")}
    lines = [f"{name}: {fact}  " for name, fact in facts.items()]
    lines += [f"command: `{part['command']}`  " for part in measured]
    lines += [
        f"exact loss, seed {row['seed']}, S = {row['length']}: {np.mean(row['losses']):.4f} nats, "
        f"{len(row['losses']) * row['length']} bytes  "
        for row in exact
    ]
    lines += ["", "## Change of held-out loss, nats a byte, all layers replaced", ""]
    lines += [pivot(changes, change_cell), "", ratios(rows), ""]
    lines += ["By the place in a tile of queries, which choose levels together:", ""]
    lines += [places(by_place), ""]
    lines += ["Operations spent:", "", pivot(changes, lambda row: f"{row['spent']:.4f}"), ""]
    lines += ["## Relative error of o, on the exact operands of each layer", ""]
    lines += [pivot(errors, lambda row: f"{row['error']:.4f}"), "", "IFQ:", ""]
    lines += [pivot(errors, lambda row: f"{row['ifq']:.4f}"), ""]
    stem.with_suffix(".md").write_text("\n".join(lines))
    result = {**facts, "changes": changes, "by_place": by_place, "errors": errors}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw_changes(changes, args.output / f"{args.name}-loss.png")
    draw_layers(errors, args.output / f"{args.name}-layers.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
