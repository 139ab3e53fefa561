"""What a benchmark of speed knows of a contender beside what the package's own command does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import jax_aat
from jax_aat.commands.contenders import Case, Direction, Pass

Array = np.ndarray[Any, Any]
Memory = tuple[int, str] | None
"""Bytes of device memory and what tells them."""


class SkippedError(RuntimeError):
    """A contender is left out of a case; says why."""


def _dense() -> dict[str, Any]:
    return {"relative_flops": 1.0}


@dataclass(frozen=True)
class Measured(Pass):
    """A pass of which more is known once it has run.

    Attributes:
      facts: Further fields of its row; `relative_flops` is the FLOPs of one forward pass over those
        of exact attention, planning included.
      memory: The most device memory that it took: operands, results and all between.
    """

    facts: Callable[[], dict[str, Any]] = _dense
    memory: Callable[[], Memory] = lambda: None


Maker = Callable[[Case, list[Array], Direction], Measured]
"""Makes a pass of a case from q, k, v and dout, as far as the direction takes them."""


def watch_memory() -> Callable[[int | None, Callable[[], object] | None], Memory]:
    """Begins to watch what JAX and this package's Vulkan runtime take of the device.

    XLA's allocator keeps its peak for the life of the process. Where it did not rise, there is what
    XLA's own analysis of the program says; that is without the scratch that XLA lends to a custom
    call, which a profile of one more call tells. All are without what Vulkan takes for itself,
    which is read from its pools, emptied here.

    Returns:
      A function of the bytes by XLA's analysis and what runs the program once and waits for it, if
      it calls this package's Vulkan runtime.
    """
    jax_aat.trim_memory()
    before = _allocator()

    def read(analysed: int | None, run: Callable[[], object] | None) -> Memory:
        after = _allocator()
        found, source = analysed or 0, "XLA's analysis"
        if after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0):
            measured = after["peak_bytes_in_use"] - before["bytes_in_use"]
            if measured > found:
                found, source = measured, "peak of XLA's allocator"
        if run is not None:
            pools = jax_aat.memory_stats().total.reserved_bytes
            if source == "XLA's analysis":
                with jax_aat.profile() as profile:
                    run()
                lent = max((call.lent_bytes for call in profile.calls), default=0)
                found += lent
                source += ", scratch lent" if lent else ""
            found += pools
            source += " and Vulkan's pools"
        return (found, source) if found else None

    return read


def device_room() -> int | None:
    """Bytes of device memory that JAX may take; None where it does not tell."""
    return _allocator().get("bytes_limit")


def _allocator() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}
