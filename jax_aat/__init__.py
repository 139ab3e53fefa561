"""Adaptive tiled attention for JAX, computed by Vulkan."""

from jax_aat.attention import tiled_attention
from jax_aat.vulkan import (
    Device,
    Dispatch,
    default_device,
    devices,
    last_dispatch,
    set_default_device,
    set_timing,
)

__all__ = [
    "Device",
    "Dispatch",
    "default_device",
    "devices",
    "last_dispatch",
    "set_default_device",
    "set_timing",
    "tiled_attention",
]
