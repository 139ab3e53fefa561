"""How a custom call splits over a mesh: by batch and by heads, without gathering.

Queries decide. Key/value heads are split as query heads are where the shards divide them; where a
key/value head spans several shards, each takes the one it reads from replicated keys and values,
and their gradients are summed over the shards. Heads that would straddle are replicated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    Sharding,
    get_abstract_mesh,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

from jax_aat.problem import KV_LIKE, LISTS, Extents, Operands, Slot, by_slot, extents

Results = dict[Slot, jax.ShapeDtypeStruct]
Call = Callable[[Operands, Results], Sequence[jax.Array]]
AxisNames = tuple[Any, ...]


def partitioned(call: Call, operands: Operands, results: Results) -> Sequence[jax.Array]:
    """Runs `call(operands, results)`, on every shard with its own part of both.

    Args:
      call: Computes results of the given shapes and dtypes.
      operands: Arrays by slot.
      results: Shapes and dtypes by slot.
    """
    slots, wanted = tuple(operands), tuple(results)
    sizes = extents(operands)
    shapes = {slot: x.shape for slot, x in operands.items()}
    shapes |= {slot: t.shape for slot, t in results.items()}
    ambient = get_abstract_mesh()

    @custom_partitioning
    def function(*values: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(call(by_slot(slots, values), results))

    def partition(mesh: Mesh, args: Any, outs: Any) -> Any:
        if mesh.empty:
            mesh = _mesh_of_call(args[0].sharding, args[0].shape, ambient)
        specs = {
            slot: _spec(mesh, x.sharding, x.shape) for slot, x in zip(slots, args, strict=True)
        }
        split = _Split.following_queries(mesh, sizes, shapes, specs)
        shardings = {slot: NamedSharding(mesh, split.spec(slot)) for slot in shapes}
        local_results = {
            slot: jax.ShapeDtypeStruct(shardings[slot].shard_shape(t.shape), t.dtype)
            for slot, t in results.items()
        }

        def on_shard(*values: jax.Array) -> tuple[jax.Array, ...]:
            # What is traced here belongs to one device, whatever mesh the caller has set.
            with use_abstract_mesh(AbstractMesh((), ())):
                return split.run(call, by_slot(slots, values), local_results)

        out_shardings = tuple(shardings[slot] for slot in wanted)
        return mesh, on_shard, out_shardings, tuple(shardings[slot] for slot in slots)

    function.def_partition(
        partition=partition,
        # The compiler may choose shardings that no PartitionSpec can say, which JAX would refuse.
        decode_shardings=False,
        sharding_rule=lambda *_: _sharding_rule(sizes, shapes, slots, wanted),
    )
    return tuple(function(*operands.values()))


@functools.cache
def devices_marker() -> Any:
    """A jaxpr with a partitioned call in it.

    As a parameter of a primitive it lets JAX know, before it lowers the primitive to such a call,
    that the lowering must know the devices.
    """
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(partition=lambda mesh, args, out: (mesh, identity, out, args))
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((), jnp.float32))


def _sharding_rule(
    sizes: Extents, shapes: Mapping[Slot, Any], slots: Sequence[Slot], wanted: Sequence[Slot]
) -> str:
    """Which axes are split alike, in the einsum-like notation of `custom_partitioning`."""

    def factors(slot: Slot) -> str:
        names = [f"{slot.name.lower()}{axis}" for axis in range(len(shapes[slot]))]
        for axis in range(len(sizes.batch)):
            if shapes[slot][axis] != 1:
                names[axis] = f"batch{axis}"
        head = slot.head_axis
        if head is not None and shapes[slot][head] != 1:
            # Those of grouped queries are no factor of the others: part of a mesh axis would then
            # split the key/value heads, which no PartitionSpec can say.
            # Neither are chunks of query heads: there are fewer of them.
            grouped = slot in KV_LIKE and sizes.groups > 1
            names[head] = "chunks" if slot in LISTS else "kvheads" if grouped else "heads"
        return " ".join(names)

    left, right = (", ".join(map(factors, some)) for some in (slots, wanted))
    return f"{left} -> {right}"


def _spec(mesh: Mesh, sharding: Sharding, shape: tuple[int, ...]) -> P:
    """The mesh axes that split the axes of an array, found from where its parts lie.

    An axis that is split in a way that mesh axes cannot express counts as not split.
    """
    parts = sharding.devices_indices_map(shape)
    devices = list(mesh.devices.flat)
    entries: list[AxisNames | None] = []
    for axis, size in enumerate(shape):
        starts = np.array([parts[device][axis].start or 0 for device in devices])
        starts = starts.reshape(mesh.devices.shape)
        strides = {
            name: np.diff(starts, axis=i).max(initial=0) for i, name in enumerate(mesh.shape)
        }
        split = [name for name, stride in strides.items() if stride > 0]
        names = tuple(sorted(split, key=lambda name: -strides[name]))
        entries.append(None)
        if names and size % _count(mesh, names) == 0:
            candidate = NamedSharding(mesh, P(*[None] * axis, names)).devices_indices_map(shape)
            if all(candidate[device][axis] == parts[device][axis] for device in devices):
                entries[axis] = names
    return P(*entries)


def _mesh_of_call(sharding: Sharding, shape: tuple[int, ...], ambient: AbstractMesh) -> Mesh:
    """The mesh of a call none of whose arrays names one: what `jax.set_mesh` has set, if it fits.

    JAX then tells of the devices by the shardings alone.
    """
    devices = np.array(list(sharding.devices_indices_map(shape)))
    if ambient.size == devices.size:
        return Mesh(devices.reshape(ambient.axis_sizes), ambient.axis_names)
    return Mesh(devices, ("devices",))


def _count(mesh: Mesh, names: AxisNames) -> int:
    """Number of parts that mesh axes split an axis into."""
    return math.prod(mesh.shape[name] for name in names)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How one call is split.

    Attributes:
      mesh: The mesh.
      sizes: Sizes of the call before splitting.
      shapes: Shapes of operands and results before splitting.
      batch: Mesh axes over which each batch axis is split.
      heads: Mesh axes over which the query heads are split.
    """

    mesh: Mesh
    sizes: Extents
    shapes: Mapping[Slot, tuple[int, ...]]
    batch: tuple[AxisNames, ...]
    heads: AxisNames

    @classmethod
    def following_queries(
        cls, mesh: Mesh, sizes: Extents, shapes: Mapping[Slot, Any], specs: Mapping[Slot, P]
    ) -> "_Split":
        """Splits as the queries lie; along batch axes that they lack, as another operand."""
        taken: set[Any] = set()

        def claim(entry: Any, size: int) -> AxisNames:
            names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            if taken & set(names) or size % _count(mesh, names):
                return ()
            taken.update(names)
            return names

        # One lambda, which all heads of a batch entry together decide, serves them all.
        # A plan is made where there is a goal, or prices are a result.
        makes_plan = bool(specs.keys() & {Slot.SPARE_ROWS, Slot.LAMBDA}) or (
            Slot.PRICES in shapes.keys() - specs.keys()
        )
        heads = () if makes_plan else claim(specs[Slot.Q][-2], sizes.heads)
        batch = []
        for axis, size in enumerate(sizes.batch):
            entries = (spec[axis] for slot, spec in specs.items() if shapes[slot][axis] == size)
            batch.append(claim(next((e for e in entries if e is not None), None), size))
        split = cls(mesh, sizes, shapes, tuple(batch), heads)
        straddles = sizes.groups % (sizes.heads // split.head_shards) != 0
        # The transposed lists of a key/value head name query tiles of all its heads.
        whole = split.kv_replicated and (straddles or Slot.LEVELS in shapes)
        return dataclasses.replace(split, heads=()) if whole else split

    @property
    def head_shards(self) -> int:
        """Number of parts of the query heads."""
        return _count(self.mesh, self.heads)

    @property
    def kv_replicated(self) -> bool:
        """Whether several shards read the same key/value head."""
        return self.sizes.kv_heads % self.head_shards != 0

    def spec(self, slot: Slot) -> P:
        """How an operand or result is split."""
        shape = self.shapes[slot]
        entries: list[Any] = [None] * len(shape)
        for axis, names in enumerate(self.batch):
            if shape[axis] != 1:
                entries[axis] = names or None
        head = slot.head_axis
        if head is not None and shape[head] != 1 and not (slot in KV_LIKE and self.kv_replicated):
            entries[head] = self.heads or None
        return P(*entries)

    def run(self, call: Call, operands: Operands, results: Results) -> tuple[jax.Array, ...]:
        """Computes the results of one shard."""
        kv_results = [slot for slot in results if slot in KV_LIKE]
        called = results
        if self.kv_replicated:
            first = lax.axis_index(self.heads) * (self.sizes.heads // self.head_shards)
            kv_head = first // self.sizes.groups
            operands = {
                slot: lax.dynamic_slice_in_dim(x, kv_head, 1, x.ndim - 2) if slot in KV_LIKE else x
                for slot, x in operands.items()
            }
            called = results | {slot: _one_head(results[slot]) for slot in kv_results}
        values = dict(zip(results, call(operands, called), strict=True))
        if self.kv_replicated:
            for slot in kv_results:
                whole = jnp.zeros(results[slot].shape, results[slot].dtype)
                values[slot] = lax.dynamic_update_slice_in_dim(
                    whole, values[slot], kv_head, whole.ndim - 2
                )
        return tuple(self._sum_over_shards(slot, x) for slot, x in values.items())

    def _sum_over_shards(self, slot: Slot, x: jax.Array) -> jax.Array:
        """Sums a gradient over the shards that hold a part of it."""
        names: AxisNames = ()
        if slot in (Slot.DK, Slot.DV) and self.kv_replicated:
            names = self.heads
        elif slot is Slot.DBIAS:
            split = (*self.batch, self.heads)
            sizes = self.shapes[slot][: len(split)]
            names = sum((part for part, size in zip(split, sizes, strict=True) if size == 1), ())
        return lax.psum(x, names) if names else x


def _one_head(t: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*t.shape[:-2], 1, t.shape[-1]), t.dtype)
