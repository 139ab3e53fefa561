r"""Trains a model from scratch with adaptive attention, and the same model with exact attention.

    python benchmarks/quality/train_adaptive.py --minutes 2 --fraction 0.125
    python benchmarks/quality/train_adaptive.py --minutes 1 --layers 2 --width 64 --hidden 128 \
        --heads 4 --kv-heads 1 --head-dim 16 --context 1024 --step-bytes 2048 --megabytes 4 \
        --fraction 0.25                                                    # on a processor

The first attention trains for ``--minutes`` a seed; the others take as many steps from the same
start on the same texts with the same learning rates. Plans carry no gradient. At the end every
model is also evaluated with every attention. Writes the losses as JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import library
import numpy as np
from contenders import Contender, Sizes
from corpus import Corpus, load_corpus, spread_windows
from evaluate import CONTENDERS
from facts import surroundings
from matplotlib.figure import Figure
from model import Attention, default_dtype, exact_attention, losses
from tqdm import tqdm
from train import (
    Step,
    add_shape,
    initial_state,
    learning_rate_at,
    make_step,
    random_windows,
    shape_of,
)

_CALIBRATION_STEPS = 5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of the first attention's steps, a seed"
    )
    parser.add_argument("--most-steps", type=int, default=10**9)
    parser.add_argument("--fraction", type=float, default=0.125)
    parser.add_argument("--attentions", nargs="+", default=["jax_aat", "exact"], choices=CONTENDERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_shape(parser)
    parser.set_defaults(layers=4, width=384, hidden=768)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--step-bytes", type=int, default=32768)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--megabytes", type=float, default=80.0)
    parser.add_argument("--held-out", type=int, default=32, help="windows")
    parser.add_argument("--output", type=Path, default=Path("build/quality/training.json"))
    return parser.parse_args(arguments)


def differentiable(contender: Contender, sizes: Sizes, fraction: float) -> Attention:
    """A contender as an attention to train with; what it selects carries no gradient.

    The mean rows and the state's correction are part of the attention, not of the plan: they do.
    """
    if contender.name == "exact":
        return exact_attention
    if contender.name == "jax_aat":
        return partial(library.attention, fraction=fraction)
    parameters = contender.parameters(sizes, fraction)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return contender.attend(*operands, parameters)[0]

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.map(one, (query, key, value)), None

    return attention


def affordable_steps(args: argparse.Namespace, step: Step, corpus: Corpus) -> int:
    """How many steps fit into the minutes, judged by a few on a state that is thrown away."""
    seed = args.seeds[0]
    state, generator = initial_state(shape_of(args), seed), np.random.default_rng(seed)
    for index in range(_CALIBRATION_STEPS + 1):
        if index == 1:  # what only the first one does, such as making pipelines, does not count
            began = time.monotonic()
        windows = random_windows(corpus, args.step_bytes, args.context, generator)
        state, loss = step(state, windows, np.float32(0))
        loss.block_until_ready()
    each = (time.monotonic() - began) / _CALIBRATION_STEPS
    return min(args.most_steps, max(int(60 * args.minutes / each), 1))


def train(
    args: argparse.Namespace, step: Step, corpus: Corpus, steps: int, seed: int
) -> tuple[Any, list[float]]:
    """Trains; returns the parameters and the loss of every step."""
    state, generator = initial_state(shape_of(args), seed), np.random.default_rng(seed)
    history: list[float] = []
    bar = tqdm(range(steps), desc=f"seed {seed}", mininterval=2)
    for index in bar:
        windows = random_windows(corpus, args.step_bytes, args.context, generator)
        rate = learning_rate_at(index / steps, args.learning_rate)
        state, loss = step(state, windows, np.float32(rate))
        history.append(round(float(loss), 4))
        bar.set_postfix_str(f"loss {history[-1]:.3f}", refresh=False)
    return state["params"], history


def held_out_loss(run: Any, params: Any, windows: np.ndarray) -> float:
    """Mean loss of held-out windows, nats a byte, by a compiled `losses`."""
    return float(np.mean([run(params, window[None])[0].mean() for window in windows]))


def smoothed(curve: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and means of a curve over the last 2% of them."""
    window = max(len(curve) // 50, 1)
    means = np.convolve(curve, np.ones(window) / window, "valid")
    return np.arange(len(means)) + window, means


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Training losses against steps; below, by how much others exceed that of the last attention.

    A line a seed.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    losses_axes, change_axes = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    last = runs[-1]["trained_with"]
    baselines = {run["seed"]: run["curve"] for run in runs if run["trained_with"] == last}
    names, seeds = (list(dict.fromkeys(run[x] for run in runs)) for x in ("trained_with", "seed"))
    for run in runs:
        name, seed, curve = run["trained_with"], run["seed"], run["curve"]
        dash = ("-", "--", ":", "-.")[seeds.index(seed) % 4]
        style = {"color": f"C{names.index(name)}", "linestyle": dash, "linewidth": 1}
        losses_axes.plot(*smoothed(curve), label=f"{name}, seed {seed}", **style)
        if name != last:
            change = np.subtract(curve, baselines[seed]).tolist()
            change_axes.plot(*smoothed(change), label=f"{name} - {last}, seed {seed}", **style)
    change_axes.axhline(0, color="grey", linewidth=0.5)
    losses_axes.set(ylabel="loss, nats a byte")
    change_axes.set(xlabel="step", ylabel="change")
    for axes in (losses_axes, change_axes):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every seed with every attention in turn."""
    args = parse_arguments(arguments)
    shape, corpus = shape_of(args), load_corpus(args.megabytes)
    windows = spread_windows(corpus.held_out, args.held_out, args.context + 1)
    sizes = Sizes(args.context, shape.heads, shape.kv_heads, shape.head_dim)
    attentions = {
        name: differentiable(CONTENDERS[name], sizes, args.fraction) for name in args.attentions
    }
    evaluate = {
        name: jax.jit(partial(losses, shape, default_dtype(), attention))
        for name, attention in attentions.items()
    }
    facts = surroundings()
    facts |= {"fraction": args.fraction, "context": args.context, "step_bytes": args.step_bytes}
    facts |= vars(shape)
    runs: list[dict[str, Any]] = []
    steps = 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, attention in attentions.items():
        step = make_step(shape, attention, (args.step_bytes // args.context, args.context + 1))
        steps = steps or affordable_steps(args, step, corpus)
        for seed in args.seeds:
            began = time.monotonic()
            params, curve = train(args, step, corpus, steps, seed)
            seconds = round(time.monotonic() - began, 1)
            held_out = {x: held_out_loss(evaluate[x], params, windows) for x in evaluate}
            print(f"seed {seed}, trained with {name}: {steps} steps in {seconds} s, held-out loss",
                  f"with {held_out}", flush=True)  # fmt: skip
            run = {"seed": seed, "trained_with": name, "seconds": seconds, "held_out": held_out}
            runs.append({**run, "curve": curve})
            args.output.write_text(json.dumps({**facts, "runs": runs}) + "\n")
    draw(runs, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
