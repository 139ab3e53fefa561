r"""Trains a small model that fetches codes from anywhere in its context, by the clock.

    python benchmarks/quality/train_retrieval.py --minutes 2.5
    python benchmarks/quality/train_retrieval.py --minutes 4 --layers 3 --width 64 --hidden 128 \
        --heads 4 --kv-heads 1 --head-dim 32 --contexts 256 1024 --shares 0.7 0.3 \
        --step-bytes 8192 --megabytes 4                                    # on a processor

Every window holds needles. Copying forms in short windows, where a code is near and most windows
are needles; longer ones teach it over any distance and among more text. The loss is the mean over
all bytes plus the mean over the bytes of codes that have been seen before, few as they are. The
output is what `train.py` writes, and `needle_retrieval.py` reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from corpus import Corpus, load_corpus, spread_windows
from model import Shape, default_dtype, exact_attention, losses
from needles import hide
from storage import save_held_out, save_weights
from tqdm import tqdm
from train import (
    HELD_OUT_WINDOWS,
    add_shape,
    check_phases,
    initial_state,
    optimiser,
    random_windows,
    shape_of,
)

Step = Callable[[dict[str, Any], np.ndarray, np.ndarray, float], tuple[dict[str, Any], jax.Array]]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.5, help="wall-clock time in all")
    parser.add_argument("--most-steps", type=int, default=10**9, help="stop after these, if sooner")
    parser.add_argument("--seed", type=int, default=0)
    add_shape(parser)
    parser.set_defaults(layers=4, width=256, hidden=512)
    parser.set_defaults(unrotated_every=2, convolution=6, scaled_from=512)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.2, 0.2, 0.3])
    parser.add_argument("--step-bytes", type=int, default=65536, help="bytes of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--pairs", type=int, default=64, help="needles of a window, each twice")
    parser.add_argument("--megabytes", type=float, default=80.0, help="of text, at most")
    parser.add_argument("--output", type=Path, default=Path("build/quality/retrieval"))
    args = parser.parse_args(arguments)
    check_phases(parser, args)
    return args


def make_step(shape: Shape, windows: tuple[int, int]) -> Step:
    """Compiles one step on windows [count, bytes] of text, their codes and a learning rate.

    The step returns the mean loss of all bytes and that of the codes.
    """

    def loss_of(params: Any, text: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        each, _ = losses(shape, default_dtype(), exact_attention, params, text)
        parts = jnp.stack([each.mean(), each.mean(where=codes[:, 1:])])
        return parts.sum(), parts

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: dict[str, Any], text: jax.Array, codes: jax.Array, learning_rate: jax.Array
    ) -> tuple[dict[str, Any], jax.Array]:
        gradients, parts = jax.grad(loss_of, has_aux=True)(state["params"], text, codes)
        updates, inner = optimiser().update(gradients, state["optimiser"], state["params"])
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], updates)
        return {"params": params, "optimiser": inner}, parts

    state = jax.eval_shape(lambda: initial_state(shape, 0))
    text, codes = (jax.ShapeDtypeStruct(windows, dtype) for dtype in (jnp.uint8, jnp.bool_))
    return step.lower(state, text, codes, jax.ShapeDtypeStruct((), jnp.float32)).compile()


def learning_rate_at(progress: float, largest: float) -> float:
    """Rises over the first 3% of the time and falls over the last 20%.

    It is large until then because every longer context is new to the model.
    """
    return largest * min(progress / 0.03, 1.0, max(1 - progress, 0.0) / 0.2)


def train(
    args: argparse.Namespace, steps: list[Step], corpus: Corpus, deadline: float
) -> tuple[dict[str, Any], np.ndarray]:
    """Trains until the deadline; returns the parameters and the losses [steps, 2]."""
    state = initial_state(shape_of(args), args.seed)
    generator = np.random.default_rng(args.seed)
    ends = np.cumsum(args.shares) / sum(args.shares)
    history: list[jax.Array] = []
    began, phase, bar = time.monotonic(), 0, tqdm(unit="step", mininterval=2)
    while (now := time.monotonic()) < deadline and len(history) < args.most_steps:
        progress = max((now - began) / (deadline - began), len(history) / args.most_steps)
        phase = min(int(np.searchsorted(ends, progress)), len(steps) - 1)
        context = args.contexts[phase]
        windows = random_windows(corpus, args.step_bytes, context, generator)
        codes = hide(windows, 1.0, args.pairs, generator)
        rate = np.float32(learning_rate_at(progress, args.learning_rate))
        state, parts = steps[phase](state, windows, codes, rate)
        history.append(parts)
        # The clock is right only if the host does not run ahead of the device.
        if len(history) > 1:
            text, code = np.asarray(history[-2])
            bar.set_postfix_str(f"{context} bytes, loss {text:.3f}, codes {code:.3f}", False)
        bar.update()
    bar.close()
    if not history:
        raise TimeoutError("reading texts and compiling took all the time: give more --minutes")
    return state["params"], np.asarray(history)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one model and writes what `needle_retrieval.py` needs."""
    began = time.monotonic()
    args = parse_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    corpus, shape = load_corpus(args.megabytes), shape_of(args)
    length = args.contexts[-1] + 1
    count = min(HELD_OUT_WINDOWS, len(corpus.held_out) // length)
    save_held_out(args.output, spread_windows(corpus.held_out, count, length))
    windows = [(args.step_bytes // context, context + 1) for context in args.contexts]
    with ThreadPoolExecutor() as pool:
        steps = list(pool.map(partial(make_step, shape), windows))
    print(f"compiled  after {time.monotonic() - began:.0f} s on {jax.devices()[0].device_kind}")
    params, history = train(args, steps, corpus, began + 60 * args.minutes)
    facts = {"steps": len(history), "bytes": len(history) * args.step_bytes}
    save_weights(args.output, args.seed, params, shape, {**facts, "losses": history.tolist()})
    text, code = history[-50:].mean(0)
    print(f"seed {args.seed}    {len(history)} steps, loss {text:.3f}, of a code's byte {code:.3f}")
    print(f"written   {args.output}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
