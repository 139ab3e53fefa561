"""The texts of this machine: sources and documentation of Python and of its packages."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h"}
_DOCUMENTATION = Path("/usr/share/doc")
_SMALLEST, _LARGEST = 512, 400_000
_HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out; no file, and no copy of one, is on both sides.

    Attributes:
      train: uint8 [bytes].
      held_out: uint8 [bytes].
      files: how many files they come from.
    """

    train: np.ndarray
    held_out: np.ndarray
    files: int


def load_corpus(megabytes: float) -> Corpus:
    """Reads texts up to a size; a hash of a file's content decides on which side it is.

    Files stay in the order of their paths, so neighbours in the text are mostly of one package and
    there is something to gain from looking far back. Of several equal files one is kept.

    Args:
      megabytes: Upper bound of the size of both sides together. Beyond it, packages are left out
        by the hash of their name.
    """
    chosen: dict[bytes, tuple[Path, bytes]] = {}
    room = megabytes * 1e6
    for path in tqdm(_paths(), desc="texts", unit="file", mininterval=1.0, leave=False):
        content = _read(path)
        if content is None:
            continue
        digest = hashlib.sha256(content).digest()
        if digest in chosen:
            continue
        room -= len(content)
        if room < 0:
            break
        chosen[digest] = path, content
    train, held_out = [], []
    for digest, (_, content) in sorted(chosen.items(), key=lambda item: item[1][0]):
        side = held_out if digest[0] < 256 * _HELD_OUT_SHARE else train
        side.append(content)
    return Corpus(_join(train), _join(held_out), len(chosen))


def spread_windows(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """Returns text [count, length], at even distances.

    Raises:
      ValueError: The text is too short for that many windows that do not overlap.
    """
    if count * length > len(text):
        raise ValueError(f"{count} windows of {length} bytes need more than {len(text)} bytes")
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return text[starts[:, None] + np.arange(length)]


def _paths() -> list[Path]:
    """Files of this machine's Python, package by package, in an order made by a hash."""
    places = sysconfig.get_paths()
    roots = {Path(places[name]) for name in ("stdlib", "purelib", "platlib")} | {_DOCUMENTATION}
    packages = [package for root in roots if root.is_dir() for package in root.iterdir()]
    packages = [path for path in packages if path.name not in ("site-packages", "dist-packages")]
    packages.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
    return [path for package in packages for path in _texts(package)]


def _texts(package: Path) -> list[Path]:
    found = sorted(package.rglob("*")) if package.is_dir() else [package]
    return [path for path in found if path.suffix in _SUFFIXES]


def _read(path: Path) -> bytes | None:
    """The content of a text of ordinary size, else None."""
    try:
        if not _SMALLEST <= path.stat().st_size <= _LARGEST:
            return None
        content = path.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return None
    return None if b"\0" in content else content


def _join(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(texts), np.uint8)
