"""Pallas attention for Hopper that comes with JAX: FlashAttention-3 by Mosaic GPU.

`jax.experimental.pallas.ops.gpu.attention_mgpu` has no scale, so queries are scaled before it, in
the same program. Some releases take float16 alone, and none has a causal backward pass: where the
dtype of the case fails, float16 is tried, and the path says so. Tiles are chosen by a few timed
calls at the first length, as the module leaves them to its user.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from passes import Array, SkippedError

from jax_aat.commands.contenders import (
    Case,
    Direction,
    Pass,
    WrongPathError,
    compile_pass,
    jax_pass,
)

_TILES = ((128, 2), (256, 2), (128, 4), (64, 4))
"""Keys of a tile and tiles in flight; queries come in two tiles of 64."""
_CALLS = 3
_chosen: dict[tuple[Any, ...], tuple[int, int]] = {}
"""Tiles that were the fastest at the first length of this run, by what they depend on else."""


def mosaic(case: Case, arrays: list[Array], direction: Direction) -> Pass:
    """Mosaic GPU attention with the fastest of a few tiles."""
    if jax.default_backend() != "gpu":
        raise SkippedError("Mosaic GPU needs a CUDA device")
    if direction == "tangent":
        raise SkippedError("Mosaic GPU attention has no forward mode")
    if direction == "backward" and case.causal:
        raise SkippedError("Mosaic GPU attention has no causal backward pass")
    failures = []
    for dtype in dict.fromkeys((case.dtype, "float16")):
        made = _fastest(dataclasses.replace(case, dtype=dtype), arrays, direction, failures)
        if made is not None:
            return made
    raise RuntimeError(f"Mosaic GPU attention: {failures[0]}")


def _fastest(
    case: Case, arrays: list[Array], direction: Direction, failures: list[str]
) -> Pass | None:
    operands = [jnp.asarray(x, case.dtype) for x in case.operands(arrays, direction)]
    best: tuple[float, Pass] | None = None
    kind = (case.head_dim, case.dtype, case.causal, direction)
    for keys, steps in [_chosen[kind]] if kind in _chosen else _TILES:
        try:
            made = _with_tiles(case, operands, direction, keys, steps)
            made.wait(made.start())
            began = time.perf_counter()
            for _ in range(_CALLS):
                last = made.start()
            made.wait(last)
            seconds = time.perf_counter() - began
        except Exception as error:
            failures.append(f"{case.dtype}, tiles of {keys} keys: {type(error).__name__}: {error}")
            # Only where a tile does not fit the memory of a multiprocessor may another one do.
            if "shared memory" in str(error) or "smem" in str(error).lower():
                continue
            break
        if best is None or seconds < best[0]:
            best = seconds, made
            _chosen[kind] = keys, steps
    return best and best[1]


def _with_tiles(
    case: Case, operands: list[jax.Array], direction: Direction, keys: int, steps: int
) -> Pass:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=keys,
        max_concurrent_steps=steps,
        causal=case.causal,
        **dict.fromkeys(("block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv"), 64),
    )

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        scaled = query * jnp.asarray(1 / math.sqrt(case.head_dim), query.dtype)
        return attention_mgpu.attention(scaled, key, value, config)

    start, text, memory = compile_pass(attention, operands, direction)
    if "mosaic_gpu" not in text:
        raise WrongPathError("Pallas attention did not compile to Mosaic GPU")
    path = f"Pallas Mosaic GPU in {case.dtype}, tiles of {keys} keys, {steps} in flight"
    return jax_pass(start, path, memory)
