"""Attentions of PyTorch, each restricted to one implementation, so that no other can run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blocks import Blocks, blocks_of
from passes import Array, Measured, SkippedError

import jax_aat
from jax_aat.adaptation import Adaptation
from jax_aat.attention import Implementation
from jax_aat.commands.contenders import Case, Direction


def torch_pass(
    case: Case,
    arrays: list[Array],
    direction: Direction,
    attend: Callable[[Any, Any, Any], Any],
    path: str,
    device: str = "cuda",
) -> Measured:
    """A pass of a function of q, k, v [B, N, T, H], tensors, that gives the output likewise."""
    import torch

    if direction == "tangent":
        raise SkippedError("PyTorch is not compared in forward mode")
    backward = direction == "backward"
    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SkippedError("PyTorch has no CUDA device")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()

    def to_device(x: Array) -> Any:
        tensor = torch.from_numpy(x).to(device, getattr(torch, case.dtype)).transpose(1, 2)
        return tensor.detach().requires_grad_(backward)

    query, key, value = (to_device(x) for x in arrays[:3])
    cotangent = to_device(arrays[3]) if backward else None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []

    def start() -> Any:
        for event in events[:1]:
            event.record()
        out = attend(query, key, value)
        results = (out,)
        if backward:
            results += torch.autograd.grad(out, (query, key, value), cotangent)
        for event in events[1:]:
            event.record()
        results = tuple(x.detach().transpose(1, 2) for x in results)
        return results if backward else results[0]

    def wait(results: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        return results

    def device_milliseconds() -> float | None:
        if not on_gpu:
            return None
        wait(start())
        return events[0].elapsed_time(events[1])

    def memory() -> tuple[int, str] | None:
        if not on_gpu:
            return None
        return torch.cuda.max_memory_allocated() - allocated, "peak of PyTorch's allocator"

    def as_float32(part: Any) -> Array:
        return part.float().cpu().numpy()

    return Measured(start, wait, as_float32, lambda: path, device_milliseconds, memory=memory)


def sdpa(backend: str, case: Case, arrays: list[Array], direction: Direction) -> Measured:
    """`scaled_dot_product_attention`, restricted to one backend."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    restricted = partial(sdpa_kernel, [getattr(SDPBackend, backend)])

    def attend(query: Any, key: Any, value: Any) -> Any:
        with restricted():
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads
            )

    return torch_pass(case, arrays, direction, attend, f"torch {backend}")


def flex(
    size: int,
    budget: float,
    case: Case,
    arrays: list[Array],
    direction: Direction,
    implementation: Implementation = "vulkan",
) -> Measured:
    """FlexAttention over the blocks that hold the exact granules of this package's plan.

    The plan, the blocks and the mask are made before, and are not timed. Its backward kernels take
    blocks of 128 only. On a processor it has no backward pass.
    """
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = _blocks(size, budget, case, arrays, implementation)
    torch._dynamo.reset()  # else it stops compiling for new shapes after a few
    # Not compiled it would compute all blocks. A graph that cannot be compiled as a whole raises.
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options: dict[str, Any] | None = None
    if device == "cuda":
        options = {"BACKEND": "TRITON"}  # raises if it cannot be used
        if size < 128:  # else its kernel has tiles of 128, into which smaller blocks do not fit
            options |= {"fwd_BLOCK_M": size, "fwd_BLOCK_N": size}
    made = partial(
        attend,
        block_mask=block_mask(blocks, case, device),
        enable_gqa=case.heads != case.kv_heads,
        kernel_options=options,
    )
    path = (
        f"FlexAttention by {'Triton' if options else 'C++'}, blocks of {size} x {size} with "
        f"{blocks.times_the_plan:.3g} times the pairs of the plan's exact granules, without coarse "
        "rows; plan and mask not timed"
    )
    measured = torch_pass(case, arrays, direction, made, path, device)
    facts = {
        "relative_flops": blocks.relative_flops,
        "pairs_over_plan": blocks.times_the_plan,
        "budget": budget,
    }
    return Measured(**(vars(measured) | {"facts": lambda: facts}))


def block_mask(blocks: Blocks, case: Case, device: str) -> Any:
    """The `BlockMask` of blocks; those that the causal diagonal cuts are masked pair by pair."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(used: Array) -> tuple[Any, Any]:
        """Number of blocks of each row, and their columns first, [B, N, rows(, columns)]."""
        found = torch.from_numpy(used.astype(np.uint8)).to(device)
        found = found.repeat_interleave(blocks.heads_of_list, dim=1)
        columns = torch.argsort(found, dim=-1, descending=True, stable=True)
        return found.sum(-1, dtype=torch.int32), columns.to(torch.int32).contiguous()

    def causal(b: Any, h: Any, query: Any, key: Any) -> Any:
        return query >= key

    return BlockMask.from_kv_blocks(
        *ordered(blocks.cut),
        *ordered(blocks.full),
        BLOCK_SIZE=blocks.size,
        mask_mod=causal if case.causal else None,
        seq_lengths=(case.queries, case.keys),
    )


def release_memory() -> None:
    """Gives what PyTorch keeps of device memory back, if it is in use at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _blocks(
    size: int, budget: float, case: Case, arrays: list[Array], implementation: Implementation
) -> Blocks:
    choose = partial(
        jax_aat.plan_tiles,
        adaptation=Adaptation(budget=budget),
        is_causal=case.causal,
        implementation=implementation,
    )
    plan = jax.jit(choose)(*(jnp.asarray(x, case.dtype) for x in arrays[:3]))
    return blocks_of(plan, size)
