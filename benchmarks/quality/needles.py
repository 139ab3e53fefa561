"""Needles: sentences with a code in them, hidden in a text and asked for later."""

from __future__ import annotations

import numpy as np

NAME_BYTES, CODE_BYTES = 6, 8
_BEFORE, _BETWEEN, _AFTER = b"\n# The code of ", b" is ", b".\n"
PROMPT_BYTES = len(_BEFORE) + NAME_BYTES + len(_BETWEEN)
SENTENCE_BYTES = PROMPT_BYTES + CODE_BYTES + len(_AFTER)


def sentence(generator: np.random.Generator) -> np.ndarray:
    """Returns a needle, uint8 [SENTENCE_BYTES]; its code begins at byte PROMPT_BYTES."""
    name = generator.integers(ord("a"), ord("z") + 1, NAME_BYTES, np.uint8).tobytes()
    code = generator.integers(ord("0"), ord("9") + 1, CODE_BYTES, np.uint8).tobytes()
    return np.frombuffer(_BEFORE + name + _BETWEEN + code + _AFTER, np.uint8)


def hide(windows: np.ndarray, share: float, pairs: int, generator: np.random.Generator) -> None:
    """Writes needles, each twice, over random places of a share of windows [count, bytes].

    A model that is trained on them learns to fetch a code from any distance.
    """
    for window in windows[generator.random(len(windows)) < share]:
        slots = len(window) // SENTENCE_BYTES
        places = generator.choice(slots, (min(pairs, slots // 2), 2), replace=False)
        for pair in places * SENTENCE_BYTES:
            needle = sentence(generator)
            for place in pair:
                window[place : place + SENTENCE_BYTES] = needle
