r"""Trains a small language model on the text of Python's standard library.

    python examples/train_text.py
    python examples/train_text.py --layers 12 --width 768 --heads 12 --kv-heads 4 \
        --context 4096 --batch 8 --steps 5000 --dtype bfloat16

Everything is computed by JAX and Flax, but attention by `jax_aat.tiled_attention`. The folder
given by ``--output`` receives the checkpoints, ``history.json`` with every loss, and ``loss.png``;
after an interruption, ``--resume`` continues from the last checkpoint to the losses that the run
would have had. Without it, a run replaces the checkpoints of the one before.

With ``--adaptation budget=0.25`` (or ``tolerance=0.05``, or ``threshold=0.001``) attention is
adaptive in training and evaluation: the report of every layer is printed, and ``resolution.png``
shows at which level each tile of queries saw each granule of keys in the last step.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from matplotlib.figure import Figure
from text_data import Text, byte_frequency_loss, load_text, random_windows, spread_windows
from text_model import LanguageModel
from tqdm import tqdm

import jax_aat
from jax_aat import TilePlan, plot

HELD_OUT_BATCHES = 8


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128, help="features of a position")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads")
    parser.add_argument("--context", type=int, default=128, help="bytes that the model sees")
    parser.add_argument("--batch", type=int, default=16, help="windows of text a step")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--implementation", choices=["vulkan", "xla", "auto"], default="vulkan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-every", type=int, default=80, help="steps between checkpoints and held-out losses"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument(
        "--adaptation",
        type=adaptation,
        metavar="GOAL=NUMBER",
        help="adaptive attention: budget=, tolerance= or threshold= and a number",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    args = parser.parse_args(arguments)
    if args.width % args.heads or args.heads % args.kv_heads or args.width // args.heads % 2:
        parser.error("--width must be an even multiple of --heads, --heads one of --kv-heads")
    return args


def adaptation(goal: str) -> jax_aat.Adaptation:
    """Reads an adaptation from ``goal=number``."""
    name, _, number = goal.partition("=")
    if name not in ("budget", "tolerance", "threshold"):
        raise argparse.ArgumentTypeError(f"{name!r} is not budget, tolerance or threshold")
    try:
        return jax_aat.Adaptation(**{name: float(number)})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass
class History:
    """Losses in nats a byte: one a step, and (step, held-out loss) at every checkpoint."""

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """The model, its optimiser and their state, and the compiled functions that change them."""

    def __init__(self, args: argparse.Namespace) -> None:
        model = LanguageModel(
            args.layers,
            args.width,
            args.heads,
            args.kv_heads,
            jnp.dtype(args.dtype),
            None if args.implementation == "auto" else args.implementation,
            args.adaptation,
        )
        # The schedule does not depend on the number of steps, so a run can be resumed for more.
        schedule = optax.linear_schedule(0.0, args.learning_rate, transition_steps=50)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

        def loss(
            params: Any, resolution: Any, windows: jax.Array
        ) -> tuple[jax.Array, dict[str, Any]]:
            tokens = windows.astype(jnp.int32)
            logits, changed = model.apply(
                {"params": params, "resolution": resolution},
                tokens[:, :-1],
                mutable=["resolution", "reports"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean(), changed

        @partial(jax.jit, donate_argnums=0)
        def step(
            state: dict[str, Any], windows: jax.Array
        ) -> tuple[dict[str, Any], jax.Array, Any]:
            params = state["params"]
            (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(
                params, state["resolution"], windows
            )
            updates, optimiser_state = optimiser.update(gradients, state["optimiser"], params)
            following = {
                "params": optax.apply_updates(params, updates),
                "optimiser": optimiser_state,
                "resolution": changed.get("resolution", {}),
            }
            return following, value, changed.get("reports", {})

        @jax.jit
        def initialise() -> dict[str, Any]:
            tokens = jnp.zeros((args.batch, args.context), jnp.int32)
            variables = model.init(jax.random.key(args.seed), tokens)
            params = variables["params"]
            resolution = variables.get("resolution", {})
            optimiser_state = optimiser.init(params)
            return {"params": params, "optimiser": optimiser_state, "resolution": resolution}

        self.state = initialise()
        self.reports: Any = {}
        self.steps = 0
        self._step = step
        self._loss = jax.jit(lambda state, windows: loss(*state, windows)[0])

    def step(self, windows: jax.Array) -> jax.Array:
        """Takes a step of training and returns the loss before it."""
        self.state, loss, self.reports = self._step(self.state, windows)
        self.steps += 1
        return loss

    def held_out_loss(self, batches: np.ndarray) -> float:
        """Returns the mean loss, in nats a byte, of batches [count, batch, context + 1]."""
        state = self.state["params"], self.state["resolution"]
        losses = [self._loss(state, windows) for windows in batches]
        return float(np.mean(losses))


def train(args: argparse.Namespace, text: Text) -> tuple[History, Trainer]:
    """Trains up to ``args.steps``, from the last checkpoint if there is one to resume."""
    shape = (args.batch, args.context + 1)
    held_out = spread_windows(text.held_out, (HELD_OUT_BATCHES * shape[0], shape[1]))
    held_out = held_out.reshape(HELD_OUT_BATCHES, *shape)
    trainer, history = Trainer(args), History()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trainer.state["params"]))
    print(f"model      {parameters / 1e6:.2f} M parameters, {args.dtype}, {jax.devices()[0]}")
    folder = (args.output / "checkpoints").resolve()
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as kept:
        if (last := kept.latest_step()) is not None:
            restored = kept.restore(
                last,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(trainer.state), history=ocp.args.JsonRestore()
                ),
            )
            trainer.state, history = restored["state"], History(**restored["history"])
            print(f"resumed    at step {last}")
        bar = tqdm(range(len(history.train), args.steps), unit="step")
        for step in bar:
            windows = random_windows(text.train, shape, seed=(args.seed, step))
            history.train.append(float(trainer.step(windows)))
            bar.set_postfix_str(f"loss {history.train[-1]:.3f}")
            done = step + 1
            if done % args.save_every == 0 or done == args.steps:
                history.held_out.append((done, trainer.held_out_loss(held_out)))
                kept.save(
                    done,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(trainer.state),
                        history=ocp.args.JsonSave(vars(history)),
                    ),
                )
    return history, trainer


def draw_losses(history: History, baseline: float, path: Path) -> None:
    """Draws the loss curve beside the loss of byte frequencies."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(history.train) + 1), history.train, label="training", linewidth=0.8)
    axes.plot(*zip(*history.held_out, strict=True), "o-", label="held out")
    axes.axhline(baseline, color="grey", linestyle="--", label="byte frequencies")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title="Language model on Python's library")
    axes.legend()
    figure.savefig(path, dpi=150)


