"""Weights of a trained model, and the held-out text, as files of bounded size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flax.traverse_util as trees
import jax
import jax.numpy as jnp
import numpy as np
from model import Shape

_SHARD_BYTES = 14_000_000
_FACTS = "facts"
"""Entry of the first shard: JSON of what is known of the model."""


def save_weights(folder: Path, seed: int, params: Any, shape: Shape, facts: dict[str, Any]) -> None:
    """Writes parameters in float16, in as many files as keep each under 14 MB."""
    flat = trees.flatten_dict(jax.device_get(params), sep="/")
    arrays = {name: np.asarray(array, np.float16) for name, array in flat.items()}
    shards: list[dict[str, np.ndarray]] = []
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].nbytes):
        fits = (
            s for s in shards if sum(x.nbytes for x in s.values()) + array.nbytes < _SHARD_BYTES
        )
        if (shard := next(fits, None)) is None:
            shards.append(shard := {})
        shard[name] = array
    shards[0][_FACTS] = np.array(json.dumps({"shape": asdict(shape), "seed": seed, **facts}))
    for index, shard in enumerate(shards):
        np.savez(folder / f"weights-{seed}-{index}of{len(shards)}.npz", **shard)


def load_weights(folder: Path, seed: int) -> tuple[Any, Shape]:
    """Reads parameters as float32, and the sizes of their model.

    Raises:
      FileNotFoundError: No such model, or a file of it is missing.
    """
    files = sorted(folder.glob(f"weights-{seed}-*of*.npz"))
    if not files or len(files) != int(files[0].stem.rpartition("of")[2]):
        raise FileNotFoundError(f"the weights of seed {seed} are not complete in {folder}")
    flat: dict[str, jax.Array] = {}
    for file in files:
        with np.load(file) as shard:
            if _FACTS in shard:
                facts = json.loads(str(shard[_FACTS]))
            names = [name for name in shard.files if name != _FACTS]
            flat |= {name: jnp.asarray(shard[name], jnp.float32) for name in names}
    return trees.unflatten_dict(flat, sep="/"), Shape(**facts["shape"])


def save_held_out(folder: Path, held_out: np.ndarray) -> None:
    """Writes the held-out bytes that evaluation reads: it then needs no other text."""
    np.savez_compressed(folder / "held-out.npz", text=held_out)


def load_held_out(folder: Path) -> np.ndarray:
    """Reads what `save_held_out` wrote, uint8 [bytes]."""
    with np.load(folder / "held-out.npz") as saved:
        return saved["text"]


def windows_of(texts: np.ndarray, length: int) -> np.ndarray:
    """[windows, length + 1], as each byte predicts the next; the first of every text first."""
    starts = range(0, texts.shape[1] - length, length)
    return np.concatenate([texts[:, start : start + length + 1] for start in starts])
