"""Adaptive tiled attention for JAX, computed by Vulkan."""

from jax_aat.attention import tiled_attention

__all__ = ["tiled_attention"]
