"""What reaches beyond the API that every supported JAX shares."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.interpreters import partial_eval


def varying_axes(values: Iterable[Any]) -> frozenset[Any]:
    """Union of the manual mesh axes over which values vary inside `jax.shard_map`."""
    axes: frozenset[Any] = frozenset()
    for value in values:
        axes |= jax.typeof(value).mat.varying
    return axes


def vary_like(x: jax.Array, values: Iterable[Any]) -> jax.Array:
    """`x`, typed as varying over every mesh axis over which one of `values` does."""
    missing = varying_axes(values) - varying_axes([x])
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def result_aval(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Abstract value of a primitive's result that varies over the mesh axes that `like` does."""
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def register_dead_code(primitive: Any, rule: Callable[[list[bool], Any], Any]) -> None:
    """Registers what of an equation is left where only some of its results are used.

    Args:
      primitive: That of the equation.
      rule: (which results are used, equation) -> which operands are used, the equation that is
        left or None.
    """
    # From 0.12 on JAX also says which references live.
    partial_eval.dce_rules[primitive] = lambda used, *others: rule(used, others[-1])


def in_auto_mesh(function: Any, operands: Any, out_specs: Any) -> Any:
    """Calls `function(operands)` with every Explicit mesh axis turned into an Auto one.

    The compiler then propagates shardings through `function`, whose results get `out_specs`.
    """
    leaves = jax.tree.leaves(operands)
    mesh = next((m for m in (jax.typeof(x).sharding.mesh for x in leaves) if not m.empty), None)
    if mesh is None or not mesh.explicit_axes:
        return function(operands)
    shardings = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(mesh, spec),
        out_specs,
        is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
    )
    return jax.sharding.auto_axes(function, out_sharding=shardings)(operands)
