"""Needles: sentences with a code in them, hidden in a text and asked for later."""

from __future__ import annotations

import numpy as np

NAME_BYTES, CODE_BYTES = 6, 8
_BEFORE, _BETWEEN, _AFTER = b"\n# The code of ", b" is ", b".\n"
_LETTERS, _DIGITS = (ord("a"), ord("z") + 1), (ord("0"), ord("9") + 1)
PROMPT_BYTES = len(_BEFORE) + NAME_BYTES + len(_BETWEEN)
SENTENCE_BYTES = PROMPT_BYTES + CODE_BYTES + len(_AFTER)


def sentences(count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns needles, uint8 [count, SENTENCE_BYTES]; a code begins at byte PROMPT_BYTES."""
    blank = _BEFORE + bytes(NAME_BYTES) + _BETWEEN + bytes(CODE_BYTES) + _AFTER
    needles = np.tile(np.frombuffer(blank, np.uint8), (count, 1))
    name = slice(len(_BEFORE), len(_BEFORE) + NAME_BYTES)
    code = slice(PROMPT_BYTES, PROMPT_BYTES + CODE_BYTES)
    needles[:, name] = generator.integers(*_LETTERS, (count, NAME_BYTES), np.uint8)
    needles[:, code] = generator.integers(*_DIGITS, (count, CODE_BYTES), np.uint8)
    return needles


def hide(
    windows: np.ndarray, share: float, pairs: int, generator: np.random.Generator
) -> np.ndarray:
    """Writes needles, each twice, over random places of a share of windows [count, bytes].

    A model that is trained on them learns to fetch a code from any distance.

    Returns:
      Which bytes are of a code that has been seen before, bool [count, bytes].
    """
    count, length = windows.shape
    slots = length // SENTENCE_BYTES
    pairs = min(pairs, slots // 2)
    chosen = np.flatnonzero(generator.random(count) < share)
    order = generator.random((len(chosen), slots)).argsort(1)[:, : 2 * pairs]
    places = np.sort(order.reshape(-1, 2), axis=1) * SENTENCE_BYTES
    rows = np.repeat(chosen, pairs)[:, None]
    needles = sentences(len(rows), generator)
    repeated = np.zeros(windows.shape, bool)
    for place in places.T:
        windows[rows, place[:, None] + np.arange(SENTENCE_BYTES)] = needles
    code = PROMPT_BYTES + np.arange(CODE_BYTES)
    repeated[rows, places[:, 1:] + code] = True
    return repeated
