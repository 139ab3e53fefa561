"""What a device can do at most, measured once and kept on disk."""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from jax_aat import vulkan

if TYPE_CHECKING:
    from jax_aat.profiling import KernelTime


@dataclass(frozen=True)
class Ceilings:
    """The roof of a roofline (Williams, Waterman and Patterson, CACM 52, 2009).

    Attributes:
      device: Name of the device.
      matrix_flops: FLOP/s by dtype of the operands, as the kernels of that dtype multiply: by
        cooperative matrices where kernels use those of the device, else in float32. From
        registers, which no kernel that reads memory reaches.
      bandwidth: Bytes a second that a copy reads and writes.
    """

    device: str
    matrix_flops: Mapping[str, float]
    bandwidth: float


def ceilings(device: vulkan.Device | int | None = None, *, measure_again: bool = False) -> Ceilings:
    """Ceilings of a device; the first time they are measured, which takes about a second.

    They are kept beside the compiled pipelines (`JAX_AAT_CACHE_DIR`), by device and driver; where
    that cannot be written, a warning says so.

    Args:
      device: One of `jax_aat.devices()`, itself or its index; None: the default one.
      measure_again: Whether to measure in any case: a device that others used is remembered as
        slower than it is.

    Raises:
      RuntimeError: Vulkan cannot be used, or the device has no timestamps.
      ValueError: There is no such device.
    """
    chosen = vulkan.find_device(device)
    file = _file(chosen)
    if file is not None and file.exists() and not measure_again:
        # One that another process damaged is measured again.
        with suppress(ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text())
            flops = {dtype: float(kept["matrix_flops"][dtype]) for dtype in vulkan.DTYPES}
            return Ceilings(chosen.name, MappingProxyType(flops), float(kept["bandwidth"]))
    measured = _measure(chosen)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            kept = {"matrix_flops": dict(measured.matrix_flops), "bandwidth": measured.bandwidth}
            part.write_text(json.dumps(kept))
            part.replace(file)
        except OSError as error:
            warnings.warn(f"ceilings are not kept on disk: {error}", stacklevel=2)
    return measured


def _file(device: vulkan.Device) -> Path | None:
    """Where its ceilings by these shaders are kept; None where no folder is to be had."""
    from jax_aat import _native

    pipelines = _native.cache_path()
    if not pipelines:
        return None
    driver, shaders = zlib.crc32(device.driver.encode()), Path(pipelines).stem.rpartition("-")[2]
    return Path(pipelines).parent / f"{device.uuid}-{driver:08x}-{shaders}.ceilings.json"


def _measure(device: vulkan.Device) -> Ceilings:
    from jax_aat import _native

    measured = cast(dict[str, float], _native.measure_ceilings(device.index))
    # Read again: measuring has probed what the device does not tell.
    traits = vulkan.devices()[device.index].traits
    flops = dict.fromkeys(vulkan.DTYPES, measured["products"])
    for dtype in ("float16", "bfloat16"):
        if vulkan.has_matrices(traits, dtype):
            flops[dtype] = measured[f"{dtype}_matrices"]
    return Ceilings(device.name, MappingProxyType(flops), measured["bandwidth"])


def rate(kernels: Sequence[KernelTime], what: str) -> float:
    """FLOPs ('flops') or bytes ('bytes') a second of the kernels of which they are known.

    NaN: they are known of none.
    """
    known = [(getattr(kernel, what), kernel.seconds) for kernel in kernels]
    known = [(amount, seconds) for amount, seconds in known if not math.isnan(amount)]
    seconds = sum(seconds for _, seconds in known)
    total: float = sum(amount for amount, _ in known)
    return total / seconds if seconds > 0 else math.nan
