"""Changes of the loss against exact attention, paired text by text, with intervals of 95%."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
PLACES = ("first", "1st quarter", "2nd", "3rd", "4th", "last")
"""Places in a tile of queries at which `evaluate.py` tells losses apart."""
_RESAMPLES = 4000
_AIM = 1 / 3
"""The share of the loss change of block top-k and MRA that is aimed at."""


def bootstrap(groups: list[np.ndarray]) -> list[Any]:
    """Interval of the mean over groups of the means of each, both drawn anew.

    Args:
      groups: Of every seed, what was measured of its texts, [texts, ...].

    Returns:
      The lower and the upper ends, [2, ...].
    """
    generator = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        drawn = generator.integers(len(groups), size=len(groups))
        texts = [generator.choice(groups[i], len(groups[i])).mean(0) for i in drawn]
        means.append(np.mean(texts, 0))
    return np.percentile(means, [2.5, 97.5], axis=0).tolist()


def by_case(rows: Rows) -> tuple[dict[tuple[int, int], dict[str, Any]], dict[Any, Rows]]:
    """Exact attention by seed and length, the others by length, name and fraction."""
    exact = {(row["seed"], row["length"]): row for row in rows if row["name"] == "exact"}
    cases = defaultdict(list)
    for row in rows:
        if not row["fidelity"] and row["name"] != "exact":
            cases[row["length"], row["name"], row["fraction"]].append(row)
    return exact, cases


def _changes(row: dict[str, Any], exact: dict[Any, Any]) -> np.ndarray:
    """What every text loses more than under exact attention, [texts]."""
    found = np.array(row["losses"])
    return found - np.array(exact[row["seed"], row["length"]]["losses"])[: len(found)]


def _changes_by_place(row: dict[str, Any], exact: dict[Any, Any]) -> np.ndarray:
    """The same at the places of the contender's own tiles, [texts, PLACES]."""
    ((tile, losses),) = row["losses_by_place"].items()
    baseline = exact[row["seed"], row["length"]]["losses_by_place"][tile]
    return np.array(losses) - np.array(baseline)[: len(losses)]


def _mean(groups: Iterable[np.ndarray]) -> Any:
    return np.mean([group.mean(0) for group in groups], 0).tolist()


def loss_changes(rows: Rows) -> Rows:
    """One row a length, attention and fraction: mean change of the loss, in nats, and interval."""
    exact, cases = by_case(rows)
    table = []
    for (length, name, fraction), found in sorted(cases.items()):
        changes = [_changes(row, exact) for row in found]
        table.append(
            {
                "length": length,
                "name": name,
                "fraction": fraction,
                "spent": float(np.mean([row["spent"] for row in found])),
                "change": _mean(changes),
                "interval": bootstrap(changes),
                "by_seed": {
                    row["seed"]: float(x.mean()) for row, x in zip(found, changes, strict=True)
                },
                "tokens": int(sum(change.size for change in changes) * length),
                "spent_by_layer": np.mean([row["spent_by_layer"] for row in found], 0).tolist(),
            }
        )
    return table


def changes_by_place(rows: Rows) -> Rows:
    """One row a length, attention and fraction: changes at `PLACES`, and [2, places] of intervals.

    Only of files that tell places apart.
    """
    exact, cases = by_case(rows)
    table = []
    for (length, name, fraction), found in sorted(cases.items()):
        if all(row.get("losses_by_place") for row in found):
            changes = [_changes_by_place(row, exact) for row in found]
            described = {"length": length, "name": name, "fraction": fraction}
            described |= {"tile": int(*found[0]["losses_by_place"])}
            described |= {"changes": _mean(changes), "intervals": bootstrap(changes)}
            table.append(described)
    return table


def shares(rows: Rows) -> Rows:
    """What our change is of that of block top-k and of MRA, one row a length and fraction.

    Under "all" for all positions and under "last", where places were told apart, for the last of
    each one's tiles: the share, our change less the share aimed at of the other's, its interval by
    seeds and texts that both were measured on, and whether that share is kept.
    """
    exact, cases = by_case(rows)
    table = []
    for (length, name, fraction), found in sorted(cases.items()):
        ours = {row["seed"]: row for row in cases.get((length, "jax_aat", fraction), ())}
        pairs = [(ours[row["seed"]], row) for row in found if row["seed"] in ours]
        if name not in ("block top-k", "MRA") or not pairs:
            continue
        both = [[_changes(row, exact) for row in pair] for pair in pairs]
        described = {"length": length, "name": name, "fraction": fraction, "all": _share(both)}
        if all(row.get("losses_by_place") for pair in pairs for row in pair):
            both = [[_changes_by_place(row, exact)[:, -1] for row in pair] for pair in pairs]
            described["last"] = _share(both)
        table.append(described)
    return table


def _share(pairs: list[list[np.ndarray]]) -> dict[str, Any]:
    """Of our changes and the other's, [texts] of every seed."""
    common = [[x[: min(map(len, pair))] for x in pair] for pair in pairs]
    mean, other = (_mean(pair[i] for pair in common) for i in range(2))
    excess = [a - _AIM * b for a, b in common]
    low, high = bootstrap(excess)
    return {
        # Of a change that is no loss there is no share.
        "share": mean / other if other > 0 else None,
        "excess": _mean(excess),
        "interval": [low, high],
        "kept": "yes" if high <= 0 else "no" if low > 0 else "not told",
    }
