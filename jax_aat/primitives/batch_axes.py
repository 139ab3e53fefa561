"""Reduces the batch axes of a call to the few that the runtime's parameter block has room for.

Each vmap adds a batch axis, along which an operand that is not mapped has size 1. Neighbouring axes
along which every operand broadcasts alike are one axis to the runtime.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_aat.tiles import sum_to

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BatchAxes:
    """How batch axes are merged.

    Attributes:
      batch: The batch axes of the call.
      groups: For each axis after merging the (start, stop) of those before.
    """

    batch: Shape
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def merging(cls, batch: Shape, shapes: Sequence[Shape], limit: int) -> "BatchAxes":
        """Merges neighbours that broadcast alike, then the foremost until `limit` are left.

        Args:
          batch: The batch axes, broadcast over all operands.
          shapes: Those of all operands and results.
          limit: Number of axes allowed.
        """
        patterns = [tuple(shape[axis] == 1 for shape in shapes) for axis in range(len(batch))]
        groups: list[tuple[int, int]] = []
        group_pattern: tuple[bool, ...] | None = None
        for axis, pattern in enumerate(patterns):
            joins = batch[axis] == 1 or group_pattern is None or pattern == group_pattern
            if groups and joins:
                groups[-1] = (groups[-1][0], axis + 1)
            else:
                groups.append((axis, axis + 1))
                group_pattern = None
            if batch[axis] != 1:
                group_pattern = pattern
        while len(groups) > limit:
            groups[:2] = [(groups[0][0], groups[1][1])]
        return cls(batch, tuple(groups))

    def merged_shape(self, shape: Shape) -> Shape:
        """Shape of an operand or result with merged batch axes."""
        expanded = self._expanded_shape(shape)
        merged = tuple(math.prod(expanded[start:stop]) for start, stop in self.groups)
        return merged + shape[len(self.batch) :]

    def merge(self, x: jax.Array) -> jax.Array:
        """An operand with merged batch axes; copies it only if it broadcasts in part of a group."""
        return jnp.broadcast_to(x, self._expanded_shape(x.shape)).reshape(
            self.merged_shape(x.shape)
        )

    def restore(self, x: jax.Array, shape: Shape) -> jax.Array:
        """A result of `merged_shape(shape)` in `shape`, summed over what merging had expanded."""
        return sum_to(x.reshape(self._expanded_shape(shape)), shape)

    def _expanded_shape(self, shape: Shape) -> Shape:
        """`shape` where a group is either entirely of size 1 or entirely that of the batch."""
        expanded = list(shape)
        for start, stop in self.groups:
            if any(size != 1 for size in shape[start:stop]):
                expanded[start:stop] = self.batch[start:stop]
        return tuple(expanded)
