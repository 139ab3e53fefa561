"""What the pytrees of the package share: whether their arrays have values, and export."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export


def is_known(tree: Any) -> bool:
    """Whether the leaves of a pytree are arrays that have values, neither traced nor abstract."""
    return all(
        isinstance(x, jax.Array | np.ndarray | np.generic) and not isinstance(x, jax.core.Tracer)
        for x in jax.tree.leaves(tree)
    )


def exportable(
    kind: type,
    to_json: Callable[[tuple[Any, ...]], str] = json.dumps,
    of_json: Callable[[str], tuple[Any, ...]] = lambda text: tuple(json.loads(text)),
) -> None:
    """Lets `jax.export` write functions that take or return pytrees of a kind.

    Args:
      kind: Class of a pytree that `jax.tree_util.register_dataclass` knows.
      to_json: Writes the values of its fields that are no children, in their order.
      of_json: The inverse of `to_json`.
    """
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jax_aat.{kind.__name__}",
        serialize_auxdata=lambda fixed: to_json(fixed).encode(),
        deserialize_auxdata=lambda data: of_json(bytes(data).decode()),
    )
