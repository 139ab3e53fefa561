"""The attentions of JAX that benchmarks compare, each as functions that run one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat import vulkan
from jax_aat.adaptation import Adaptation
from jax_aat.attention import Implementation, tiled_attention
from jax_aat.problem import count_pairs
from jax_aat.reference import dense_attention, relative_error

Array = np.ndarray[Any, Any]
Direction = Literal["forward", "tangent", "backward"]
"""What a pass computes; the second and the third have a forward pass before their own."""
NAMES: dict[Direction, tuple[str, ...]] = {
    "forward": ("out",),
    "tangent": ("out", "tangent"),
    "backward": ("out", "dq", "dk", "dv"),
}
"""What a pass gives."""


@dataclass(frozen=True)
class Case:
    """One problem: q [batch, queries, heads, head_dim], k, v [batch, keys, kv_heads, head_dim]."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool
    dtype: str

    def floating_point_operations(self) -> float:
        """Operations of the forward pass: two products, each 2 a visible score and feature."""
        pairs = self.batch * self.heads * count_pairs(self.queries, self.keys, self.causal)
        return 4.0 * pairs * self.head_dim

    def arrays(self, seed: int) -> list[Array]:
        """Query, key, value and the cotangent of the output: standard normal, float32."""
        generator = np.random.default_rng(seed)
        query = (self.batch, self.queries, self.heads, self.head_dim)
        key = (self.batch, self.keys, self.kv_heads, self.head_dim)
        return [generator.standard_normal(x, np.float32) for x in (query, key, key, query)]

    def operands(self, arrays: list[Array], direction: Direction) -> list[Array]:
        """What a pass takes of query, key, value and cotangent; tangents are standard normal."""
        if direction == "tangent":
            return arrays[:3] + self.arrays(seed=1)[:3]
        return arrays[: 4 if direction == "backward" else 3]


@dataclass(frozen=True)
class Pass:
    """A pass that is ready to be run.

    Attributes:
      start: Starts one and returns what to wait for: out, or several as `NAMES` has them.
      wait: Returns when that has been computed.
      as_float32: Turns a part of a result into a float32 array of NumPy.
      path: What computes it, read from what was compiled or has run.
      device_milliseconds: Runs one and returns the time that the device spent on it by its own
        timestamps; None where there are none.
      memory_bytes: Device memory of operands, results and temporaries, by XLA's own analysis of
        what it compiled; None where it has none. What kernels take for themselves is not in it.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    as_float32: Callable[[Any], Array]
    path: Callable[[], str]
    device_milliseconds: Callable[[], float | None]
    memory_bytes: int | None = None


class WrongPathError(RuntimeError):
    """Something other than what is to be measured would run."""


def with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the function of q, k, v and the cotangent that gives (out, dq, dk, dv)."""

    def run(query: Any, key: Any, value: Any, cotangent: Any) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(attention, query, key, value)
        return out, *backward(cotangent)

    return run


