"""Time of adaptive attention without a GPU, on a trained model's operands.

    python benchmarks/quality/capture.py --weights build/quality
    python benchmarks/quality/processor_speed.py build/quality/qkv-0-layer*.npz

Causal float32 attention by `implementation='xla'` at some budgets, and exactly, beside
`jax.nn.dot_product_attention` in the same run, in turn; medians. IFQ is against the latter.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from jax_aat import Adaptation, tiled_attention

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
DENSE = "jax.nn.dot_product_attention"


def contenders(budgets: Sequence[float]) -> dict[str, Attend]:
    """The dense peer and ours, compiled when called first."""
    ours = partial(tiled_attention, is_causal=True, implementation="xla")
    found: dict[str, Attend] = {DENSE: partial(jax.nn.dot_product_attention, is_causal=True)}
    found["jax_aat, exact"] = ours
    for budget in budgets:
        found[f"jax_aat, budget {budget:g}"] = partial(ours, adaptation=Adaptation(budget=budget))
    return {name: jax.jit(attend) for name, attend in found.items()}


def measure(path: Path, found: dict[str, Attend], repeats: int) -> list[list[str]]:
    """Rows of the table for one layer."""
    with np.load(path) as arrays:
        q, k, v = (jnp.asarray(arrays[name], jnp.float32) for name in "qkv")
    outs = {name: np.asarray(attend(q, k, v), np.float64) for name, attend in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, attend in found.items():
            began = time.perf_counter()
            attend(q, k, v).block_until_ready()
            times[name].append(time.perf_counter() - began)
    dense, exact = statistics.median(times[DENSE]), outs[DENSE]
    rows = []
    for name in found:
        seconds = statistics.median(times[name])
        quality = 1 - ((outs[name] - exact) ** 2).sum() / (exact**2).sum()
        speed = [f"{seconds:.3f}", f"{dense / seconds:.2f}"]
        rows.append([path.stem, str(len(q)), name, *speed, f"{quality:.4f}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("qkv", type=Path, nargs="+", help="files that capture.py has written")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.125, 0.0625])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    found = contenders(args.budgets)
    rows = [row for path in tqdm(args.qkv) for row in measure(path, found, args.repeats)]
    print(f"{platform.processor() or platform.machine()}, JAX {jax.__version__}, CPU platform")
    headers = ["operands", "S", "attention", "seconds", "times as fast", "IFQ"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
