"""Vulkan devices: which there are, which is used, what ran on it last."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

try:
    from jax_aat import _native
except ImportError:
    _NO_NATIVE = (
        "the native module of jax_aat is missing or was built for another Python: install the "
        "package (in a clone: pip install -e .) rather than import it from its sources"
    )
else:
    _NO_NATIVE = ""

MAX_HEAD_DIM = 256
DTYPES = ("float32", "bfloat16", "float16")
SWITCH = "JAX_AAT_DISABLE"
"""Environment variable; 1 or true switches the custom calls off."""

_OTHERWISE = "or use implementation='xla'"
_ON, _OFF = ("1", "true"), ("", "0", "false")
_HARDWARE = ("discrete", "integrated", "virtual")
_NVIDIA = 0x10DE  # vendor id of the PCI registry

# When the package is imported, so that an exported function that calls a target finds it.
# XLA knows the CUDA platform by its name in capitals only.
for _platform, _name in () if _NO_NATIVE else (("cpu", "cpu"), ("cuda", "CUDA")):
    for _target, _handler in _native.registrations(_platform).items():
        jax.ffi.register_ffi_target(_target, _handler, platform=_name)


@dataclass(frozen=True)
class Device:
    """A Vulkan device.

    Attributes:
      index: Position in `devices`; what `set_default_device` takes.
      name: As the driver gives it.
      kind: 'discrete', 'integrated', 'virtual', 'cpu' or 'other'.
      uuid: Identity of the device across APIs, hexadecimal.
      driver: Name and version of the driver.
      api_version: Highest version of Vulkan.
      features: Optional features and extensions that decide which kernels run, and whether the
        device has them.
      traits: Sizes and capabilities that kernels are planned by.
      missing: What this package requires and the device lacks; empty: it can be used.
    """

    index: int
    name: str
    kind: str
    uuid: str
    driver: str
    api_version: str
    features: Mapping[str, bool]
    traits: Mapping[str, Any]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Dispatch:
    """What one custom call ran on a Vulkan device.

    Attributes:
      sequence: Counts the calls of the process, from 1.
      direction: 'forward', 'tangent', 'backward' or 'plan'.
      path: Family of kernels: 'portable' or 'coopmat' (cooperative matrices).
      platform: Platform of JAX that called: 'cpu' or 'cuda'.
      device: Name of the Vulkan device.
      kernels: Shaders in the order of their dispatches.
      kernel_flops: Floating-point operations of each kernel's matrix products, two for a
        multiplication and addition, over the pairs of query and key that causality and window
        leave; what lengths, segments and masks hide is counted. 0 for kernels without products, NaN
        for those of adaptive calls, whose pairs the device chooses: ask for a report.
      imported_bytes: Operands and results used where they lay.
      staged_bytes: Operands and results that were copied.
      kernel_milliseconds: Time of each kernel by the device's timestamps; None unless `set_timing`
        was on for kernels.
      elapsed_milliseconds: Time from the start of the first kernel to the end of the last;
        None likewise.
    """

    sequence: int
    direction: str
    path: str
    platform: str
    device: str
    kernels: tuple[str, ...]
    kernel_flops: tuple[float, ...]
    imported_bytes: int
    staged_bytes: int
    kernel_milliseconds: tuple[float, ...] | None
    elapsed_milliseconds: float | None

    def __str__(self) -> str:
        kernels = ", ".join(self.kernels)
        return f"{self.direction} by Vulkan on {self.device}, {self.path} kernels: {kernels}"


def has_matrices(traits: Mapping[str, Any], dtype: str) -> bool:
    """Whether kernels multiply matrices of a dtype on a device of these traits."""
    if not (traits.get("coopmat_layout_known") or traits.get("coopmat_relays")):
        return False
    return bool(traits.get(f"coopmat_{dtype}"))


def devices() -> tuple[Device, ...]:
    """Every Vulkan device, what it can do and what it lacks; empty without a Vulkan loader."""
    if _NO_NATIVE:
        return ()
    return tuple(
        Device(
            index=device["index"],
            name=device["name"],
            kind=device["kind"],
            uuid=device["uuid"],
            driver=f"{device['driver_name']} {device['driver_info']}".strip(),
            api_version=device["api_version"],
            features=MappingProxyType(device["features"]),
            traits=MappingProxyType(device["traits"]),
            missing=tuple(device["missing"]),
        )
        for device in _native.devices()
    )


def default_device() -> Device | None:
    """The device that calls of JAX's CPU platform use; None where no device can be used.

    The environment variable JAX_AAT_DEVICE chooses it, by index or by a part of its name, and
    `set_default_device` changes it. Those of JAX's CUDA platform run on the GPU that holds their
    operands, whichever is the default; where there are several, `memory_stats`, profiles and
    estimates speak of that GPU only if it is.
    """
    if _NO_NATIVE:
        return None
    index = _native.default_device()
    return None if index is None else devices()[index]


def set_default_device(device: Device | int) -> None:
    """Makes later calls of this process use a device of `devices`, given itself or by index.

    A call runs on the device that is the default when it runs, not when it was traced.

    Raises:
      RuntimeError: There is no native module, or the device lacks something.
      ValueError: There is no device of this index.
    """
    require_native()
    _native.set_default_device(device.index if isinstance(device, Device) else device)


def last_dispatch() -> Dispatch | None:
    """What the latest custom call of this process ran; None before the first.

    Calls that XLA computes (implementation='xla') leave no trace here. Results that JAX has not
    computed yet have not run: wait for them with `jax.block_until_ready` first.
    """
    record = None if _NO_NATIVE else _native.last_dispatch()
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
        kernel_flops=tuple(record["flops"]),
        imported_bytes=record["imported_bytes"],
        staged_bytes=record["staged_bytes"],
        kernel_milliseconds=None if times is None else tuple(times),
        elapsed_milliseconds=record["elapsed_milliseconds"],
    )


def set_timing(enabled: bool, *, by_kernel: bool = True) -> None:
    """Times later calls by timestamps of the device, or no longer.

    Args:
      enabled: Whether to time them.
      by_kernel: Whether to time each kernel, for which it waits for the one before it; else only
        the call as a whole, which then runs as it does untimed.

    Raises:
      RuntimeError: There is no native module, or a profile is being taken.
    """
    require_native()
    _native.set_timing(enabled, by_kernel)


@dataclass(frozen=True)
class KernelStatistics:
    """What the driver's compiler tells of a kernel.

    Attributes:
      kernel: Shader module.
      specialization: Its constants, by index (shaders/common/specialization.glsl).
      values: By the driver's own names: registers, shared memory, spills and the like.
    """

    kernel: str
    specialization: tuple[int, ...]
    values: Mapping[str, float]


def kernel_statistics(device: Device | int | None = None) -> tuple[KernelStatistics, ...]:
    """Statistics of all kernels that this process has run on a device.

    Each is compiled once more, as drivers keep none otherwise. Empty where the device lacks
    VK_KHR_pipeline_executable_properties or ran nothing.

    Args:
      device: One of `devices`, itself or its index; None: the default one.

    Raises:
      RuntimeError: Vulkan cannot be used.
      ValueError: There is no such device.
    """
    return tuple(
        KernelStatistics(kernel, tuple(specialization), MappingProxyType(values))
        for kernel, specialization, values in _native.kernel_statistics(find_device(device).index)
    )


def find_device(device: Device | int | None) -> Device:
    """The device that is meant; None: the default one.

    Raises:
      RuntimeError: Vulkan cannot be used.
      TypeError: It is neither a device nor an index.
      ValueError: There is no such device.
    """
    if device is None:
        default = default_device()
        if default is None:
            raise RuntimeError(problem())
        return default
    try:
        index = device.index if isinstance(device, Device) else operator.index(device)
    except TypeError:
        raise TypeError(
            f"device must be a jax_aat.Device, its index or None, not {device!r}"
        ) from None
    known = devices()
    if not 0 <= index < len(known):
        raise ValueError(
            f"device must be one of the {len(known)} devices of jax_aat.devices(), counted from 0, "
            f"not {index}"
        )
    return known[index]


def problem() -> str:
    """Why Vulkan cannot be used and what to do about it; empty where it can."""
    switch = os.environ.get(SWITCH, "")
    if switch.lower() in _ON:
        return f"{SWITCH}={switch} switches Vulkan off: unset it"
    if switch.lower() not in _OFF:
        return f"{SWITCH}={switch} is none of 1, true, 0 and false: correct or unset it"
    return _NO_NATIVE or _native.problem()


def require_native() -> None:
    """Raises RuntimeError, in words, where there is no native module."""
    if _NO_NATIVE:
        raise RuntimeError(_NO_NATIVE)


def _unfit(dtype: Any, head_dim: int) -> TypeError | ValueError | None:
    """The error of a query that shaders do not serve on any device; None: they do."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return TypeError(
            f"query: got {name}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]} with "
            f"implementation='vulkan': convert the operands, {_OTHERWISE}"
        )
    if head_dim > MAX_HEAD_DIM:
        return ValueError(
            f"query: got a head_dim of {head_dim}, expected at most {MAX_HEAD_DIM} with "
            f"implementation='vulkan', {_OTHERWISE}"
        )
    return None