def with_tangent(attention: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the function of q, k, v and their tangents that gives (out, tangent of out)."""
    return lambda *operands: jax.jvp(attention, operands[:3], operands[3:])


def reference(case: Case, arrays: list[Array]) -> list[Array]:
    """Out, dq, dk, dv of the first key/value head of the first batch entry, computed in float32.

    The operands are rounded to the dtype of the case first, so the errors are those of the
    computation. Shapes [1, length, heads a key/value head or 1, head_dim].
    """

    def exact(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dense_attention(query, key, value, is_causal=case.causal)[0]

    group = case.heads // case.kv_heads
    first = [x[:1, :, :heads] for x, heads in zip(arrays, (group, 1, 1, group), strict=True)]
    rounded = [jnp.asarray(x, case.dtype).astype(jnp.float32) for x in first]
    return [np.asarray(x) for x in jax.jit(with_gradients(exact))(*rounded)]


def errors(case: Case, made: Pass, results: Any, expected: list[Array]) -> dict[str, float]:
    """Relative errors of what a pass gave against `reference`, by name."""
    group = case.heads // case.kv_heads
    found = results if isinstance(results, tuple) else (results,)
    return {
        name: relative_error(made.as_float32(x[:1, :, : group if name in ("out", "dq") else 1]), e)
        for name, x, e in zip(NAMES["backward"], found, expected, strict=False)
    }


def ours(
    case: Case,
    arrays: list[Array],
    direction: Direction,
    implementation: Implementation = "vulkan",
    adaptation: Adaptation | None = None,
) -> Pass:
    """`jax_aat.tiled_attention`."""
    attention = partial(
        tiled_attention,
        is_causal=case.causal,
        implementation=implementation,
        adaptation=adaptation,
    )
    operands = [jnp.asarray(x, case.dtype) for x in case.operands(arrays, direction)]
    start, text, memory = compile_pass(attention, operands, direction)
    if ('custom_call_target="jax_aat_' in text) != (implementation == "vulkan"):
        raise WrongPathError(f"jax_aat did not compile to {implementation}")
    if implementation == "xla":
        return jax_pass(start, "jax_aat xla", memory)

    def path() -> str:
        last = vulkan.last_dispatch()
        if last is None or last.direction != direction:
            raise WrongPathError(f"expected a {direction} pass by Vulkan, the last one was {last}")
        return f"Vulkan {last.path}, {last.platform} platform: {' '.join(last.kernels)}"

    # Only the last dispatch can be asked: that of the direction, then that of a forward pass.
    timed = [(start, 1)]
    if direction != "forward":
        timed = [(start, 2), (compile_pass(attention, operands[:3], "forward").start, 1)]

    def device_milliseconds() -> float | None:
        total = 0.0
        for run, dispatches in timed:
            before = _sequence()
            vulkan.set_timing(True, by_kernel=False)
            try:
                jax.block_until_ready(run())
            finally:
                vulkan.set_timing(False)
            last = vulkan.last_dispatch()
            if last is None or last.elapsed_milliseconds is None:
                return None
            if last.sequence != before + dispatches:
                return None  # The plan was made by a call of its own.
            total += last.elapsed_milliseconds
        return total

    return Pass(start, jax.block_until_ready, _float32, path, device_milliseconds, memory)


def jax_nn(implementation: Any, case: Case, arrays: list[Array], direction: Direction) -> Pass:
    """`jax.nn.dot_product_attention` by ``cudnn`` or ``xla``."""
    attention = partial(
        jax.nn.dot_product_attention, is_causal=case.causal, implementation=implementation
    )
    operands = [jnp.asarray(x, case.dtype) for x in case.operands(arrays, direction)]
    start, text, memory = compile_pass(attention, operands, direction)
    if ("__cudnn$fmha" in text) != (implementation == "cudnn"):
        raise WrongPathError(f"jax.nn.dot_product_attention did not compile to {implementation}")
    return jax_pass(start, f"jax.nn {implementation}", memory)


class CompiledPass(NamedTuple):
    """A pass that XLA has compiled.

    Attributes:
      start: Starts it.
      text: What was compiled.
      memory_bytes: As that of `Pass`.
    """

    start: Callable[[], Any]
    text: str
    memory_bytes: int | None


def compile_pass(
    attention: Callable[..., jax.Array], operands: list[jax.Array], direction: Direction
) -> CompiledPass:
    """Compiles an attention of q, k, v for the operands of a direction."""
    function: Callable[..., Any] = attention
    if direction != "forward":
        function = (with_tangent if direction == "tangent" else with_gradients)(attention)
    compiled = jax.jit(function).lower(*operands).compile()
    memory = compiled.memory_analysis()
    parts = ("argument", "output", "temp")
    total = memory and sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)
    return CompiledPass(partial(compiled, *operands), compiled.as_text() or "", total)


def jax_pass(start: Callable[[], Any], path: str, memory_bytes: int | None) -> Pass:
    """A pass of JAX that has no timestamps of its own."""
    return Pass(start, jax.block_until_ready, _float32, lambda: path, lambda: None, memory_bytes)


def _float32(part: jax.Array) -> Array:
    return np.asarray(part.astype(jnp.float32))


def _sequence() -> int:
    last = vulkan.last_dispatch()
    return 0 if last is None else last.sequence
