"""Text that every machine with Python has: sources and help topics of the standard library."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import numpy as np

_NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT_SHARE = 20


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out; no file is in both.

    Attributes:
      train: uint8 [bytes].
      held_out: uint8 [bytes].
      files: how many files (and help topics) they come from.
    """

    train: np.ndarray
    held_out: np.ndarray
    files: int


def load_text() -> Text:
    """Reads the standard library; every twentieth file, by a checksum of its name, is held out.

    The same Python gives the same text in the same order on every run.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*.py")
        if not _NOT_OURS.intersection(path.relative_to(root).parts)
    }
    documents |= {f"topic {name}": text.encode() for name, text in topics.topics.items()}
    train, held_out = [], []
    for name, content in sorted(documents.items()):
        side = train if zlib.crc32(name.encode()) % _HELD_OUT_SHARE else held_out
        side.append(content)
    return Text(_join(train), _join(held_out), len(documents))


def random_windows(text: np.ndarray, shape: tuple[int, int], seed: tuple[int, int]) -> np.ndarray:
    """Returns text [windows, bytes] = ``shape``, starting anywhere; the same for the same seed."""
    starts = np.random.default_rng(seed).integers(len(text) - shape[1] + 1, size=shape[0])
    return text[starts[:, None] + np.arange(shape[1])]


def spread_windows(text: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns text [windows, bytes] = ``shape``, at even distances."""
    starts = np.linspace(0, len(text) - shape[1], shape[0]).astype(int)
    return text[starts[:, None] + np.arange(shape[1])]


def byte_frequency_loss(text: Text) -> float:
    """Cross-entropy (nats a byte) of the held-out bytes under the frequencies of the others."""
    counts = np.bincount(text.train, minlength=256) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[text.held_out]))


def _join(documents: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(documents), np.uint8)
