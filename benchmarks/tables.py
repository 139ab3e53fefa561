"""Tables of what `attention.py` measured, and the files that it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pictures import draw
from tabulate import tabulate

Row = dict[str, Any]

GROUP = ("inputs", "batch", "heads", "kv_heads", "head_dim", "causal", "dtype", "pass")
"""What rows that differ in length and contender only have in common."""
_HEADERS = (
    *("S", "contender", "latency ms", "pipelined ms", "kernel ms", "hand-over ms", "TFLOP/s"),
    *("error", "IFQ", "FLOPs", "memory MiB", "path"),
)


def groups_of(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by what they have in common, in the order in which they came."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    return groups


def title(row: Row) -> str:
    """What a group of rows is about, in words."""
    return (
        f"{row['pass']}, {'causal' if row['causal'] else 'not causal'}, batch {row['batch']}, "
        f"{row['heads']} heads over {row['kv_heads']} of {row['head_dim']}, {row['dtype']}, "
        f"{row['inputs']}"
    )


def is_adaptive(row: Row) -> bool:
    """Whether this package made it and left something out."""
    return bool(row["contender"].startswith("jax_aat adaptive"))


def is_dense(row: Row) -> bool:
    """Whether it computed everything."""
    return not is_adaptive(row) and not row["contender"].startswith("torch flex")


def figure(value: float | None, form: str) -> str:
    """A number, or nothing where it is not known."""
    return "" if value is None else format(value, form)


def cells(row: Row) -> list[str]:
    """A row of the table."""
    start = [str(row["keys"]), row["contender"]]
    if "failed" in row:
        path = row["failed"] if row["failed"].startswith("skipped") else f"failed: {row['failed']}"
        return [*start, *[""] * (len(_HEADERS) - 3), path]

    path = row["path"]
    kernels = path.partition(": ")[2].split()
    if path.startswith("Vulkan"):  # every kernel by name is in the JSON
        path = f"{path.partition(':')[0]}: {len(kernels)} kernels, {kernels[-1]} last"
    if "planning" in row:
        share = row["planning"] / sum(row["kernel_milliseconds"].values())
        path += f"; {row['planning']:.3g} ms, {share:.0%}, of them plan"
    if row.get("budget_spent", 0) > 1.001:
        path += f"; budget overspent {row['budget_spent']:.3g} times"
    if "facts_failed" in row:
        path += f"; FLOPs not known: {row['facts_failed']}"
    if "not_checked" in row:
        path += f"; not checked: {row['not_checked']}"
    memory = row.get("memory")
    return [
        *start,
        *(figure(row[name], ".3f") for name in ("latency", "pipelined", "kernel", "hand_over")),
        figure(row["tflops"], ".4g"),
        figure(max(row["errors"].values()), ".2e"),
        figure(row["ifq"], ".6f"),
        figure(row["relative_flops"], ".4f"),
        figure(memory and memory / 2**20, ".1f"),
        path,
    ]


def line_of(row: Row) -> str:
    """A row as a line to be read while others are measured."""
    return f"{title(row)} | " + " | ".join(x for x in cells(row) if x)


def speedups(rows: Iterable[Row]) -> list[Row]:
    """How many times as fast as the fastest dense contender adaptive ones are, by length.

    Each with the time and name of that contender; by calls in a row and by single calls.
    """
    found = []
    for group in groups_of(row for row in rows if "failed" not in row).values():
        for row in filter(is_adaptive, group):
            peers = [x for x in group if x["keys"] == row["keys"] and is_dense(x)]
            if not peers:
                continue
            entry = {name: row[name] for name in (*GROUP, "keys", "contender")}
            for time in ("pipelined", "latency"):
                best = min(peers, key=lambda x: x[time])
                entry[time] = {
                    "adaptive": row[time],
                    "dense": best[time],
                    "fastest": best["contender"],
                    "times_as_fast": best[time] / row[time],
                }
            found.append(entry | {"ifq": row["ifq"], "relative_flops": row["relative_flops"]})
    return found


def exponents(rows: Iterable[Row]) -> list[Row]:
    """The exponent of time over length: least squares of logarithms, of calls in a row."""
    found = []
    for group in groups_of(row for row in rows if "failed" not in row).values():
        for contender in dict.fromkeys(row["contender"] for row in group):
            lines = [x for x in group if x["contender"] == contender]
            if len({row["keys"] for row in lines}) < 2:
                continue
            x, y = (np.log([row[name] for row in lines]) for name in ("keys", "pipelined"))
            entry = {name: lines[0][name] for name in GROUP}
            lengths = sorted(row["keys"] for row in lines)
            entry |= {"contender": contender, "from": lengths[0], "to": lengths[-1]}
            found.append(entry | {"exponent": float(np.polyfit(x, y, 1)[0])})
    return found


def crossover(lines: Sequence[Row]) -> str:
    """From which measured length on adaptive attention is the faster one, by calls in a row."""
    for index, line in enumerate(lines):
        if all(x["pipelined"]["times_as_fast"] > 1 for x in lines[index:]):
            return f"faster from {line['keys']} keys on"
    return "not faster at the longest length"


def render(facts: Row, rows: Sequence[Row]) -> str:
    """Everything that was measured, in markdown."""
    parts = ["\n".join(f"{name}: {value}  " for name, value in facts.items())]
    for group in groups_of(rows).values():
        parts.append(f"### {title(group[0])}")
        parts.append(_table([cells(row) for row in group], _HEADERS))
    lines = []
    fast = speedups(rows)
    for group in groups_of(fast).values():
        for contender in dict.fromkeys(row["contender"] for row in group):
            mine = sorted(
                (x for x in group if x["contender"] == contender), key=lambda row: row["keys"]
            )
            for row in mine:
                calls, single = row["pipelined"], row["latency"]
                line = [title(row), contender, str(row["keys"]), calls["fastest"]]
                line += [f"{calls['times_as_fast']:.2f}", f"{single['times_as_fast']:.2f}"]
                line += [f"{row['ifq']:.5f}", figure(row["relative_flops"], ".4f")]
                lines.append([*line, crossover(mine) if row is mine[-1] else ""])
    if lines:
        parts.append("### Times as fast as the fastest dense contender")
        headers = ["case", "contender", "S", "the fastest dense one", "calls in a row"]
        headers += ["single calls", "IFQ", "FLOPs", "crossover"]
        parts.append(_table(lines, headers))
    lines = [
        [title(row), row["contender"], f"{row['from']} to {row['to']}", f"{row['exponent']:.2f}"]
        for row in exponents(rows)
    ]
    if lines:
        parts.append("### Exponent of time over S")
        parts.append(_table(lines, ["case", "contender", "S", "exponent"]))
    return "\n\n".join(parts)


def write(stem: Path, facts: Row, rows: Sequence[Row]) -> str:
    """Writes the rows so far as a table, as JSON and as a picture; returns the table."""
    text = render(facts, rows)
    found = {"rows": rows, "speedups": speedups(rows), "exponents": exponents(rows)}
    _sibling(stem, ".md").write_text(text + "\n")
    _sibling(stem, ".json").write_text(json.dumps({**facts, **_plain(found)}, indent=1) + "\n")
    groups = groups_of(row for row in rows if "failed" not in row)
    draw(_sibling(stem, ".png"), {title(group[0]): group for group in groups.values()})
    return text


def _sibling(stem: Path, suffix: str) -> Path:
    """A file beside others of the same name, which may have a point in it."""
    return stem.parent / (stem.name + suffix)


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
