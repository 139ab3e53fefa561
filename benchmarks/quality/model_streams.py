"""Operands of every layer of a trained model, on one held-out window after the other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from capture import capture_qkv
from facts import surroundings
from model import Shape
from storage import load_held_out, load_weights, windows_of

import jax_aat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a model and the attention."""
    parser.add_argument("--weights", type=Path, help="folder of a trained model; else synthetic")
    parser.add_argument("--seed", type=int, default=0, help="of the model")
    parser.add_argument("--windows", type=int, default=200, help="of the held-out text")
    parser.add_argument("--window-length", type=int, default=8192)
    parser.add_argument("--implementation", choices=["xla", "vulkan"], help="default: by itself")


def print_surroundings() -> None:
    """Prints what the figures depend on, above their table."""
    print("\n".join(f"{name}: {fact}  " for name, fact in surroundings().items()), end="\n\n")


def load(args: argparse.Namespace) -> tuple[Shape, Any, np.ndarray]:
    """Sizes and parameters of the model, and windows [windows, length + 1] of the text.

    Raises:
      ValueError: The text has fewer windows.
    """
    params, shape = load_weights(args.weights, args.seed)
    found = windows_of(load_held_out(args.weights), args.window_length)
    if len(found) < args.windows:
        raise ValueError(f"the text has {len(found)} windows of {args.window_length}, not more")
    return shape, params, found[: args.windows]


def operands_by_layer(shape: Shape, params: Any, window: jax.Array) -> tuple[jax.Array, ...]:
    """Query [layers, 1, T, N, H], key and value [layers, 1, T, K, H], float16."""
    return tuple(x[:, None] for x in capture_qkv(shape, params, window))


def attend_exactly(operands: tuple[jax.Array, ...], implementation: str | None) -> jax.Array:
    """What errors are of: in float32, so that it has no rounding of its own that counts."""
    wide = [x.astype(jnp.float32) for x in operands]
    return jax_aat.tiled_attention(*wide, is_causal=True, implementation=implementation)


def relative_errors(out: jax.Array, exact: jax.Array) -> jax.Array:
    """||out - exact|| / ||exact|| of every head of [B, T, N, H], then of all heads, [N + 1]."""
    error, norm = (jnp.sum(x**2, (0, 1, 3)) for x in (out.astype(jnp.float32) - exact, exact))
    error, norm = (jnp.append(x, x.sum()) for x in (error, norm))
    return jnp.sqrt(error / norm)
