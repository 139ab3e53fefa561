r"""Times tiled attention beside JAX's and PyTorch's, and states each one's error.

    python benchmarks/attention.py                                     # on a GPU
    python benchmarks/attention.py --lengths 256 --batch 1 --heads 4 --dtype float32 \
        --repeats 5 --contenders "jax_aat" "jax.nn xla"                # on a processor

Three times a row, in milliseconds: ``latency``, the median of single calls, each waited for;
``pipelined``, the mean over calls that are started one after another and waited for together;
``kernel``, the median of the device's own time stamps, where the contender has them. Rates are
taken from ``kernel``, else from ``pipelined``; forward and backward count as 3.5 forward passes.
The error is that of the first head against float32, the largest of out, dq, dk, dv, each as
||x - reference|| / ||reference||. A table and a JSON file are written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS
from surroundings import surroundings
from tabulate import tabulate

from jax_aat.commands.contenders import Case, Pass, errors, reference

FOLDER = Path(__file__).parent


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    return parser.parse_args()


def measure(made: Pass, repeats: int) -> dict[str, float | None]:
    """Times a pass that has been warmed up; milliseconds."""
    kernels = [made.device_milliseconds() for _ in range(repeats)]
    latencies = []
    for _ in range(repeats):
        began = time.perf_counter()
        made.wait(made.start())
        latencies.append((time.perf_counter() - began) * 1e3)
    began = time.perf_counter()
    for _ in range(repeats):
        last = made.start()
    made.wait(last)
    pipelined = (time.perf_counter() - began) * 1e3 / repeats
    return {
        "latency": statistics.median(latencies),
        "latency_p90": float(np.percentile(latencies, 90)),
        "pipelined": pipelined,
        "kernel": None if None in kernels else statistics.median(kernels),
    }


def run_row(
    case: Case,
    contender: str,
    backward: bool,
    repeats: int,
    arrays: list[np.ndarray],
    expected: list[np.ndarray],
) -> dict[str, Any]:
    """Measures one contender on one case: the fields of a row, ``failed`` among them if it did."""
    row = {**asdict(case), "pass": "forward+backward" if backward else "forward"}
    row["contender"] = contender
    try:
        made = CONTENDERS[contender](case, arrays, backward)
        for _ in range(3):
            results = made.wait(made.start())
        row["path"] = made.path()
        row["errors"] = errors(case, made, results, expected)
        del results
        row |= measure(made, repeats)
    except Exception as error:  # one contender that fails must not hide the others
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return row
    operations = case.floating_point_operations() * (3.5 if backward else 1.0)
    row["tflops"] = operations / (row["kernel"] or row["pipelined"]) * 1e-9
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Draws the rows, in markdown."""

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    headers = ["S", "D", "causal", "pass", "contender", "latency ms", "pipelined ms", "kernel ms"]
    headers += ["TFLOP/s", "error", "path"]
    lines = []
    for row in rows:
        line = [row["keys"], row["head_dim"], "yes" if row["causal"] else "no", row["pass"]]
        line.append(row["contender"])
        if "failed" in row:
            line += [""] * 5 + [f"failed: `{row['failed']}`"]
        else:
            line += [figure(row[name], ".3f") for name in ("latency", "pipelined", "kernel")]
            line += [figure(row["tflops"], ".4g"), figure(max(row["errors"].values()), ".2e")]
            line.append(row["path"])
        lines.append(line)
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def write(stem: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Writes the rows so far as a table and as JSON; returns the table."""
    text = "\n".join(f"{name}: {value}  " for name, value in facts.items()) + "\n\n" + table(rows)
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return text


def main() -> int:
    """Runs every case and returns 1 if jax_aat failed in any."""
    args = parse_arguments()
    facts, rows = surroundings(), []
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"attention-{facts['date'].replace(':', '')[:15]}"
    cases = itertools.product(args.lengths, args.head_dims, [False, True])
    for length, head_dim, causal in cases:
        case = Case(
            args.batch,
            args.heads,
            args.kv_heads or args.heads,
            length,
            length,
            head_dim,
            causal,
            args.dtype,
        )
        arrays = case.arrays(seed=0)
        expected = reference(case, arrays)
        for backward, contender in itertools.product([False, True], args.contenders):
            rows.append(run_row(case, contender, backward, args.repeats, arrays, expected))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            text = write(stem, facts, rows)
    print(f"\n{text}\n\nwritten: {stem}.md, {stem}.json")
    return any("failed" in row for row in rows if row["contender"] == "jax_aat")


if __name__ == "__main__":
    sys.exit(main())
