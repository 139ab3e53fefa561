"""Query, key and value of a trained model's layers on a held-out text, as files.

    python benchmarks/quality/capture.py --weights build/quality --seed 0 --layers 0 2 5 7

Written next to the weights: qkv-SEED-layerLAYER.npz with q [T, N, H], k and v [T, K, H], float16.
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


def save_qkv(
    folder: Path, seed: int, shape: Shape, params: Any, layers: Sequence[int], window: np.ndarray
) -> None:
    """Writes query, key and value, after the rotation, of some layers on a text [T + 1]."""

    def capture(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        return exact_attention(q, k, v)[0], tuple(x[0].astype(jnp.float16) for x in (q, k, v))

    dtype = default_dtype()
    captured = jax.jit(lambda p, w: losses(shape, dtype, capture, p, w)[1])(params, window[None])
    for layer in layers:
        arrays = {name: x[layer] for name, x in zip("qkv", captured, strict=True)}
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
