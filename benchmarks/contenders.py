"""The attentions that are compared, each as functions of nothing that start one pass."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_aat


@dataclass(frozen=True)
class Case:
    """One problem: q [batch, length, heads, head_dim], k and v with kv_heads."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool
    dtype: str

    def floating_point_operations(self) -> float:
        """Operations of the forward pass: two products, each 2 a visible score and feature."""
        visible = self.length * (self.length + 1) / 2 if self.causal else self.length**2
        return 4.0 * self.batch * self.heads * visible * self.head_dim

    def arrays(self, seed: int) -> list[np.ndarray]:
        """Query, key, value and the cotangent of the output: standard normal, float32."""
        generator = np.random.default_rng(seed)
        query = (self.batch, self.length, self.heads, self.head_dim)
        key = (self.batch, self.length, self.kv_heads, self.head_dim)
        return [generator.standard_normal(x, np.float32) for x in (query, key, key, query)]


@dataclass(frozen=True)
class Pass:
    """A pass that is ready to be run.

    Attributes:
      start: starts one and returns what to wait for: out, or (out, dq, dk, dv).
      wait: returns when that has been computed.
      as_float32: turns a part of a result into a float32 array of NumPy.
      path: what computes it, read from what was compiled or has run.
      kernel_milliseconds: time the device spent on the last one that was waited for, or None.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    as_float32: Callable[[Any], np.ndarray]
    path: Callable[[], str]
    kernel_milliseconds: Callable[[], float | None]


class WrongPathError(RuntimeError):
    """Something other than what is to be measured would run."""


def with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the function of q, k, v and the cotangent that gives (out, dq, dk, dv)."""

    def run(query: Any, key: Any, value: Any, cotangent: Any) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(attention, query, key, value)
        return out, *backward(cotangent)

    return run


def reference(case: Case, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Out, dq, dk, dv of the first key/value head of the first batch entry, computed in float32.

    The operands are rounded to the dtype of the case first, so the errors are those of the
    computation. Shapes [length, heads a key/value head or 1, head_dim].
    """

    def naive(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        scores = product("tnh,skh->nts", query, key) / math.sqrt(case.head_dim)
        if case.causal:
            scores = jnp.where(jnp.tri(case.length, dtype=bool), scores, -jnp.inf)
        return product("nts,skh->tnh", jax.nn.softmax(scores), value)

    group = case.heads // case.kv_heads
    first = [x[0, :, : group if x.shape[2] == case.heads else 1] for x in arrays]
    rounded = [jnp.asarray(x, case.dtype).astype(jnp.float32) for x in first]
    return [np.asarray(x) for x in jax.jit(with_gradients(naive))(*rounded)]


def first_head(case: Case, name: str, result: Any) -> Any:
    """The part of a result [batch, length, heads, head_dim] that `reference` gives."""
    return result[0, :, : case.heads // case.kv_heads if name in ("out", "dq") else 1]


def jax_pass(attention: Callable[..., jax.Array], arrays: list[Any], backward: bool) -> Any:
    """Compiles a pass: (a function that starts one, the text of what was compiled)."""
    function = with_gradients(attention) if backward else attention
    operands = arrays if backward else arrays[:3]
    compiled = jax.jit(function).lower(*operands).compile()
    return partial(compiled, *operands), compiled.as_text()


def jax_float32(part: jax.Array) -> np.ndarray:
    """`Pass.as_float32` of JAX."""
    return np.asarray(part.astype(jnp.float32))


def ours(case: Case, arrays: list[np.ndarray], backward: bool) -> Pass:
    """`jax_aat.tiled_attention` by Vulkan.

    The kernel time of forward and backward is that of the backward kernels and the median of the
    forward kernels in ten calls before, as only the last dispatch can be asked.
    """
    attention = partial(jax_aat.tiled_attention, is_causal=case.causal, implementation="vulkan")
    operands = [jnp.asarray(x, case.dtype) for x in arrays]
    start, _ = jax_pass(attention, operands, backward)
    jax_aat.set_timing(True, by_kernel=False)
    forward_milliseconds = 0.0
    if backward:
        forward = ours(case, arrays, backward=False)
        times = []
        for _ in range(10):
            forward.wait(forward.start())
            times.append(forward.kernel_milliseconds() or 0.0)
        forward_milliseconds = statistics.median(times)

    def dispatch() -> jax_aat.Dispatch:
        last = jax_aat.last_dispatch()
        if last is None or last.direction != ("backward" if backward else "forward"):
            raise WrongPathError(f"expected Vulkan, its last dispatch was {last}")
        return last

    def path() -> str:
        return f"{dispatch().path}, {dispatch().platform} platform: {' '.join(dispatch().kernels)}"

    def kernel_milliseconds() -> float | None:
        elapsed = dispatch().elapsed_milliseconds
        return None if elapsed is None else forward_milliseconds + elapsed

    return Pass(start, jax.block_until_ready, jax_float32, path, kernel_milliseconds)


def jax_nn(implementation: str, case: Case, arrays: list[np.ndarray], backward: bool) -> Pass:
    """`jax.nn.dot_product_attention` by ``cudnn`` or ``xla``."""
    attention = partial(
        jax.nn.dot_product_attention, is_causal=case.causal, implementation=implementation
    )
    operands = [jnp.asarray(x, case.dtype) for x in arrays]
    start, text = jax_pass(attention, operands, backward)
    if ("__cudnn$fmha" in text) != (implementation == "cudnn"):
        raise WrongPathError(f"jax.nn.dot_product_attention did not compile to {implementation}")
    path = f"jax.nn {implementation}"
    return Pass(start, jax.block_until_ready, jax_float32, lambda: path, lambda: None)


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

    return Pass(
        start,
        wait,
        lambda part: part.float().cpu().numpy(),
        lambda: f"torch {backend}",
        lambda: begin.elapsed_time(end),
    )


CONTENDERS: dict[str, Callable[[Case, list[np.ndarray], bool], Pass]] = {
    "jax_aat": ours,
    "jax.nn cudnn": partial(jax_nn, "cudnn"),
    "jax.nn xla": partial(jax_nn, "xla"),
    "torch flash": partial(torch_sdpa, "FLASH_ATTENTION"),
    "torch cudnn": partial(torch_sdpa, "CUDNN_ATTENTION"),
}
