"""Adaptive tiled attention for JAX, computed by Vulkan."""

from jax_aat.adaptation import Adaptation
from jax_aat.attention import plan_tiles, tiled_attention
from jax_aat.audit import Audit
from jax_aat.estimation import Estimate, estimate
from jax_aat.insights import Insight
from jax_aat.memory import (
    MemoryStatistics,
    PoolStatistics,
    SharedStatistics,
    memory_stats,
    trim_memory,
)
from jax_aat.plan import TilePlan
from jax_aat.profiling import Profile, profile
from jax_aat.report import Report
from jax_aat.roofline import Ceilings, ceilings
from jax_aat.state import ResolutionState
from jax_aat.vulkan import (
    Device,
    Dispatch,
    KernelStatistics,
    default_device,
    devices,
    kernel_statistics,
    last_dispatch,
    set_default_device,
    set_timing,
)

__all__ = [
    "Adaptation",
    "Audit",
    "Ceilings",
    "Device",
    "Dispatch",
    "Estimate",
    "Insight",
    "KernelStatistics",
    "MemoryStatistics",
    "PoolStatistics",
    "Profile",
    "Report",
    "ResolutionState",
    "SharedStatistics",
    "TilePlan",
    "ceilings",
    "default_device",
    "devices",
    "estimate",
    "kernel_statistics",
    "last_dispatch",
    "memory_stats",
    "plan_tiles",
    "profile",
    "set_default_device",
    "set_timing",
    "tiled_attention",
    "trim_memory",
]
