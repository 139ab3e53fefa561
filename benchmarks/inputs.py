"""What is attended to: noise, clusters, or the operands of a language model.

- ``noise``: all standard normal. Attention is spread over all keys alike, which is the hardest case
  for everything that leaves keys out.
- ``clustered``: runs of 64 positions about one of 32 topics, drawn at random. Keys and values are
  the centre of their topic plus noise of a standard deviation of 0.5, queries the same with the
  centre of the key/value head that they share; centres are standard normal. As in
  `docs/adaptation.md`.
- ``model``: query, key and value of one layer of a model of `benchmarks/quality`, either
    - of its weights, a folder that `quality/train.py` or `train_retrieval.py` has written: the
      windows of its held-out text are joined to one text, which starts again from its beginning
      where it is too short, and the model itself, with exact attention, reads as much of it as the
      length asks for. Positions are the true ones; beyond the contexts of training (32,768 bytes)
      the model extrapolates. A model attends in every layer as it does to a long text, so this is
      the one to prefer;
    - or of a file that `quality/capture.py` has written. Where it is too short, what it holds is
      repeated as if the text were: the rotation by position (RoPE) is undone, the rows are
      repeated, and each is rotated for the position that it now has. Rotated rows repeated as they
      are would tell a query that the copies of a key are equally far away, or ahead of it. Rows of
      the copies do not know of earlier copies, as those that a model computes would.
  Entries of a batch begin at even distances in the text. The loss of a model is not at hand, so
  the cotangent of the output is standard normal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from passes import Array

from jax_aat.commands.contenders import Case

KINDS = ("noise", "clustered", "model")
_TOPICS, _RUN, _NOISE = 32, 64, 0.5


def make(kind: str, case: Case, source: Path | None = None, layer: int = 0) -> list[Array]:
    """Query, key, value and the cotangent of the output, float32; the same ones at every call.

    Args:
      kind: One of `KINDS`.
      case: The sizes; as many queries as keys.
      source: For a model: the folder of its weights or a file of captured operands.
      layer: The layer, where the source is a folder.

    Raises:
      ValueError: The source does not fit the case, or there is none.
    """
    if kind == "noise":
        return case.arrays(seed=0)
    generator = np.random.default_rng(0)
    if kind == "clustered":
        made = _clustered(case, generator)
    elif source is None:
        raise ValueError("operands of a model need a folder of weights or a captured file")
    elif source.is_dir():
        made = _of_weights(case, source, layer)
    else:
        made = _of_file(case, source)
    return [*made, generator.standard_normal(made[0].shape, np.float32)]


def _clustered(case: Case, generator: np.random.Generator) -> list[Array]:
    centres = generator.standard_normal((_TOPICS, case.kv_heads, case.head_dim), np.float32)
    runs = generator.integers(_TOPICS, size=(case.batch, -(-case.keys // _RUN)))
    centre = centres[np.repeat(runs, _RUN, axis=1)[:, : case.keys]]

    def about(x: Array) -> Array:
        noise = generator.standard_normal(x.shape, np.float32)
        noise *= _NOISE
        noise += x
        return noise

    query = about(np.repeat(centre, case.heads // case.kv_heads, axis=2))
    return [query, about(centre), about(centre)]


def _of_weights(case: Case, folder: Path, layer: int) -> list[Array]:
    _find_quality()
    from capture import capture_qkv
    from storage import load_held_out, load_weights

    seed = int(sorted(folder.glob("weights-*-0of*.npz"))[0].name.split("-")[1])
    params, shape = load_weights(folder, seed)
    _require_heads(case, (shape.heads, shape.kv_heads, shape.head_dim))
    text = load_held_out(folder).reshape(-1)
    entries = []
    for start in _starts(case, len(text)):
        window = np.take(text, start + np.arange(case.keys + 1), mode="wrap")
        captured = capture_qkv(shape, params, window)
        entries.append([np.asarray(x[layer], np.float32) for x in captured])
    return [np.stack(x) for x in zip(*entries, strict=True)]


def _of_file(case: Case, path: Path) -> list[Array]:
    with np.load(path) as file:
        q, k, v = (file[name].astype(np.float32) for name in "qkv")
        base = float(file["rope_base"]) if "rope_base" in file else None
    _require_heads(case, (q.shape[1], k.shape[1], q.shape[2]))
    starts = _starts(case, len(q))
    if len(q) >= case.keys and case.batch == 1:
        return [x[None, : case.keys] for x in (q, k, v)]
    if base is None:
        raise ValueError(f"{path} is too short and does not tell its RoPE: capture it again")

    def extended(x: Array) -> Array:
        at = np.stack([(start + np.arange(case.keys)) % len(x) for start in starts])
        return x[at]

    if base == 0:
        return [extended(x) for x in (q, k, v)]
    q, k = (_rotated(x[None], base, -1.0)[0] for x in (q, k))
    return [_rotated(extended(q), base), _rotated(extended(k), base), extended(v)]


def _rotated(x: Array, base: float, turn: float = 1.0) -> Array:
    _find_quality()
    from model import rotate

    return np.array(rotate(x, base, turn))


def _starts(case: Case, length: int) -> list[int]:
    """Where the entries of a batch begin in a text."""
    return [entry * length // case.batch for entry in range(case.batch)]


def _require_heads(case: Case, found: tuple[Any, ...]) -> None:
    expected = (case.heads, case.kv_heads, case.head_dim)
    if found != expected:
        raise ValueError(
            "the model has {} heads over {} of size {}, the case {} over {} of size {}".format(
                *found, *expected
            )
        )


def _find_quality() -> None:
    folder = str(Path(__file__).parent / "quality")
    if folder not in sys.path:
        sys.path.append(folder)
