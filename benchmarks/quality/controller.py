r"""What the controller of a tolerance makes of inputs whose answer is known.

    python benchmarks/quality/controller.py --length 4096 --tolerance 0.1

The same synthetic operands are given call after call. Where something can be saved, the error
settles at the tolerance and the operations below those of exact attention; in noise nothing can be
saved, so the attention becomes exact and the report says that it spends at least what exact
attention does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Sizes
from facts import surroundings
from model import default_dtype
from synthetic import CASES
from tqdm import tqdm

import jax_aat


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--implementation", choices=["xla", "vulkan"], help="default: by itself")
    parser.add_argument("--output", type=Path, default=Path("build/quality/controller.json"))
    return parser.parse_args(arguments)


def follow(
    args: argparse.Namespace, operands: tuple[jax.Array, ...], case: str
) -> list[dict[str, float]]:
    """Calls again and again; returns of every call what it spent, audited and truly erred."""
    adaptation = jax_aat.Adaptation(tolerance=args.tolerance)
    attention = partial(jax_aat.tiled_attention, is_causal=True, implementation=args.implementation)
    exact = jax.jit(attention)(*operands).astype(jnp.float32)

    @jax.jit
    def call(state: Any) -> tuple[Any, dict[str, jax.Array]]:
        out, state, report = attention(
            *operands, adaptation=adaptation, state=state, return_report=True
        )
        difference = out.astype(jnp.float32) - exact
        return state, {
            "error": jnp.linalg.norm(difference) / jnp.linalg.norm(exact),
            "audited": report.relative_error.mean(),
            "operations": report.relative_flops.mean(),
            "spent": report.spent.mean(),
        }

    state = jax_aat.ResolutionState.init(*operands[:2], adaptation, is_causal=True)
    history = []
    for _ in tqdm(range(args.calls), desc=case):
        state, figures = call(state)
        history.append({name: float(x) for name, x in figures.items()})
    return history


def main(arguments: Sequence[str] | None = None) -> None:
    """Follows the controller in every case and prints where it ends."""
    args = parse_arguments(arguments)
    sizes = Sizes(args.length, args.heads, args.kv_heads, args.head_dim)
    histories = {}
    for case in args.cases:
        made = CASES[case](sizes, np.random.default_rng(0))
        operands = tuple(jnp.asarray(x, default_dtype())[None] for x in made)
        histories[case] = follow(args, operands, case)
        late = histories[case][len(histories[case]) // 2 :]
        figures = {name: float(np.mean([row[name] for row in late])) for name in late[0]}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"{case:9s} tolerance {args.tolerance}, second half of the calls: {shown}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {**surroundings(), "tolerance": args.tolerance, **vars(sizes)}
    args.output.write_text(json.dumps({**facts, "histories": histories}, indent=1) + "\n")


if __name__ == "__main__":
    main()
