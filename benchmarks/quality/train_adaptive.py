r"""Trains a model from scratch with adaptive attention, and the same model with exact attention.

    python benchmarks/quality/train_adaptive.py --minutes 2 --fraction 0.125
    python benchmarks/quality/train_adaptive.py --minutes 1 --layers 2 --width 64 --hidden 128 \
        --heads 4 --kv-heads 1 --head-dim 16 --context 1024 --step-bytes 2048 --megabytes 4 \
        --fraction 0.25                                                    # on a processor

The first attention trains for ``--minutes``; the others take as many steps on the same texts with
the same learning rates. Plans carry no gradient. At the end every model is also evaluated with
every attention. Writes the losses as JSON and a picture.
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
    parser.add_argument("--minutes", type=float, default=2.0, help="of the first attention's steps")
    parser.add_argument("--most-steps", type=int, default=10**9)
    parser.add_argument("--fraction", type=float, default=0.125)
    parser.add_argument("--attentions", nargs="+", default=["jax_aat", "exact"], choices=CONTENDERS)
    parser.add_argument("--seed", type=int, default=0)
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
    state, generator = initial_state(shape_of(args), args.seed), np.random.default_rng(args.seed)
    for index in range(_CALIBRATION_STEPS + 1):
        if index == 1:  # what only the first one does, such as making pipelines, does not count
            began = time.monotonic()
        windows = random_windows(corpus, args.step_bytes, args.context, generator)
        state, loss = step(state, windows, np.float32(0))
        loss.block_until_ready()
    each = (time.monotonic() - began) / _CALIBRATION_STEPS
    return min(args.most_steps, max(int(60 * args.minutes / each), 1))


def train(
    args: argparse.Namespace, step: Step, corpus: Corpus, steps: int, name: str
) -> tuple[Any, list[float]]:
    """Trains; returns the parameters and the loss of every step."""
    state, generator = initial_state(shape_of(args), args.seed), np.random.default_rng(args.seed)
    history: list[float] = []
    bar = tqdm(range(steps), desc=name, mininterval=2)
    for index in bar:
        windows = random_windows(corpus, args.step_bytes, args.context, generator)
        rate = learning_rate_at(index / steps, args.learning_rate)
        state, loss = step(state, windows, np.float32(rate))
        history.append(round(float(loss), 4))
        bar.set_postfix_str(f"loss {history[-1]:.3f}", refresh=False)
    return state["params"], history


def held_out_loss(
    args: argparse.Namespace, attention: Attention, params: Any, windows: np.ndarray
) -> float:
    """Mean loss of held-out windows, nats a byte."""
    run = jax.jit(partial(losses, shape_of(args), default_dtype(), attention))
    return float(np.mean([run(params, window[None])[0].mean() for window in windows]))


def smoothed(curve: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and means of a curve over the last 2% of them."""
    window = max(len(curve) // 50, 1)
    means = np.convolve(curve, np.ones(window) / window, "valid")
    return np.arange(len(means)) + window, means


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Training losses against steps; below, by how much others exceed that of the last one."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    losses_axes, change_axes = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    *_, last = curves
    for name, curve in curves.items():
        losses_axes.plot(*smoothed(curve), label=name, linewidth=1)
        if name != last:
            change = np.subtract(curve, curves[last])
            change_axes.plot(*smoothed(change.tolist()), label=f"{name} - {last}", linewidth=1)
    change_axes.axhline(0, color="grey", linewidth=0.5)
    losses_axes.set(ylabel="loss, nats a byte")
    change_axes.set(xlabel="step", ylabel="change")
    for axes in (losses_axes, change_axes):
        axes.legend()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with every attention in turn."""
    args = parse_arguments(arguments)
    shape, corpus = shape_of(args), load_corpus(args.megabytes)
    windows = spread_windows(corpus.held_out, args.held_out, args.context + 1)
    sizes = Sizes(args.context, shape.heads, shape.kv_heads, shape.head_dim)
    attentions = {
        name: differentiable(CONTENDERS[name], sizes, args.fraction) for name in args.attentions
    }
    curves: dict[str, list[float]] = {}
    evaluations: dict[str, dict[str, float]] = {}
    facts = surroundings()
    facts |= {"fraction": args.fraction, "context": args.context, "step_bytes": args.step_bytes}
    facts |= vars(shape)
    seconds: dict[str, float] = {}
    steps = 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, attention in attentions.items():
        step = make_step(shape, attention, (args.step_bytes // args.context, args.context + 1))
        steps = steps or affordable_steps(args, step, corpus)
        began = time.monotonic()
        params, curves[name] = train(args, step, corpus, steps, name)
        seconds[name] = round(time.monotonic() - began, 1)
        evaluations[name] = {
            other: held_out_loss(args, attentions[other], params, windows) for other in attentions
        }
        line = f"trained with {name}: {steps} steps in {seconds[name]} s, held-out loss with"
        print(line, evaluations[name], flush=True)
        result = {**facts, "seconds": seconds, "curves": curves, "held_out": evaluations}
        args.output.write_text(json.dumps(result) + "\n")
    draw(curves, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
