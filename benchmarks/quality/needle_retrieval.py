r"""Lets a trained model recall codes that were hidden at every depth of a long text.

    python benchmarks/quality/needle_retrieval.py --weights build/quality/retrieval
    python benchmarks/quality/needle_retrieval.py --weights build/quality/retrieval \
        --length 1024 --fraction 0.25 --depths 5 --contenders exact jax_aat   # on a processor

A sentence with a name and a code of eight digits lies at a depth of a held-out text and comes again
at its end. The code is retrieved if each of its digits gets more than half of the probability.
Every layer's attention is replaced. Attentions come in the order of ``--contenders``, the file is
rewritten after each, and none is started after ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from evaluate import CONTENDERS, Evaluator, Job, compile_ahead
from facts import surroundings
from matplotlib.figure import Figure
from needles import CODE_BYTES, PROMPT_BYTES, SENTENCE_BYTES, sentences
from tqdm import tqdm


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = ["exact", "jax_aat", "block top-k", "window + sinks"]
    parser.add_argument("--weights", type=Path, default=Path("build/quality/retrieval"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--depths", type=int, default=9)
    parser.add_argument("--texts", type=int, default=2, help="texts a depth")
    parser.add_argument("--contenders", nargs="+", default=names, choices=CONTENDERS)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after them")
    parser.add_argument("--output", type=Path, default=Path("build/quality/needles.json"))
    return parser.parse_args(arguments)


def hidden(text: np.ndarray, depth: float, generator: np.random.Generator) -> np.ndarray:
    """A copy of a text [T + 1] with a needle at a depth and again at its end."""
    window, needle = text.copy(), sentences(1, generator)[0]
    place = int(depth * (len(text) - 2 * SENTENCE_BYTES))
    window[place : place + SENTENCE_BYTES] = needle
    window[-SENTENCE_BYTES:] = needle
    return window


def code_losses(losses: np.ndarray) -> np.ndarray:
    """The losses of the digits of the last code, of those [T] of a text [T + 1]."""
    first = len(losses) - SENTENCE_BYTES + PROMPT_BYTES
    return losses[first : first + CODE_BYTES]


def retrieved_by_depth(rows: list[dict[str, Any]]) -> dict[float, list[bool]]:
    """What was retrieved at each depth, the least first."""
    depths = sorted({row["depth"] for row in rows})
    return {d: [row["retrieved"] for row in rows if row["depth"] == d] for d in depths}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of codes retrieved against depth."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        retrieved = retrieved_by_depth([row for row in rows if row["name"] == name])
        axes.plot(list(retrieved), [np.mean(x) for x in retrieved.values()], "o-", label=name)
    axes.set(xlabel="depth", ylabel="codes retrieved", ylim=(-0.05, 1.05))
    axes.legend()
    figure.savefig(path, dpi=130)


def ask(evaluator: Evaluator, job: Job, depths: np.ndarray) -> list[dict[str, Any]]:
    """One row for every seed, depth and text under one attention."""
    evaluate, rows = evaluator.compiled(job), []
    for index, seed in enumerate(evaluator.seeds):
        parameters = evaluator.parameters(job, index)
        for depth in tqdm(depths, desc=f"{job.name}, seed {seed}", mininterval=2):
            for text in range(job.texts):
                generator = np.random.default_rng([text, int(1000 * depth)])
                window = hidden(evaluator.text[text][: job.length + 1], depth, generator)
                loss, besides = evaluate(evaluator.params[index], window, parameters)
                code = code_losses(np.asarray(loss))
                row = {"name": job.name, "seed": seed, "depth": float(depth), "text": text}
                row |= {"retrieved": bool(code.max() < math.log(2)), "loss": float(code.mean())}
                rows.append({**row, "spent": float(np.mean(besides["spent_by_layer"]))})
    return rows


def describe(rows: list[dict[str, Any]]) -> str:
    """One line about what one attention retrieved, in all and at each depth."""
    loss, spent = (np.mean([row[key] for row in rows]) for key in ("loss", "spent"))
    retrieved = [sum(found) for found in retrieved_by_depth(rows).values()]
    name, count, by_depth = rows[0]["name"], sum(retrieved), " ".join(map(str, retrieved))
    line = f"{name:16s} spent {spent:.4f}  retrieved {count} of {len(rows)}  by depth {by_depth}"
    return line + f"  loss of a digit {loss:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks for a needle at every depth, in every text, under every attention."""
    began, args = time.monotonic(), parse_arguments(arguments)
    evaluator = Evaluator(args.weights, args.seeds)
    depths = np.linspace(0, 1, args.depths)
    jobs = [Job(args.length, x, args.fraction, args.texts, False) for x in args.contenders]
    facts = surroundings()
    facts |= {"length": args.length, "fraction": args.fraction}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(4) as pool:
        ahead = compile_ahead(pool, evaluator, jobs)
        for job in jobs:
            if time.monotonic() - began > args.seconds:
                print(f"out of time before {job.name}")
                break
            ahead[job].result()
            found = ask(evaluator, job, depths)
            rows += found
            print(f"{time.monotonic() - began:6.1f} s  {describe(found)}", flush=True)
            args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        pool.shutdown(cancel_futures=True)
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
