"""The JAX primitives of attention: forward, tangent and backward."""

from jax_aat.primitives import backward, tangent
from jax_aat.primitives.forward import forward
from jax_aat.primitives.rules import BY_SIZE

__all__ = ["BY_SIZE", "backward", "forward", "tangent"]
