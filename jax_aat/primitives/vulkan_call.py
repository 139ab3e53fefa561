"""The custom calls into the C++ runtime, as `docs/architecture.md` fixes them."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from jax_aat.primitives.batch_axes import BatchAxes
from jax_aat.problem import Operands, Options, Slot, broadcast_batch

MAX_BATCH_AXES = 4


def vulkan_call(
    target: str,
    options: Options,
    operands: Operands,
    results: Mapping[Slot, jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Calls a target of the runtime.

    Args:
      target: Name under which the handler is registered.
      options: Scale, causality, window and soft cap.
      operands: Arrays by slot, none with an axis of size 0.
      results: Shapes and dtypes of the wanted results.

    Returns:
      The results, in the order of `results`.
    """
    batch = broadcast_batch(operands)
    shapes = [*(x.shape for x in operands.values()), *(t.shape for t in results.values())]
    axes = BatchAxes.merging(batch, shapes, MAX_BATCH_AXES)
    wanted = sorted(results)
    types = [
        jax.ShapeDtypeStruct(axes.merged_shape(results[slot].shape), results[slot].dtype)
        for slot in wanted
    ]
    values = jax.ffi.ffi_call(target, types)(
        *(axes.merge(operands[slot]) for slot in sorted(operands)),
        operands=_bits(operands),
        results=_bits(results),
        scale=np.float32(options.scale),
        soft_cap=np.float32(options.soft_cap),
        causal=np.int32(options.causal),
        window_left=np.int32(options.window[0]),
        window_right=np.int32(options.window[1]),
        query_tile=np.uint32(options.query_tile),
        super_tile=np.uint32(options.super_tile),
        level_count=np.uint32(options.level_count),
        candidate_share=np.float32(options.candidate_share),
        floor_share=np.float32(options.floor_share),
        judged_key_tiles=np.uint32(options.judged_key_tiles),
        list_capacity=np.uint32(options.list_capacity),
        corrects=np.uint32(options.corrects),
    )
    by_slot = dict(zip(wanted, values, strict=True))
    return [axes.restore(by_slot[slot], t.shape) for slot, t in results.items()]


def _bits(slots: Iterable[Slot]) -> np.uint64:
    return np.uint64(sum(1 << slot for slot in slots))
