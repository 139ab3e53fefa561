r"""Trains byte-level language models on the texts of this machine, by the clock.

    python benchmarks/quality/train.py --minutes 4 --seeds 0 1
    python benchmarks/quality/train.py --minutes 1 --seeds 0 --layers 2 --width 64 --hidden 128 \
        --heads 4 --kv-heads 2 --head-dim 16 --contexts 128 512 --shares 0.5 0.5 \
        --step-bytes 2048 --megabytes 4                                    # on a processor

Contexts grow: most of the time goes to 8,192 bytes, the last of it to 32,768, so that evaluation at
that length means something. ``--output`` receives the weights in float16, the held-out text that
evaluation reads, the losses, and query, key and value of ``--qkv-layers`` on one held-out text.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from capture import save_qkv
from corpus import Corpus, load_corpus, spread_windows
from model import Attention, LanguageModel, Shape, default_dtype, exact_attention, losses
from needles import hide
from storage import save_held_out, save_weights
from tqdm import tqdm

HELD_OUT_WINDOWS = 65
"""How many windows of the longest context are kept for evaluation."""

Step = Callable[[dict[str, Any], np.ndarray, float], tuple[dict[str, Any], jax.Array]]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="wall-clock time of a seed")
    parser.add_argument("--most-steps", type=int, default=10**9, help="stop after these, if sooner")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_shape(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5, 0.2])
    parser.add_argument("--step-bytes", type=int, default=65536, help="bytes of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--needles", type=float, default=0.25, help="share of windows with needles")
    parser.add_argument("--pairs", type=int, default=4, help="needles of such a window, each twice")
    parser.add_argument("--megabytes", type=float, default=160.0, help="of text, at most")
    parser.add_argument("--qkv-layers", type=int, nargs="*", default=[])
    parser.add_argument("--qkv-length", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=Path("build/quality"))
    args = parser.parse_args(arguments)
    check_phases(parser, args)
    return args


def check_phases(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits in words where contexts, their shares or the bytes of a step do not fit together."""
    if len(args.contexts) != len(args.shares) or sorted(args.contexts) != args.contexts:
        parser.error("--contexts must ascend, and --shares give each its share of the time")
    if any(args.step_bytes % context for context in args.contexts):
        parser.error("--step-bytes must be a multiple of every context")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every size of the model."""
    for name, value in vars(Shape()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help="size of the model")


def shape_of(args: argparse.Namespace) -> Shape:
    """The sizes that were asked for."""
    return Shape(**{name: getattr(args, name) for name in vars(Shape())})


def optimiser() -> optax.GradientTransformation:
    """AdamW but for its learning rate, which `make_step` takes as an operand."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 2, tree)),
    )


def initial_state(shape: Shape, seed: int) -> dict[str, Any]:
    """Parameters, float32, and the state of their optimiser."""

    @jax.jit
    def initialise() -> dict[str, Any]:
        model = LanguageModel(shape, jnp.float32, lambda q, k, v: (q, None))
        params = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))
        return {"params": params, "optimiser": optimiser().init(params)}

    return initialise()


def make_step(shape: Shape, attention: Attention, windows: tuple[int, int]) -> Step:
    """Compiles one step on windows [count, bytes] of text at a learning rate."""
    dtype = default_dtype()

    def mean_loss(params: Any, text: jax.Array) -> jax.Array:
        return losses(shape, dtype, attention, params, text)[0].mean()

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: dict[str, Any], text: jax.Array, learning_rate: jax.Array
    ) -> tuple[dict[str, Any], jax.Array]:
        loss, gradients = jax.value_and_grad(mean_loss)(state["params"], text)
        updates, inner = optimiser().update(gradients, state["optimiser"], state["params"])
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], updates)
        return {"params": params, "optimiser": inner}, loss

    state = jax.eval_shape(lambda: initial_state(shape, 0))
    text = jax.ShapeDtypeStruct(windows, jnp.uint8)
    return step.lower(state, text, jax.ShapeDtypeStruct((), jnp.float32)).compile()


def learning_rate_at(progress: float, largest: float) -> float:
    """Rises over the first 3% of the time, then falls to nothing as a cosine."""
    return largest * min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def random_windows(
    corpus: Corpus, step_bytes: int, context: int, generator: np.random.Generator
) -> np.ndarray:
    """Text of one step, [windows, context + 1]."""
    starts = generator.integers(len(corpus.train) - context, size=step_bytes // context)
    return corpus.train[starts[:, None] + np.arange(context + 1)]


def train(
    args: argparse.Namespace, steps: list[Step], corpus: Corpus, seed: int, deadline: float
) -> tuple[dict[str, Any], list[float]]:
    """Trains until the deadline; returns the parameters and the loss of every step."""
    state = initial_state(shape_of(args), seed)
    generator = np.random.default_rng(seed)
    ends = np.cumsum(args.shares) / sum(args.shares)
    history: list[jax.Array] = []
    began, phase, bar = time.monotonic(), 0, tqdm(unit="step", desc=f"seed {seed}", mininterval=2)
    while (now := time.monotonic()) < deadline and len(history) < args.most_steps:
        progress = max((now - began) / (deadline - began), len(history) / args.most_steps)
        phase = min(int(np.searchsorted(ends, progress)), len(steps) - 1)
        context = args.contexts[phase]
        windows = random_windows(corpus, args.step_bytes, context, generator)
        hide(windows, args.needles, args.pairs, generator)
        rate = np.float32(learning_rate_at(progress, args.learning_rate))
        state, loss = steps[phase](state, windows, rate)
        history.append(loss)
        # The clock is right only if the host does not run ahead of the device.
        if len(history) > 1:
            bar.set_postfix_str(f"{context} bytes, loss {float(history[-2]):.3f}", refresh=False)
        bar.update()
    bar.close()
    if not history:
        raise TimeoutError("reading texts and compiling took all the time: give more --minutes")
    return state["params"], [float(loss) for loss in history]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every seed and writes what evaluation needs."""
    began = time.monotonic()
    args = parse_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(args.megabytes)
    sizes = f"{len(corpus.train) / 1e6:.1f} MB, {len(corpus.held_out) / 1e6:.1f} MB held out"
    print(f"text      {corpus.files} files, {sizes}, {time.monotonic() - began:.0f} s")
    length = args.contexts[-1] + 1
    count = min(HELD_OUT_WINDOWS, len(corpus.held_out) // length)
    held_out = spread_windows(corpus.held_out, count, length)
    save_held_out(args.output, held_out)
    shape = shape_of(args)
    steps = []
    for context in tqdm(args.contexts, desc="compile", leave=False):
        windows = (args.step_bytes // context, context + 1)
        steps.append(make_step(shape, exact_attention, windows))
    print(f"compiled  after {time.monotonic() - began:.0f} s on {jax.devices()[0].device_kind}")
    end = began + 60 * args.minutes * len(args.seeds)
    for index, seed in enumerate(args.seeds):
        left = end - time.monotonic()
        deadline = time.monotonic() + left / (len(args.seeds) - index)
        params, history = train(args, steps, corpus, seed, deadline)
        facts = {"steps": len(history), "bytes": len(history) * args.step_bytes, "losses": history}
        save_weights(args.output, seed, params, shape, facts)
        if args.qkv_layers:
            window = held_out[0, : args.qkv_length + 1]
            save_qkv(args.output, seed, shape, params, args.qkv_layers, window)
        last = float(np.mean(history[-50:]))
        print(f"seed {seed}    {len(history)} steps, mean loss of the last 50 {last:.4f} nats")
    print(f"written   {args.output}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
