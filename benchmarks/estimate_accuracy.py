"""How far `jax_aat.estimate` is off: predicted and measured time of calls on this device.

    python benchmarks/estimate_accuracy.py --lengths 2048 4096 --heads 4 --dtype float32

Each call is estimated first and then run: the measured time is that of all its kernels in the
median of several profiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
from surroundings import surroundings
from tabulate import tabulate
from tqdm import tqdm

import jax_aat
from jax_aat import Adaptation, tiled_attention

FOLDER = Path(__file__).parent
COLUMNS = ("pass", "causal", "budget", "queries", "estimated ms", "measured ms", "off by")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.125])
    parser.add_argument("--no-gradients", action="store_true", help="forward passes only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "estimate-accuracy")
    return parser.parse_args()


def measured_seconds(call: Any, operands: list[jax.Array], repeats: int) -> float:
    """Kernel time, median of some runs after one that compiles."""
    jax.block_until_ready(call(*operands))
    seconds = []
    for _ in range(repeats):
        with jax_aat.profile() as prof:
            jax.block_until_ready(call(*operands))
        kernels = [kernel for each in prof.calls for kernel in each.kernels]
        seconds.append(sum(k.seconds for k in kernels if k.name != "count_work.f32"))
    return statistics.median(seconds)


def run_row(
    arguments: argparse.Namespace,
    queries: int,
    budget: float | None,
    gradients: bool,
    causal: bool,
) -> dict[str, Any]:
    """Estimates and measures one kind of call."""
    query = (1, queries, arguments.heads, arguments.head_dim)
    key = (1, queries, arguments.kv_heads, arguments.head_dim)
    options = {
        "is_causal": causal,
        "adaptation": None if budget is None else Adaptation(budget=budget),
    }
    estimated = jax_aat.estimate(query, key, arguments.dtype, gradients=gradients, **options)
    operands = [
        jax.random.normal(seed, shape, arguments.dtype)
        for seed, shape in zip(
            jax.random.split(jax.random.key(7), 3), (query, key, key), strict=True
        )
    ]

    def attend(*operands: jax.Array) -> jax.Array:
        return tiled_attention(*operands, implementation="vulkan", **options)

    def both(*operands: jax.Array) -> Any:
        out, pull = jax.vjp(attend, *operands)
        return pull(out)

    call = jax.jit(both if gradients else attend)
    seconds = measured_seconds(call, operands, arguments.repeats)
    return {
        "pass": "forward and backward" if gradients else "forward",
        "causal": causal,
        "budget": budget,
        "queries": queries,
        "estimated ms": 1e3 * estimated.seconds,
        "measured ms": 1e3 * seconds,
        "off by": estimated.seconds / seconds - 1,
        "from": estimated.measured_lengths,
    }


def main() -> None:
    """Runs all rows and writes a table and JSON."""
    arguments = parse_arguments()
    kinds = [
        (queries, budget, gradients, causal)
        for gradients in ((False,) if arguments.no_gradients else (False, True))
        for budget in (None, *arguments.budgets)
        for causal in ((False, True) if budget is None else (True,))
        for queries in arguments.lengths
    ]
    rows = [run_row(arguments, *kind) for kind in tqdm(kinds)]
    facts = {**surroundings(), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    arguments.output.with_suffix(".json").write_text(
        json.dumps({**facts, "rows": rows}, indent=1) + "\n"
    )
    table = tabulate(
        [
            [
                *(row[column] for column in COLUMNS[:4]),
                f"{row['estimated ms']:.2f}",
                f"{row['measured ms']:.2f}",
                f"{row['off by']:+.0%}",
            ]
            for row in rows
        ],
        COLUMNS,
        tablefmt="github",
    )
    worst = max(abs(row["off by"]) for row in rows)
    text = (
        f"# Accuracy of estimates\n\n{facts['vulkan_device']}, commit {facts['commit']}.\n\n"
        f"`{facts['command']}`\n\n{table}\n\nOff by {worst:.0%} at most.\n"
    )
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
