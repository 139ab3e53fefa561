r"""Trains a small language model on the text of Python's standard library.

    python examples/train_text.py
    python examples/train_text.py --layers 12 --width 768 --heads 12 --kv-heads 4 \
        --context 4096 --batch 8 --steps 5000 --dtype bfloat16

Everything is computed by JAX and Flax, but attention by `jax_aat.tiled_attention`. The folder
given by ``--output`` receives the checkpoints, ``history.json`` with every loss, and ``loss.png``;
after an interruption, ``--resume`` continues from the last checkpoint to the losses that the run
would have had. Without it, a run replaces the checkpoints of the one before.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--implementation", choices=["vulkan", "xla", "auto"], default="vulkan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-every", type=int, default=100, help="steps between checkpoints and held-out losses"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    args = parser.parse_args(arguments)
    if args.width % args.heads or args.heads % args.kv_heads or args.width // args.heads % 2:
        parser.error("--width must be an even multiple of --heads, --heads one of --kv-heads")
    return args


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
        )
        # The schedule does not depend on the number of steps, so a run can be resumed for more.
        schedule = optax.linear_schedule(0.0, args.learning_rate, transition_steps=50)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

        def loss(params: Any, windows: jax.Array) -> jax.Array:
            tokens = windows.astype(jnp.int32)
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        @partial(jax.jit, donate_argnums=0)
        def step(state: dict[str, Any], windows: jax.Array) -> tuple[dict[str, Any], jax.Array]:
            value, gradients = jax.value_and_grad(loss)(state["params"], windows)
            updates, optimiser_state = optimiser.update(
                gradients, state["optimiser"], state["params"]
            )
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "optimiser": optimiser_state}, value

        @jax.jit
        def initialise() -> dict[str, Any]:
            tokens = jnp.zeros((1, args.context), jnp.int32)
            params = model.init(jax.random.key(args.seed), tokens)
            return {"params": params, "optimiser": optimiser.init(params)}

        self.state = initialise()
        self.step = step
        self.loss = jax.jit(loss)

    def held_out_loss(self, batches: np.ndarray) -> float:
        """Returns the mean loss, in nats a byte, of batches [count, batch, context + 1]."""
        losses = [self.loss(self.state["params"], windows) for windows in batches]
        return float(np.mean(losses))


def train(args: argparse.Namespace, text: Text) -> History:
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
            trainer.state, loss = trainer.step(trainer.state, windows)
            history.train.append(float(loss))
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
    return history


def plot(history: History, baseline: float, path: Path) -> None:
    """Draws the loss curve beside the loss of byte frequencies."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(history.train) + 1), history.train, label="training", linewidth=0.8)
    axes.plot(*zip(*history.held_out, strict=True), "o-", label="held out")
    axes.axhline(baseline, color="grey", linestyle="--", label="byte frequencies")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title="Language model on Python's library")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> History:
    """Runs the example and returns its losses."""
    args = parse_arguments(arguments)
    text = load_text()
    print(f"text       {text.files} files, {len(text.train)} bytes, {len(text.held_out)} held out")
    history = train(args, text)
    print(f"attention  {jax_aat.last_dispatch() or 'by XLA'}")
    baseline = byte_frequency_loss(text)
    for name, nats in (("model", history.held_out[-1][1]), ("byte frequencies", baseline)):
        print(f"held-out loss of {name}: {nats:.3f} nats, {nats / math.log(2):.3f} bits a byte")
    (args.output / "history.json").write_text(json.dumps(vars(history), indent=1))
    plot(history, baseline, args.output / "loss.png")
    print(f"loss curve {args.output / 'loss.png'}")
    return history


if __name__ == "__main__":
    main()
