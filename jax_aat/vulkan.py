"""Vulkan devices: which there are, which is used, what ran on it last."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

try:
    from jax_aat import _native
except ImportError as error:
    raise ImportError(
        "the native module of jax_aat is missing or was built for another Python: install the "
        "package (in a clone: pip install .) rather than import it from its sources"
    ) from error

MAX_HEAD_DIM = 256
DTYPES = ("float32", "bfloat16", "float16")
SWITCH = "JAX_AAT_VULKAN"
"""Environment variable; 0 switches the custom calls off."""

_HARDWARE = ("discrete", "integrated", "virtual")

for _platform in ("cpu", "cuda"):
    for _target, _handler in _native.registrations(_platform).items():
        jax.ffi.register_ffi_target(_target, _handler, platform=_platform)


@dataclass(frozen=True)
class Dispatch:
    """What one custom call ran on a Vulkan device.

    Attributes:
      sequence: Counts the calls of the process, from 1.
      direction: 'forward', 'tangent' or 'backward'.
      path: Family of kernels: 'portable' or 'coopmat' (cooperative matrices).
      platform: Platform of JAX that called: 'cpu' or 'cuda'.
      device: Name of the Vulkan device.
      kernels: Shaders in the order of their dispatches.
      imported_bytes: Operands and results used where they lay.
      staged_bytes: Operands and results that were copied.
      kernel_milliseconds: Time of each kernel by the device's timestamps; None unless `set_timing`
        was on. Kernels with no barrier between them overlap, and so do their times.
      elapsed_milliseconds: Time from the start of the first kernel to the end of the last;
        None likewise.
    """

    sequence: int
    direction: str
    path: str
    platform: str
    device: str
    kernels: tuple[str, ...]
    imported_bytes: int
    staged_bytes: int
    kernel_milliseconds: tuple[float, ...] | None
    elapsed_milliseconds: float | None

    def __str__(self) -> str:
        kernels = ", ".join(self.kernels)
        return f"{self.direction} by Vulkan on {self.device}, {self.path} kernels: {kernels}"


def devices() -> list[_native.Device]:
    """Every Vulkan device, what it can do and what it lacks; empty without a Vulkan loader."""
    return _native.devices()


def default_device() -> _native.Device | None:
    """The device that calls use; None where no device can be used.

    The environment variable JAX_AAT_DEVICE chooses it, by index or by a part of its name, and
    `set_default_device` changes it.
    """
    index = _native.default_device()
    return None if index is None else devices()[index]


def set_default_device(index: int) -> None:
    """Makes later calls use the device of that index in `devices`."""
    _native.set_default_device(index)


def last_dispatch() -> Dispatch | None:
    """What the latest custom call of this process ran; None before the first.

    Calls that XLA computes (implementation='xla') leave no trace here. Results that JAX has not
    computed yet have not run: wait for them with `jax.block_until_ready` first.
    """
    record = _native.last_dispatch()
    if record is None:
        return None
    times = record["kernel_milliseconds"]
    return Dispatch(
        sequence=record["sequence"],
        direction=record["pass"],
        path=record["path"],
        platform=record["platform"],
        device=record["device"],
        kernels=tuple(record["shaders"]),
        imported_bytes=record["imported_bytes"],
        staged_bytes=record["staged_bytes"],
        kernel_milliseconds=None if times is None else tuple(times),
        elapsed_milliseconds=record["elapsed_milliseconds"],
    )


def set_timing(enabled: bool) -> None:
    """Times the kernels of later calls by timestamps of the device, or no longer."""
    _native.set_timing(enabled)


def problem() -> str:
    """Why Vulkan cannot be used and what to do about it; empty where it can."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches Vulkan off: unset it"
    return _native.problem()


def unserved(dtype: Any, head_dim: int) -> str:
    """Why Vulkan does not serve such calls, in words; empty where it does."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"it serves {', '.join(DTYPES)}, not {name}: convert the operands"
    if head_dim > MAX_HEAD_DIM:
        return f"it serves a head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
    return problem()


def choose_implementation(implementation: str | None, dtype: Any, head_dim: int) -> str:
    """The implementation that a call gets, 'vulkan' or 'xla'.

    Args:
      implementation: The one asked for; None: Vulkan where a hardware GPU serves the call.
      dtype: Of the query.
      head_dim: Of the query.

    Raises:
      RuntimeError: Vulkan was asked for and cannot serve the call; says why.
    """
    if implementation == "xla":
        return "xla"
    reason = unserved(dtype, head_dim)
    if implementation == "vulkan":
        if reason:
            raise RuntimeError(
                f"implementation='vulkan' cannot be used: {reason}; or use implementation='xla'"
            )
        return "vulkan"
    if reason or jax.default_backend() not in ("cpu", "gpu"):
        return "xla"
    device = default_device()
    return "vulkan" if device is not None and device["kind"] in _HARDWARE else "xla"