def show_adaptation(args: argparse.Namespace, trainer: Trainer) -> None:
    """Prints the report of every layer's last call and draws the levels of its first heads."""
    layers = sorted(trainer.state["resolution"])
    figure = Figure(figsize=(4 * len(layers), 4.6), layout="constrained")
    grid = args.adaptation.grid(args.context, args.context, args.heads, args.kv_heads)
    unfilled = TilePlan.unfilled(grid, args.adaptation, True, (-1, -1), args.batch)
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        if layer in trainer.reports:
            print(f"{layer}\n{trainer.reports[layer]['report'][0]}")
        # The state keeps the levels of the last call, which is all of its plan that is drawn.
        levels = trainer.state["resolution"][layer]["state"].levels
        plot.resolution_map(replace(unfilled, levels=levels), heads=[0], axes=axes)
        axes.set_title(f"{layer}, {axes.get_title()}", fontsize="small")
    figure.savefig(args.output / "resolution.png", dpi=150)
    print(f"resolution {args.output / 'resolution.png'}")


def main(arguments: Sequence[str] | None = None) -> History:
    """Runs the example and returns its losses."""
    args = parse_arguments(arguments)
    text = load_text()
    print(f"text       {text.files} files, {len(text.train)} bytes, {len(text.held_out)} held out")
    history, trainer = train(args, text)
    if trainer.steps:
        print(f"attention  {jax_aat.last_dispatch() or 'by XLA'}")
    else:
        print(f"attention  none ran, so none is reported: all {args.steps} steps were taken before")
    baseline = byte_frequency_loss(text)
    for name, nats in (("model", history.held_out[-1][1]), ("byte frequencies", baseline)):
        print(f"held-out loss of {name}: {nats:.3f} nats, {nats / math.log(2):.3f} bits a byte")
    (args.output / "history.json").write_text(json.dumps(vars(history), indent=1))
    draw_losses(history, baseline, args.output / "loss.png")
    print(f"loss curve {args.output / 'loss.png'}")
    if args.adaptation is not None:
        show_adaptation(args, trainer)
    return history


if __name__ == "__main__":
    main()
