r"""What attentions do with inputs whose answer is known.

    python benchmarks/quality/synthetic.py                            # 32,768 positions, on a GPU
    python benchmarks/quality/synthetic.py --length 2048 --fractions 0.5 0.25     # on a processor

- needle of 1, of 8: noise, in which that many neighbouring queries, the last ones, look for as many
  neighbouring keys, each for its own; at every depth. It is found if no other value is nearer to
  the output. One query that differs from the rest of its tile is what a router sees worst.
- clusters: runs of keys around few centres, queries that look for one of them.
- smooth: sums of slow waves.
- noise: nothing stands out, so nothing can be saved: the error says what a budget costs then.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import BASELINES, EXACT, Contender, Sizes
from facts import surroundings
from library import LIBRARY
from model import default_dtype
from tabulate import tabulate
from tqdm import tqdm

CONTENDERS = {contender.name: contender for contender in [LIBRARY, *BASELINES]}
WIDTHS = (1, 8)
"""Keys of a needle."""

Operands = tuple[np.ndarray, np.ndarray, np.ndarray]


def noise(sizes: Sizes, generator: np.random.Generator) -> Operands:
    """Standard normal queries, keys and values."""
    shapes = [(sizes.length, n, sizes.head_dim) for n in (sizes.heads, *[sizes.kv_heads] * 2)]
    query, key, value = (generator.standard_normal(shape, np.float32) for shape in shapes)
    return query, key, value


def needle(
    sizes: Sizes, generator: np.random.Generator, depth: float, width: int
) -> tuple[Operands, int]:
    """Noise, in which the last queries of every head look for keys at a depth; and their place."""
    query, key, value = noise(sizes, generator)
    place = min(int(depth * sizes.length), sizes.length - 64)
    looked_for = np.repeat(key[place : place + width], sizes.heads // sizes.kv_heads, axis=1)
    # The logit exceeds the logarithm of the number of keys by 5: 99% of the mass.
    logit = np.log(sizes.length) + 5
    strength = logit * np.sqrt(sizes.head_dim) / (looked_for**2).sum(-1, keepdims=True)
    query[-width:] = looked_for * strength
    return (query, key, value), place


def clusters(sizes: Sizes, generator: np.random.Generator) -> Operands:
    """Runs of some 200 keys and values around 32 centres; a query looks for one centre."""
    query, key, value = noise(sizes, generator)
    runs = np.cumsum(generator.random(sizes.length) < 1 / 200)
    belongs = generator.integers(32, size=runs[-1] + 1)[runs]
    centres = generator.standard_normal((2, 32, sizes.kv_heads, sizes.head_dim), np.float32)
    key, value = 0.5 * key + centres[0][belongs], 0.5 * value + centres[1][belongs]
    wanted = np.repeat(centres[0], sizes.heads // sizes.kv_heads, axis=1)
    query = 0.5 * query + wanted[generator.integers(32, size=runs[-1] + 1)[runs]]
    return query, key, value


def smooth(sizes: Sizes, generator: np.random.Generator) -> Operands:
    """Sums of eight waves with periods from 256 positions to the whole length."""
    rates = 2 * np.pi / np.geomspace(256, sizes.length, 8)
    waves = np.cos(np.arange(sizes.length)[:, None] * rates + generator.random(8) * 2 * np.pi)
    amplitudes = noise(Sizes(8, sizes.heads, sizes.kv_heads, sizes.head_dim), generator)
    query, key, value = (np.tensordot(waves, x, 1).astype(np.float32) / 2 for x in amplitudes)
    return query, key, value


CASES: dict[str, Callable[[Sizes, np.random.Generator], Operands]] = {
    "clusters": clusters,
    "smooth": smooth,
    "noise": noise,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.25, 0.125, 0.1])
    parser.add_argument("--depths", type=int, default=17)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--output", type=Path, default=Path("build/quality/synthetic.json"))
    return parser.parse_args(arguments)


@cache
def compiled(contender: Contender) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The attention of a contender, as a function of query, key, value and parameters."""

    @partial(jax.jit, static_argnums=(3,) if contender.static else ())
    def attention(q: Any, k: Any, v: Any, parameters: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v = (x.astype(default_dtype()) for x in (q, k, v))
        out, spent = contender.attend(q, k, v, parameters)
        return out.astype(jnp.float32), spent

    return attention


def measure(
    sizes: Sizes, name: str, fraction: float, operands: Operands, exact: jax.Array
) -> dict[str, Any]:
    """Relative error and IFQ of a contender's output, over all queries."""
    contender = CONTENDERS[name]
    out, spent = compiled(contender)(*operands, contender.parameters(sizes, fraction))
    squared, norm = ((out - exact) ** 2).sum(-1), (exact**2).sum(-1)
    return {
        "contender": name,
        "fraction": fraction,
        "spent": float(spent),
        "error": float(jnp.sqrt(squared / norm).mean()),
        "ifq": float(1 - squared.sum() / norm.sum()),
    }


def found(
    sizes: Sizes, name: str, fraction: float, operands: Operands, place: int, width: int
) -> float:
    """Share of the asking queries whose output is nearer to their needle's value than to others."""
    contender = CONTENDERS[name]
    out, _ = compiled(contender)(*operands, contender.parameters(sizes, fraction))
    last = out[-width:].reshape(width, sizes.kv_heads, -1, sizes.head_dim)
    value = jnp.asarray(operands[2])
    product = jnp.einsum("skh,wkgh->swkg", value, last)
    distance = (value**2).sum(-1)[:, None, :, None] - 2 * product
    wanted = place + jnp.arange(width)[:, None, None]
    return float((distance.argmin(0) == wanted).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every case and prints the figures."""
    args = parse_arguments(arguments)
    sizes = Sizes(args.length, args.heads, args.kv_heads, args.head_dim)
    rows: list[dict[str, Any]] = []
    for case, make in CASES.items():
        operands = make(sizes, np.random.default_rng(0))
        exact, _ = compiled(EXACT)(*operands, ())
        for name in tqdm(args.contenders, desc=case):
            run = partial(measure, sizes, name, operands=operands, exact=exact)
            rows += [{"case": case, **run(fraction)} for fraction in args.fractions]
    depths = np.linspace(0, 1, args.depths)
    for width, depth in tqdm([(w, d) for w in WIDTHS for d in depths], desc="needle"):
        generator = np.random.default_rng(int(1000 * depth))
        operands, place = needle(sizes, generator, float(depth), width)
        for name in args.contenders:
            for fraction in args.fractions:
                share = found(sizes, name, fraction, operands, place, width)
                case = {"case": f"needle of {width}", "contender": name, "fraction": fraction}
                rows.append({**case, "depth": float(depth), "found": share})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {**surroundings(), **vars(sizes)}
    args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    table = report(rows, args.fractions)
    args.output.with_suffix(".md").write_text(table + "\n")
    print(table)


def report(rows: list[dict[str, Any]], fractions: list[float]) -> str:
    """The error of every case, and the share of needles found over all depths, by fraction."""
    cells: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        key = (row["case"], row["contender"], row["fraction"])
        cells.setdefault(key, []).append(row.get("found", row.get("error")))
    lines = []
    for case, contender in dict.fromkeys((case, contender) for case, contender, _ in cells):
        figure = "found" if "needle" in case else "error of o"
        shown = [f"{np.mean(cells[case, contender, fraction]):.4f}" for fraction in fractions]
        lines.append([case, figure, contender, *shown])
    headers = ["case", "figure", "contender", *(f"{fraction:.4g}" for fraction in fractions)]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
