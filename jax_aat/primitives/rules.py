"""What the primitives share: binding, abstract values, lowering, batching, derivatives.

Every primitive takes its operands in slot order and has at least these parameters: `slots` (which
operands those are), `options`, `implementation` ('xla', 'vulkan' or `BY_SIZE`) and `needs_devices`
(see `devices_marker`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_aat._compat import result_aval, vary_like
from jax_aat.primitives.partition import partitioned
from jax_aat.primitives.vulkan_call import vulkan_call
from jax_aat.problem import EMPTY_LOGSUMEXP, Operands, Options, Slot, by_slot, extents
from jax_aat.promotion import may_promote
from jax_aat.tiled_xla import TILE
from jax_aat.tiles import sum_to

BY_SIZE = "by size"
"""Vulkan, but for calls of no more than `SHORT_CALLS` and `SHORT_STEPS`, which XLA computes."""
SHORT_CALLS = {"cuda": 2**23}
"""By platform: pairs of a query row and a key up to which XLA is the faster (docs/performance.md).
Each call hands over from CUDA to Vulkan and back, which takes as long as so many pairs by XLA."""
SHORT_STEPS = 8
"""Steps, one after another, up to which it is: each takes some 0.05 ms, however few its pairs."""


def lowered_platform() -> str:
    """The platform that JAX computes on, by the name that it is lowered for."""
    backend: str = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


ResultTypes = Callable[..., dict[Slot, jax.ShapeDtypeStruct]]
"""(operands or their abstract values, **params) -> shapes and dtypes of the results, in order."""


def _new_primitive(name: str, *static_argnames: str) -> Primitive:
    """A primitive with several results that runs its own jitted lowering."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    static = ("slots", "options", "implementation", "needs_devices", *static_argnames)
    jitted = jax.jit(primitive.bind, static_argnames=static)

    def impl(*values: Any, **params: Any) -> Any:
        # There is nothing to run step by step, wherever users ask for that.
        with jax.disable_jit(False):
            return jitted(*values, **params)

    primitive.def_impl(impl)
    return primitive


# All are made here because the rules of each bind another; most have the names of the custom calls'
# targets.
forward_p = _new_primitive("jax_aat_forward")
tangent_p = _new_primitive("jax_aat_tangent")
backward_p = _new_primitive("jax_aat_backward", "results", "dbias_shape")
plan_p = _new_primitive("jax_aat_plan", "results", "adaptation")
planned_forward_p = _new_primitive("jax_aat_planned_forward", "results", "adaptation")


def bind(primitive: Primitive, operands: Operands, **params: Any) -> list[Any]:
    """Binds a primitive to operands named by slot."""
    slots = tuple(sorted(operands))
    values = [operands[slot] for slot in slots]
    # Under shard_map all must vary over the same mesh axes; the transpose of this sums a gradient
    # over the axes that the operand itself does not vary over.
    return list(primitive.bind(*(vary_like(x, values) for x in values), slots=slots, **params))


def register_abstract_eval(primitive: Primitive, result_types: ResultTypes) -> None:
    """Registers shapes and dtypes."""

    def abstract_eval(*avals: Any, slots: Sequence[int], **params: Any) -> list[Any]:
        types = result_types(by_slot(slots, avals), **params)
        return [result_aval(avals[0], t.shape, t.dtype) for t in types.values()]

    primitive.def_abstract_eval(abstract_eval)


def register_lowering(
    primitive: Primitive,
    tiled: Callable[..., Sequence[jax.Array]],
    result_types: ResultTypes,
    target: str | None = None,
    in_parts: Callable[[Operands], bool] = lambda _: False,
) -> None:
    """Registers the tiled algorithm for all platforms and the custom call where it exists.

    Args:
      primitive: The primitive.
      tiled: (operands, options, ...) -> results in jax.numpy.
      result_types: Shapes and dtypes of the results.
      target: That of the custom call; None: the primitive's name.
      in_parts: Of which operands the custom call serves a part of the pass only: `tiled` does the
        rest, and is given the primitive as `attend`.
    """

    def lower(platform: str | None) -> Any:
        def run(
            *values: jax.Array,
            slots: Sequence[int],
            implementation: str,
            needs_devices: Any,
            **params: Any,
        ) -> Sequence[jax.Array]:
            operands = by_slot(slots, values)
            types = result_types(operands, **params)
            if _is_empty(values):
                return [_nothing_to_attend_to(slot, t) for slot, t in types.items()]
            if platform is None or implementation == "xla":
                return tiled(operands, **params)
            if implementation == BY_SIZE and _is_short(operands, platform):
                return tiled(operands, **params)
            if in_parts(operands):
                kept = {"implementation": implementation, "needs_devices": needs_devices}

                def attend(operands: Operands, options: Options, **others: Any) -> list[Any]:
                    return bind(primitive, operands, options=options, **others, **kept)

                return tiled(operands, attend=attend, **params)
            call = functools.partial(vulkan_call, target or primitive.name, params["options"])
            mesh = jax.typeof(values[0]).sharding.mesh
            if mesh.manual_axes and mesh.auto_axes:
                # Inside a shard_map over some of the axes only; nothing can be said about the rest.
                return call(operands, types)
            return partitioned(call, operands, types)

        return mlir.lower_fun(may_promote(run), multiple_results=True)

    mlir.register_lowering(primitive, lower(None))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, lower(platform), platform=platform)


