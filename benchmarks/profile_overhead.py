"""What `jax_aat.profile` costs: calls within a profile and outside (`overhead.py`).

    python benchmarks/profile_overhead.py --queries 16384 --heads 16 --head-dim 64

Attention is causal, of normal inputs, exact and adaptive.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
from overhead import compare, seconds_of, write

import jax_aat
from jax_aat import Adaptation, tiled_attention

FOLDER = Path(__file__).parent


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
    attention = partial(
        tiled_attention, is_causal=True, adaptation=adaptation, implementation="vulkan"
    )
    call = partial(jax.jit(attention), *operands)

    def profiled() -> float:
        with jax_aat.profile(by_kernel=by_kernel):
            return seconds_of(call)

    names = {"call": name, "profile": "by kernel" if by_kernel else "by call"}
    return compare(names, partial(seconds_of, call), profiled, arguments.pairs)


def main() -> None:
    """Runs all rows and writes a table and JSON."""
    arguments = parse_arguments()
    adaptive = Adaptation(budget=arguments.budget)
    rows = [
        run_row(arguments, name, by_kernel, adaptation)
        for name, adaptation in (("exact", None), (f"budget {arguments.budget}", adaptive))
        for by_kernel in (True, False)
    ]
    write(arguments.output, "Overhead of a profile", rows)


if __name__ == "__main__":
    main()
