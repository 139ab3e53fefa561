"""What a report costs: calls with `return_report=True` and without (`overhead.py`).

    python benchmarks/report_overhead.py --lengths 32768 131072 --budgets 0.0625 0.03   # on a GPU
    python benchmarks/report_overhead.py --lengths 512 --heads 2 --kv-heads 1 --budgets 0.5 \
        --implementation xla --pairs 3                                            # on a processor

Each length with its budget, causal, of clustered inputs (`inputs.py`); the report as it is by
default, audit included, and without the audit.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import inputs
import jax
import jax.numpy as jnp
from overhead import compare, seconds_of, write

from jax_aat import Adaptation, tiled_attention
from jax_aat.commands.contenders import Case

FOLDER = Path(__file__).parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.125, 0.0625])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", choices=["vulkan", "xla"], default="vulkan")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "report-overhead")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs all rows and writes a table and JSON."""
    args = parse_arguments(arguments)
    rows = []
    for length, budget in zip(args.lengths, args.budgets, strict=True):
        sizes = (args.batch, args.heads, args.kv_heads, length, length, args.head_dim)
        case = Case(*sizes, causal=True, dtype=args.dtype)
        operands = [jnp.asarray(x, args.dtype) for x in inputs.make("clustered", case)[:3]]
        adaptation = Adaptation(budget=budget)
        unaudited = dataclasses.replace(adaptation, audit_rate=0.0)
        attention = partial(tiled_attention, is_causal=True, implementation=args.implementation)
        plain = partial(jax.jit(partial(attention, adaptation=adaptation)), *operands)
        for name, reporting in (("with audit", adaptation), ("no audit", unaudited)):
            reported = jax.jit(partial(attention, adaptation=reporting, return_report=True))
            names = {"S": str(length), "budget": f"{budget:g}", "report": name}
            calls = (partial(seconds_of, call) for call in (plain, partial(reported, *operands)))
            rows.append(compare(names, *calls, args.pairs))
    write(args.output, "Overhead of a report", rows)


if __name__ == "__main__":
    main()