def _is_short(operands: Operands, platform: str) -> bool:
    """Whether XLA computes a call faster; of symbolic sizes it is not known."""
    sizes = extents(operands)
    rows = (*sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    if not all(isinstance(size, int) for size in rows):
        return False
    steps = math.ceil(sizes.queries / TILE[0]) * math.ceil(sizes.keys / TILE[1])
    return math.prod(rows) <= SHORT_CALLS.get(platform, 0) and steps <= SHORT_STEPS


def _is_empty(values: Iterable[Any]) -> bool:
    """Whether a call has an axis of size 0."""
    return any(0 in x.shape for x in values)


def _nothing_to_attend_to(slot: Slot, result: jax.ShapeDtypeStruct) -> jax.Array:
    """Result of a call with no query or no key."""
    return jnp.full(result.shape, EMPTY_LOGSUMEXP if slot is Slot.LSE else 0, result.dtype)


def no_tangent(x: Any) -> Any:
    """The tangent of a result that nothing moves."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def register_batching(primitive: Primitive) -> None:
    """Registers vmap: one more batch axis, of size 1 for operands that are not mapped."""

    def batch(
        args: Sequence[Any], dims: Sequence[int | None], **params: Any
    ) -> tuple[list[Any], list[int]]:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        values = [
            jnp.expand_dims(x, 0) if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(args, dims, strict=True)
        ]
        if params.get("dbias_shape"):
            params["dbias_shape"] = (size, *params["dbias_shape"])
        results = primitive.bind(*values, **params)
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batch


def _tiled(
    tiled: Callable[..., Sequence[jax.Array]],
    operands: Operands,
    *,
    implementation: str,
    needs_devices: Any,
    **params: Any,
) -> list[jax.Array]:
    """Calls a pass in jax.numpy to differentiate it, whatever the primitive's implementation."""
    return list(tiled(operands, differentiable=True, **params))


def register_linear(
    primitive: Primitive,
    tiled: Callable[..., Sequence[jax.Array]],
    linear: Sequence[Slot],
    transposed: Callable[..., dict[Slot, Any]],
) -> None:
    """Registers JVP and transpose of a primitive that is linear in some operands.

    Args:
      primitive: The primitive.
      tiled: (operands, options, ...) -> results in jax.numpy; differentiated in the other operands.
      linear: Slots in which the primitive is linear.
      transposed: (other operands, cotangents of the results, abstract values of the operands whose
        cotangents are wanted, **params) -> these, with all batch axes.
    """

    @may_promote
    def jvp(
        primals: Sequence[Any], tangents: Sequence[Any], *, slots: Sequence[int], **params: Any
    ) -> tuple[list[Any], list[Any]]:
        operands = by_slot(slots, primals)
        moving = {s: t for s, t in by_slot(slots, tangents).items() if type(t) is not ad.Zero}
        along = {slot: t for slot, t in moving.items() if slot in linear}
        across = {slot: t for slot, t in moving.items() if slot not in linear}
        results = bind(primitive, operands, **params)
        derivative = [no_tangent(x) for x in results]
        if along:
            fixed = {slot: x for slot, x in operands.items() if slot not in linear}
            terms = bind(primitive, fixed | along, **params)
            derivative = [jnp.broadcast_to(t, x.shape) for t, x in zip(terms, results, strict=True)]
        # Nothing moves what has no query or no key.
        if across and not _is_empty(primals):
            _, terms = jax.jvp(
                lambda some: _tiled(tiled, operands | some, **params),
                ({slot: operands[slot] for slot in across},),
                (across,),
            )
            derivative = [ad.add_tangents(d, t) for d, t in zip(derivative, terms, strict=True)]
        return results, derivative

    def transpose(
        cotangents: Sequence[Any], *args: Any, slots: Sequence[int], **params: Any
    ) -> list[Any]:
        operands = by_slot(slots, args)
        wanted = {s: x.aval for s, x in operands.items() if ad.is_undefined_primal(x)}
        known = {slot: x for slot, x in operands.items() if slot not in linear}
        if all(type(ct) is ad.Zero for ct in cotangents):
            return [ad.Zero(wanted[s]) if s in wanted else None for s in operands]
        results = transposed(known, cotangents, wanted, **params)
        return [sum_to(results[s], wanted[s].shape) if s in wanted else None for s in operands]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
