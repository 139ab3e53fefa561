"""Vulkan devices: which there are, which is used, what ran on it last."""

from typing import Any

MAX_HEAD_DIM = 256


def problem() -> str | None:
    """Why Vulkan cannot be used, in words; None: it can."""
    return "the native module is missing"


def choose_implementation(implementation: str | None, dtype: Any, head_dim: int) -> str:
    """The implementation that a call gets, 'vulkan' or 'xla'."""
    if implementation is None:
        return "xla"
    return implementation
