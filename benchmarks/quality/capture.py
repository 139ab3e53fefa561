"""Query, key and value of a trained model's layers on a held-out text, as files.

    python benchmarks/quality/capture.py --weights build/quality --seed 0 --layers 0 2 5 7

Written next to the weights: qkv-SEED-layerLAYER.npz with q [T, N, H], k and v [T, K, H], float16,
and the base of RoPE, by which q and k are rotated: 0 where they are not. It is left out where q
depends on the position otherwise, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from model import Shape, default_dtype, exact_attention, losses
from storage import load_held_out, load_weights


def capture_qkv(shape: Shape, params: Any, window: np.ndarray) -> tuple[jax.Array, ...]:
    """Query, key and value, after the rotation, of all layers on a text [T + 1], float16.

    Returns:
      q [layers, T, N, H], k and v [layers, T, K, H].
    """

    def capture(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        return exact_attention(q, k, v)[0], tuple(x[0].astype(jnp.float16) for x in (q, k, v))

    # What is not returned is not computed: the logits, for one.
    run = jax.jit(lambda p, w: losses(shape, default_dtype(), capture, p, w)[1])
    captured: tuple[jax.Array, ...] = run(params, window[None])
    return captured


def save_qkv(
    folder: Path, seed: int, shape: Shape, params: Any, layers: Sequence[int], window: np.ndarray
) -> None:
    """Writes query, key and value, after the rotation, of some layers on a text [T + 1]."""
    captured = capture_qkv(shape, params, window)
    for layer in layers:
        arrays = {name: x[layer] for name, x in zip("qkv", captured, strict=True)}
        if not shape.scaled_from:
            every = shape.unrotated_every
            rotated = not every or (layer + 1) % every != 0
            arrays["rope_base"] = np.float64(shape.rope_base if rotated else 0)
        np.savez(folder / f"qkv-{seed}-layer{layer}.npz", **arrays)


def main(arguments: Sequence[str] | None = None) -> None:
    """Captures some layers of one model on one text."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("build/quality"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5, 7])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--text", type=int, default=0)
    args = parser.parse_args(arguments)
    params, shape = load_weights(args.weights, args.seed)
    window = load_held_out(args.weights)[args.text, : args.length + 1]
    save_qkv(args.weights, args.seed, shape, params, args.layers, window)


if __name__ == "__main__":
    main()
