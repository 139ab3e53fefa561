r"""Shows how much device memory is kept after thousands of calls of mixed shapes.

    python benchmarks/memory_growth.py                       # a few minutes on a processor
    python benchmarks/memory_growth.py --threads 1 --calls 500 --shapes 20

For each number of threads, in a process of its own: random calls, forward and backward, exact and
adaptive, of random shapes and dtypes; then every shape twice, a loop that should find its memory in
the pools; then `jax_aat.trim_memory`. The bound is 1.5 times the peak in use. A table and a JSON
file are written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from surroundings import surroundings
from tabulate import tabulate
from tqdm import tqdm

import jax_aat

FOLDER = Path(__file__).parent
BOUND = 1.5
ADAPTATIONS = {
    "exact": None,
    "budget": jax_aat.Adaptation(budget=0.25),
    "threshold": jax_aat.Adaptation(threshold=0.01, query_tile=64),
}


@dataclass(frozen=True)
class Case:
    """A call: query [batch, length, heads, head_dim], key and value with kv_heads."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    adaptation: str
    backward: bool


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=5000, help="random calls of each run")
    parser.add_argument("--shapes", type=int, default=32, help="calls that are drawn from")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 40, 64, 100])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    return parser.parse_args()


def draw_case(generator: np.random.Generator, lengths: list[int], batches: list[int]) -> Case:
    """Draws a case."""
    kv_heads = int(generator.choice([1, 2]))
    return Case(
        batch=int(generator.choice(batches)),
        length=int(generator.choice(lengths)),
        heads=kv_heads * int(generator.choice([1, 2])),
        kv_heads=kv_heads,
        head_dim=int(generator.choice([16, 32, 64])),
        dtype=str(generator.choice(["float32", "bfloat16"])),
        adaptation=str(generator.choice(list(ADAPTATIONS))),
        backward=bool(generator.integers(2)),
    )


def make_call(case: Case) -> Callable[[], Any]:
    """Returns the call: it waits for its result."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    operands = [
        jax.random.normal(key, (case.batch, case.length, count, case.head_dim), case.dtype)
        for key, count in zip(keys, heads, strict=True)
    ]

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax_aat.tiled_attention(
            query,
            key,
            value,
            is_causal=True,
            adaptation=ADAPTATIONS[case.adaptation],
            implementation="vulkan",
        )

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(forward(*operands).astype(jnp.float32) ** 2)

    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if case.backward else forward)
    return lambda: jax.block_until_ready(function(*operands))


def run(threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Makes the calls in this process, which made none before; returns the row."""
    # What XLA makes of the rest of a call is not the point, and takes it minutes.
    jax.config.update("jax_disable_most_optimizations", True)
    generator = np.random.default_rng(args.seed)
    cases = [draw_case(generator, args.lengths, args.batches) for _ in range(args.shapes)]
    calls = [make_call(case) for case in cases]
    order = generator.integers(args.shapes, size=args.calls)

    def step(index: int) -> float:
        calls[index]()
        total = jax_aat.memory_stats().total
        return total.reserved_bytes / total.peak_in_use_bytes

    began = time.monotonic()
    asked_for = []
    ratios = []
    with ThreadPoolExecutor(threads) as pool:
        bar = tqdm(pool.map(step, order), f"{threads} threads", args.calls, mininterval=2)
        for ratio in bar:
            ratios.append(ratio)
            asked_for.append(jax_aat.memory_stats().total.total_allocations)
    seconds = time.monotonic() - began
    random = jax_aat.memory_stats()
    for call in calls:
        call()
    before = jax_aat.memory_stats().total.total_allocations
    for call in itertools.chain(calls, calls):
        call()
    loop = jax_aat.memory_stats().total
    returned = jax_aat.trim_memory()
    return {
        "threads": threads,
        "calls": args.calls,
        "seconds": seconds,
        "peak_in_use_bytes": random.total.peak_in_use_bytes,
        "peak_reserved_bytes": random.total.peak_reserved_bytes,
        "reserved_bytes": random.total.reserved_bytes,
        "in_use_bytes": random.total.in_use_bytes,
        "ratio": random.total.reserved_bytes / random.total.peak_in_use_bytes,
        "calls_above_bound": sum(ratio > BOUND for ratio in ratios),
        "last_call_above_bound": max((i for i, r in enumerate(ratios) if r > BOUND), default=None),
        "fragmentation": random.total.fragmentation,
        "chunks": random.total.allocations,
        "chunks_asked_for": asked_for[-1],
        "chunks_asked_for_in_second_half": asked_for[-1] - asked_for[args.calls // 2 - 1],
        "chunks_asked_for_by_loop": loop.total_allocations - before,
        "returned_by_trim_bytes": returned,
        "idle_before_trim_bytes": loop.reserved_bytes,
        "reserved_after_trim_bytes": jax_aat.memory_stats().total.reserved_bytes,
        "statistics": str(random),
        "cases": [asdict(case) for case in cases],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Draws the rows, in markdown."""
    headers = ["threads", "calls", "peak in use MiB", "reserved at end MiB", "ratio"]
    headers += ["calls after which the ratio was above 1.5 (last)", "chunks", "asked for"]
    headers += ["in the second half", "by the loop", "trimmed MiB", "left after it"]
    lines = []
    for row in rows:
        above = f"{row['calls_above_bound']} ({row['last_call_above_bound']})"
        line = [row["threads"], row["calls"]]
        line += [f"{row[name] / 2**20:.3f}" for name in ("peak_in_use_bytes", "reserved_bytes")]
        line += [f"{row['ratio']:.3f}", above, row["chunks"], row["chunks_asked_for"]]
        line += [row["chunks_asked_for_in_second_half"], row["chunks_asked_for_by_loop"]]
        line += [f"{row['returned_by_trim_bytes'] / 2**20:.3f}", row["reserved_after_trim_bytes"]]
        lines.append(line)
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Runs every number of threads; returns 1 if more was kept than the bound or the idle."""
    args = parse_arguments()
    facts, rows = surroundings(), []
    for threads in args.threads:
        # Peaks are those since a process began.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(run, threads, args).result())
    text = "\n".join(f"{name}: {value}  " for name, value in facts.items())
    text += "\n\n" + table(rows) + "\n"
    for row in rows:
        text += f"\nAfter the random calls of {row['threads']} threads:\n\n```\n"
        text += row["statistics"] + "\n```\n"
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"memory-growth-{facts['date'].replace(':', '')[:15]}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(f"{text}\nwritten: {stem}.md, {stem}.json")
    return any(row["ratio"] > BOUND or row["reserved_after_trim_bytes"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