def _wants_vulkan() -> bool:
    """Whether the environment names a device without the switch, or has one that says nothing."""
    switch = os.environ.get(SWITCH, "").lower()
    if switch in _OFF:
        return bool(os.environ.get("JAX_AAT_DEVICE"))
    return switch not in _ON


def choose_implementation(implementation: str | None, dtype: Any, head_dim: int) -> str:
    """The implementation that calls get, 'vulkan' or 'xla', however short they are.

    Args:
      implementation: The one asked for; None: Vulkan where a hardware GPU serves the call, which
        may still leave a short one to XLA (`jax_aat.primitives.rules.BY_SIZE`).
      dtype: Of the query.
      head_dim: Of the query.

    Raises:
      TypeError: Vulkan was asked for and does not serve the dtype.
      ValueError: Vulkan was asked for and does not serve the head_dim.
      RuntimeError: Vulkan was asked for and cannot be used; says why.
    """
    if implementation == "xla":
        return "xla"
    unfit = _unfit(dtype, head_dim)
    if implementation == "vulkan":
        if unfit is not None:
            raise unfit
        if reason := problem():
            raise RuntimeError(
                f"implementation='vulkan' cannot be used: {reason.rstrip('.')}; {_OTHERWISE}"
            )
        return "vulkan"
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu") or unfit is not None:
        return "xla"
    if reason := problem():
        if _wants_vulkan():
            # Whoever names a device wants it: that it is not used must not go unnoticed. What calls
            # `tiled_attention` is three frames up.
            words = f"jax_aat leaves attention to XLA: {reason}"
            warnings.warn(words, RuntimeWarning, stacklevel=4)
        return "xla"
    # A call on JAX's CUDA platform runs on the CUDA device, which NVIDIA's Vulkan driver must show.
    if backend == "gpu" and all(device["vendor_id"] != _NVIDIA for device in _native.devices()):
        return "xla"
    device = default_device()
    return "vulkan" if device is not None and device.kind in _HARDWARE else "xla"
