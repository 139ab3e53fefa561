"""The attentions that are compared: JAX's, which the package brings, and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jax_aat.commands.contenders import Case, Pass, jax_nn, ours


def torch_sdpa(backend: str, case: Case, arrays: list[np.ndarray], backward: bool) -> Pass:
    """PyTorch's scaled_dot_product_attention, restricted to one backend: no other can run."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def to_device(x: np.ndarray) -> Any:
        tensor = torch.from_numpy(x).to("cuda", getattr(torch, case.dtype)).transpose(1, 2)
        return tensor.detach().requires_grad_(backward)

    query, key, value, cotangent = (to_device(x) for x in arrays)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    restricted = partial(sdpa_kernel, [getattr(SDPBackend, backend)])

    def start() -> Any:
        begin.record()
        with restricted():
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads
            )
        results = (out,)
        if backward:
            results += torch.autograd.grad(out, (query, key, value), cotangent)
        end.record()
        results = tuple(x.detach().transpose(1, 2) for x in results)
        return results if backward else results[0]

    def wait(results: Any) -> Any:
        torch.cuda.synchronize()
        return results

    def device_milliseconds() -> float:
        wait(start())
        return begin.elapsed_time(end)

    return Pass(
        start,
        wait,
        lambda part: part.float().cpu().numpy(),
        lambda: f"torch {backend}",
        device_milliseconds,
    )


CONTENDERS: dict[str, Callable[[Case, list[np.ndarray], bool], Pass]] = {
    "jax_aat": ours,
    "jax.nn cudnn": partial(jax_nn, "cudnn"),
    "jax.nn xla": partial(jax_nn, "xla"),
    "torch flash": partial(torch_sdpa, "FLASH_ATTENTION"),
    "torch cudnn": partial(torch_sdpa, "CUDNN_ATTENTION"),
}
