"""The JAX primitives of attention: forward, tangent and backward."""

from jax_aat.primitives import backward, tangent
from jax_aat.primitives.forward import forward

__all__ = ["backward", "forward", "tangent"]
