r"""Lets a trained model recall codes that were hidden at every depth of a long text.

    python benchmarks/quality/needle_retrieval.py --weights build/quality --seeds 0 1

A sentence with a name and a code of eight digits lies at a depth of a held-out text and comes again
at its end. The code is retrieved if each of its digits gets more than half of the probability.
Every layer's attention is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluate import CONTENDERS, Evaluator, Job
from matplotlib.figure import Figure
from needles import CODE_BYTES, PROMPT_BYTES, SENTENCE_BYTES, sentence
from tqdm import tqdm


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = ["exact", "jax_aat", "emulation", "block top-k", "window + sinks"]
    parser.add_argument("--weights", type=Path, default=Path("build/quality"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--depths", type=int, default=9)
    parser.add_argument("--texts", type=int, default=2, help="texts a depth")
    parser.add_argument("--contenders", nargs="+", default=names, choices=CONTENDERS)
    parser.add_argument("--output", type=Path, default=Path("build/quality/needles.json"))
    return parser.parse_args(arguments)


def hidden(text: np.ndarray, depth: float, generator: np.random.Generator) -> np.ndarray:
    """A copy of a text [T + 1] with a needle at a depth and again at its end."""
    window, needle = text.copy(), sentence(generator)
    place = int(depth * (len(text) - 2 * SENTENCE_BYTES))
    window[place : place + SENTENCE_BYTES] = needle
    window[-SENTENCE_BYTES:] = needle
    return window


def code_losses(losses: np.ndarray) -> np.ndarray:
    """The losses of the digits of the last code, of those [T] of a text [T + 1]."""
    first = len(losses) - SENTENCE_BYTES + PROMPT_BYTES
    return losses[first : first + CODE_BYTES]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of codes retrieved against depth."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [row for row in rows if row["name"] == name]
        depths = sorted({row["depth"] for row in found})
        shares = [np.mean([x["retrieved"] for x in found if x["depth"] == d]) for d in depths]
        axes.plot(depths, shares, "o-", label=name)
    axes.set(xlabel="depth", ylabel="codes retrieved", ylim=(-0.05, 1.05))
    axes.legend()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks for a needle at every depth, in every text, under every attention."""
    args = parse_arguments(arguments)
    evaluator = Evaluator(args.weights, args.seeds)
    depths = np.linspace(0, 1, args.depths)
    rows: list[dict[str, Any]] = []
    for name in args.contenders:
        job = Job(args.length, name, args.fraction, args.texts, fidelity=False)
        evaluate = evaluator.compiled(job)
        for index, seed in enumerate(args.seeds):
            parameters = evaluator.parameters(job, index)
            for depth in tqdm(depths, desc=f"{name}, seed {seed}"):
                for text in range(args.texts):
                    generator = np.random.default_rng([text, int(1000 * depth)])
                    window = hidden(evaluator.text[text][: args.length + 1], depth, generator)
                    loss, besides = evaluate(evaluator.params[index], window, parameters)
                    code = code_losses(np.asarray(loss))
                    row = {"name": name, "seed": seed, "depth": float(depth), "text": text}
                    row |= {"retrieved": bool(code.max() < math.log(2)), "loss": float(code.mean())}
                    rows.append({**row, "spent": float(np.mean(besides["spent_by_layer"]))})
        found = [row for row in rows if row["name"] == name]
        share, loss, spent = (
            np.mean([r[k] for r in found]) for k in ("retrieved", "loss", "spent")
        )
        print(f"{name:16s} spent {spent:.4f}  retrieved {share:.3f}  loss of a digit {loss:.4f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"length": args.length, "fraction": args.fraction}
    args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
