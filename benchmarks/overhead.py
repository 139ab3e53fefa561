"""What something that users may leave on costs: calls with and without it, in turns, in one run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from surroundings import surroundings
from tabulate import tabulate
from tqdm import tqdm

CONFIDENCE = 0.95
_WARM_UP = 3


def seconds_of(call: Callable[[], Any]) -> float:
    """From the start of a call to its results."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def compare(
    names: dict[str, str], plain: Callable[[], float], changed: Callable[[], float], pairs: int
) -> dict[str, Any]:
    """Times pairs of two calls that follow each other, so that drift hits both alike.

    Args:
      names: What tells the row from others, by column.
      plain: Runs a call and returns its seconds.
      changed: The same of the call with what is to be judged.
      pairs: How many; which of the two is first alternates.

    Returns:
      The row: medians of both in milliseconds, and the median over pairs of their ratio less 1 with
      its interval from a bootstrap over the pairs.
    """
    for _ in range(_WARM_UP):
        plain()
        changed()
    seconds = np.zeros((pairs, 2))
    for i in tqdm(range(pairs), desc=", ".join(names.values())):
        for which in (i % 2, 1 - i % 2):
            seconds[i, which] = (plain, changed)[which]()
    ratios = seconds[:, 1] / seconds[:, 0]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, pairs)), axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    without, with_it = (1e3 * np.median(seconds, axis=0)).tolist()
    return {
        **names,
        "without ms": without,
        "with ms": with_it,
        "overhead": float(np.median(ratios)) - 1,
        "interval": [float(low) - 1, float(high) - 1],
    }


def write(output: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows as a table and as JSON, beside each other."""
    facts = surroundings()
    output.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    shown = [
        row
        | {
            "without ms": f"{row['without ms']:.3f}",
            "with ms": f"{row['with ms']:.3f}",
            "overhead": f"{row['overhead']:+.2%}",
            "interval": "{:+.2%} to {:+.2%}".format(*row["interval"]),
        }
        for row in rows
    ]
    table = tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)
    text = "\n".join(f"{name}: {value}  " for name, value in facts.items())
    text = f"# {title}\n\n{text}\n\n{table}\n\nIntervals are of {CONFIDENCE:.0%}.\n"
    output.with_suffix(".md").write_text(text)
    print(text)
