"""What `jax_aat.profile` costs: calls with and without it, in turns, in one run.

    python benchmarks/profile_overhead.py --queries 16384 --heads 16 --head-dim 64

A time is that of one call from its start to its result; pairs of a call within a profile and one
outside follow each other, so that drift hits both alike. The overhead is the median over pairs of
their ratio less 1, with its interval from a bootstrap over the pairs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from surroundings import surroundings
from tabulate import tabulate
from tqdm import tqdm

import jax_aat
from jax_aat import Adaptation, tiled_attention

FOLDER = Path(__file__).parent
CONFIDENCE = 0.95


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=float, default=0.125, help="of the adaptive call")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "profile-overhead")
    return parser.parse_args()


def seconds_of(call: Any, operands: list[jax.Array]) -> float:
    """From the start of a call to its result."""
    start = time.perf_counter()
    call(*operands).block_until_ready()
    return time.perf_counter() - start


def run_row(
    arguments: argparse.Namespace, name: str, by_kernel: bool, adaptation: Adaptation | None
) -> dict[str, Any]:
    """Times pairs of one kind of call."""
    rows = {"q": arguments.heads, "k": arguments.kv_heads, "v": arguments.kv_heads}
    operands = [
        jax.random.normal(
            jax.random.key(i), (1, arguments.queries, heads, arguments.head_dim), arguments.dtype
        )
        for i, heads in enumerate(rows.values())
    ]
    call = jax.jit(
        lambda q, k, v: tiled_attention(
            q, k, v, is_causal=True, adaptation=adaptation, implementation="vulkan"
        )
    )
    for _ in range(3):
        seconds_of(call, operands)
    with_profile, without = [], []
    for i in tqdm(range(arguments.pairs), desc=name):
        for profiled in (True, False) if i % 2 else (False, True):
            if profiled:
                with jax_aat.profile(by_kernel=by_kernel):
                    with_profile.append(seconds_of(call, operands))
            else:
                without.append(seconds_of(call, operands))
    ratios = np.asarray(with_profile) / np.asarray(without)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        "call": name,
        "profile": "by kernel" if by_kernel else "by call",
        "without ms": 1e3 * float(np.median(without)),
        "with ms": 1e3 * float(np.median(with_profile)),
        "overhead": float(np.median(ratios)) - 1,
        "interval": [float(low) - 1, float(high) - 1],
    }


def main() -> None:
    """Runs all rows and writes a table and JSON."""
    arguments = parse_arguments()
    facts = surroundings()
    adaptive = Adaptation(budget=arguments.budget)
    rows = [
        run_row(arguments, name, by_kernel, adaptation)
        for name, adaptation in (("exact", None), (f"budget {arguments.budget}", adaptive))
        for by_kernel in (True, False)
    ]
    arguments.output.with_suffix(".json").write_text(
        json.dumps({**facts, "rows": rows}, indent=1) + "\n"
    )
    table = tabulate(
        [
            [
                row["call"],
                row["profile"],
                f"{row['without ms']:.3f}",
                f"{row['with ms']:.3f}",
                f"{row['overhead']:+.2%}",
                f"{row['interval'][0]:+.2%} to {row['interval'][1]:+.2%}",
            ]
            for row in rows
        ],
        ["call", "profile", "without ms", "with ms", "overhead", f"{CONFIDENCE:.0%} interval"],
        tablefmt="github",
    )
    text = "\n".join(f"{name}: {value}  " for name, value in facts.items())
    text = f"# Overhead of a profile\n\n{text}\n\n{table}\n"
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
