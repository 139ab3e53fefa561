"""``python -m jax_aat selftest``: whether the Vulkan device computes attention rightly."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat import vulkan
from jax_aat.adaptation import Adaptation
from jax_aat.attention import plan_tiles, tiled_attention
from jax_aat.commands import terminal
from jax_aat.problem import EMPTY_LOGSUMEXP
from jax_aat.reference import TOLERANCE, dense_attention, relative_error

# At the rounding of the last operation chance decides which of two errors is the larger.
_ROUNDING = {"float32": 1e-6, "float16": 0.0, "bfloat16": 0.0}
_BATCH = 2
_DIRECTIONS = {"forward": "forward", "tangent": "tangent", "gradients": "backward"}
# Programs run once or twice, so that it is compiling them that takes time.
_COMPILER_OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@dataclass(frozen=True)
class Case:
    """One call: its sizes, what it is given, how it is computed.

    Attributes that are not arguments of `tiled_attention`, or sizes of them:
      passes: Which are run.
      on_processors: Those of them that are run where the Vulkan device is a processor, which takes
        seconds to compile the kernels of each.
    """

    name: str
    dtype: str
    queries: int = 70
    keys: int = 93
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    causal: bool = False
    window: tuple[int, int] | None = None
    soft_cap: float | None = None
    lengths: bool = False
    segments: bool = False
    mask: bool = False
    bias: bool = False
    adaptation: Adaptation | None = None
    passes: tuple[str, ...] = tuple(_DIRECTIONS)
    on_processors: tuple[str, ...] = ("forward",)


_ALL = tuple(_DIRECTIONS)
# Tangents are run where their kernel, their dtype, the size of their tiles or what they are given
# is new.
_NO_TANGENT = ("forward", "gradients")
_EVERYTHING = Case(
    "everything",
    "bfloat16",
    queries=93,
    head_dim=33,
    causal=True,
    window=(60, 3),
    soft_cap=3.0,
    lengths=True,
    segments=True,
    mask=True,
    bias=True,
    on_processors=("gradients",),
)
_ADAPTIVE = Case(
    "adaptive, with a plan",
    "float32",
    queries=1111,
    keys=1111,
    heads=2,
    kv_heads=1,
    head_dim=32,
    causal=True,
    adaptation=Adaptation(budget=0.5, query_tile=64),
)
CASES = (
    Case("plain", "float32", head_dim=16, on_processors=_ALL),
    Case("one query, head_dim 256", "float32", 1, 45, heads=2, kv_heads=1, head_dim=256),
    Case(
        "lengths, segments",
        "float32",
        101,
        133,
        lengths=True,
        segments=True,
        passes=_NO_TANGENT,
        on_processors=(),
    ),
    Case(
        "bias, mask, soft cap",
        "float32",
        head_dim=32,
        bias=True,
        mask=True,
        soft_cap=2.0,
        on_processors=(),
    ),
    Case("causal", "float16", 150, 150, causal=True, on_processors=_NO_TANGENT),
    Case(
        "head_dim 128, mask",
        "float16",
        kv_heads=4,
        head_dim=128,
        mask=True,
        passes=_NO_TANGENT,
        on_processors=(),
    ),
    Case("causal window", "bfloat16", 150, 133, causal=True, window=(40, 0), passes=_NO_TANGENT),
    Case("head_dim 128, one key head", "bfloat16", kv_heads=1, head_dim=128),
    Case(
        "head_dim 256, causal",
        "bfloat16",
        head_dim=256,
        causal=True,
        passes=_NO_TANGENT,
        on_processors=(),
    ),
    _EVERYTHING,
    _ADAPTIVE,
)


@dataclass(frozen=True)
class Outcome:
    """What was found of one pass of a case.

    Attributes:
      case: The case.
      name: The pass.
      tensor: The result that comes nearest to what is allowed, or exceeds it the most.
      error: Its relative error.
      allowed: The largest error that is good.
      seconds: Time of the pass, compiled and run.
      fault: What is wrong, in words; empty: nothing.
    """

    case: Case
    name: str
    tensor: str = ""
    error: float = float("nan")
    allowed: float = float("nan")
    seconds: float = float("nan")
    fault: str = ""


def add_to(commands: Any) -> None:
    """Adds the parser of ``selftest``."""
    parser = terminal.add_command(
        commands,
        "selftest",
        run,
        help="compare what this machine's Vulkan device computes with float64",
        description=(
            "Computes attention, tangents and gradients by Vulkan in every dtype over a sweep of\n"
            "conditions and sizes, compares them with dense attention in float64, and runs\n"
            "everything twice for the same bits. A relative error may be as large as the\n"
            "tolerance of its dtype, and twice that of dense attention computed in that dtype."
        ),
        examples=["", "--device llvmpipe --seed 7"],
    )
    parser.add_argument(
        "--device",
        metavar="INDEX_OR_NAME",
        help="index, or part of the name, of the Vulkan device; default: the one that calls use",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the random operands; default: 0"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the cases and prints table and verdict."""
    if options.seed < 0:
        raise terminal.UsageError(f"--seed: got {options.seed}, expected an integer of at least 0")
    console = terminal.console()
    began = time.perf_counter()
    device = _device(options.device)
    outcomes = outcomes_of(cases_for(device), device, options.seed)
    console.print(_table(outcomes))
    left_out = sum(len(case.passes) for case in CASES) - len(outcomes)
    if device.kind == "cpu":
        console.print(
            f"{left_out} passes, which take a processor too long to compile, are left to GPUs",
            soft_wrap=True,
        )
    took = f"seed {options.seed}, {time.perf_counter() - began:.0f} s"
    bad = dict.fromkeys(f"{x.case.dtype}, {x.case.name}" for x in outcomes if x.fault)
    if bad:
        console.print(f"FAILED on {device.name}: {'; '.join(bad)} ({took})", soft_wrap=True)
        return terminal.BAD
    console.print(
        f"GOOD: {device.name} computed {len(outcomes)} passes rightly, with the same bits twice "
        f"({took})",
        soft_wrap=True,
    )
    return terminal.GOOD


def cases_for(device: vulkan.Device) -> tuple[Case, ...]:
    """The cases that a device has time for."""
    if device.kind != "cpu":
        return CASES
    return tuple(replace(case, passes=case.on_processors) for case in CASES if case.on_processors)


def outcomes_of(cases: Sequence[Case], device: vulkan.Device, seed: int) -> list[Outcome]:
    """Runs cases; one that fails does not hide the others."""
    outcomes = []
    # What is compared with is computed beside Vulkan, that of the plan, which takes longest, first.
    with (
        terminal.progress(sum(len(case.passes) for case in cases)) as bar,
        ThreadPoolExecutor(4) as pool,
    ):
        prepared = {
            case: pool.submit(Reference.of, case, seed)
            for case in sorted(cases, key=lambda case: case.adaptation is None)
        }
        for case in cases:
            for name in case.passes:
                try:
                    found = _outcome(case, name, prepared[case].result(), device)
                except Exception as error:
                    found = Outcome(case, name, fault=terminal.in_words(error))
                outcomes.append(found)
                bar.update()
    return outcomes


def _table(outcomes: Sequence[Outcome]) -> Any:
    titles = ("dtype", "case", "pass", "worst", "error", "allowed", "seconds", "verdict")
    table = terminal.table(*titles, numbers=("error", "allowed", "seconds"))
    for found in outcomes:
        names = (found.case.dtype, found.case.name, found.name, found.tensor)
        figures = (f"{found.error:.1e}", f"{found.allowed:.1e}", f"{found.seconds:.2f}")
        table.add_row(*names, *figures, found.fault or "good")
    return table


@dataclass(frozen=True)
class Inputs:
    """Arguments of a case, those that are differentiated with directions of their derivatives.

    Attributes:
      operands: q, k, v, then bias if there is one.
      tangents: Of the operands.
      cotangents: Of out and logsumexp.
      conditions: The other arguments, by name.
    """

    operands: tuple[jax.Array, ...]
    tangents: tuple[jax.Array, ...]
    cotangents: tuple[jax.Array, ...]
    conditions: dict[str, Any]

    @classmethod
    def of(cls, case: Case, generator: np.random.Generator) -> Inputs:
        """Draws them."""
        query = (_BATCH, case.queries, case.heads, case.head_dim)
        key = (_BATCH, case.keys, case.kv_heads, case.head_dim)
        shapes = [query, key, key]
        if case.bias:
            shapes.append((1, case.heads, case.queries, case.keys))

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(generator.normal(size=shape), case.dtype)

        operands, tangents = (tuple(normal(*shape) for shape in shapes) for _ in range(2))
        cotangents = normal(*query), normal(*query[:-1])
        conditions: dict[str, Any] = {
            "is_causal": case.causal,
            "local_window_size": case.window,
            "logits_soft_cap": case.soft_cap,
        }
        if case.mask:
            seen = generator.random((_BATCH, 1, case.queries, case.keys)) < 0.7
            conditions["mask"] = jnp.asarray(seen)
        for name, size in (("query", case.queries), ("key_value", case.keys)):
            if case.lengths:
                lengths = generator.integers(size // 2, size, _BATCH)
                conditions[f"{name}_seq_lengths"] = jnp.asarray(lengths, jnp.int32)
            if case.segments:
                ids = np.sort(generator.integers(0, 3, (_BATCH, size)))
                conditions[f"{name}_segment_ids"] = jnp.asarray(ids, jnp.int32)
        if case.adaptation is not None:
            choose = partial(
                plan_tiles, adaptation=case.adaptation, implementation="xla", **conditions
            )
            conditions["plan"] = _compiled(choose, *operands)(*operands)
        return cls(operands, tangents, cotangents, conditions)

    def arguments(self, name: str, dtype: Any = None) -> tuple[Any, ...]:
        """Those of a pass; with a dtype as arrays of NumPy in it."""
        given: tuple[Any, ...] = (self.operands,)
        if name != "forward":
            given += (self.tangents if name == "tangent" else self.cotangents,)
        return given if dtype is None else jax.tree.map(lambda x: np.asarray(x, dtype), given)


def _passes(attention: Callable[..., Any]) -> dict[str, Callable[..., dict[str, Any]]]:
    """Functions of operands, and tangents or cotangents, that give results by name."""

    # The logsumexp of a row that sees nothing is a number that differs between dtypes.
    def of_rows_that_see(logsumexp: jax.Array, x: jax.Array) -> jax.Array:
        lowest = max(EMPTY_LOGSUMEXP, float(jnp.finfo(logsumexp.dtype).min))
        return jnp.where(logsumexp > lowest / 2, x, 0)

    def forward(operands: Any) -> dict[str, Any]:
        out, logsumexp = attention(*operands)
        return {"out": out, "logsumexp": of_rows_that_see(logsumexp, logsumexp)}

    def tangent(operands: Any, tangents: Any) -> dict[str, Any]:
        (_, logsumexp), moved = jax.jvp(attention, operands, tangents)
        return {"d out": moved[0], "d logsumexp": of_rows_that_see(logsumexp, moved[1])}

    def gradients(operands: Any, cotangents: Any) -> dict[str, Any]:
        (_, logsumexp), pull = jax.vjp(attention, *operands)
        pulled = pull((cotangents[0], of_rows_that_see(logsumexp, cotangents[1])))
        return dict(zip(("dq", "dk", "dv", "dbias"), pulled, strict=False))

    return {"forward": forward, "tangent": tangent, "gradients": gradients}


@dataclass(frozen=True)
class Reference:
    """What a case is computed from and compared with.

    Attributes:
      inputs: Its arguments.
      expected: Results in float64, by pass and name.
      allowed: Largest relative errors that are good, by pass and name.
    """

    inputs: Inputs
    expected: dict[str, dict[str, Any]]
    allowed: dict[str, dict[str, float]]

    @classmethod
    def of(cls, case: Case, seed: int) -> Reference:
        """Computes it."""
        inputs = Inputs.of(case, np.random.default_rng(seed))
        adapts = case.adaptation is not None
        exact = partial(tiled_attention, implementation="xla", return_residual=True)
        with jax.enable_x64(True):
            wide = np.dtype(np.float64)
            expected = _all_passes(exact if adapts else dense_attention, case, inputs, wide)
        dtype, naive = jnp.dtype(case.dtype), {}
        if not adapts:
            naive = _all_passes(partial(dense_attention, dtype=dtype), case, inputs, dtype)
        allowed: dict[str, dict[str, float]] = {}
        for name, results in expected.items():
            tolerance = TOLERANCE[case.dtype][name != "forward"]
            allowed[name] = dict.fromkeys(results, tolerance)
            for tensor, x in naive.get(name, {}).items():
                error = max(relative_error(x, results[tensor]), _ROUNDING[case.dtype])
                allowed[name][tensor] = min(tolerance, 2 * error)
        return cls(inputs, expected, allowed)


def _outcome(case: Case, name: str, reference: Reference, device: vulkan.Device) -> Outcome:
    """Runs a pass by Vulkan, twice, and judges it."""
    inputs, expected = reference.inputs, reference.expected[name]
    attention = partial(
        tiled_attention, implementation="vulkan", return_residual=True, **inputs.conditions
    )
    arguments = inputs.arguments(name)
    before = vulkan.last_dispatch()
    began = time.perf_counter()
    function = _compiled(_passes(attention)[name], *arguments)
    first, second = (jax.block_until_ready(function(*arguments)) for _ in range(2))
    seconds = time.perf_counter() - began
    allowed = reference.allowed[name]
    errors = {tensor: relative_error(x, expected[tensor]) for tensor, x in first.items()}
    # What is not a number is worse than any number.
    shares = {
        tensor: np.nan_to_num(errors[tensor] / allowed[tensor], nan=np.inf) for tensor in errors
    }
    worst = max(shares, key=shares.__getitem__)
    faults = (
        _wrong_path(before, name, device),
        "" if shares[worst] <= 1 else "error too large",
        "" if _bits(first) == _bits(second) else "other bits the second time",
    )
    fault = ", ".join(filter(None, faults))
    return Outcome(case, name, worst, errors[worst], allowed[worst], seconds, fault)


def _all_passes(
    attention: Callable[..., Any], case: Case, inputs: Inputs, dtype: Any
) -> dict[str, dict[str, Any]]:
    """Results of the passes of a case, by pass and name, by one program on the processor."""
    passes = _passes(partial(attention, **inputs.conditions))
    given = {name: inputs.arguments(name, dtype) for name in case.passes}

    def everything(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {name: passes[name](*arguments) for name, arguments in given.items()}

    with jax.default_device(_processor()):
        computed = _compiled(everything, given)(given)
        results: dict[str, dict[str, Any]] = jax.tree.map(np.asarray, computed)
    return results


def _processor() -> Any:
    """A device of JAX's CPU platform, whose float32 is not less; None where it is switched off."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile(compiler_options=_COMPILER_OPTIONS)


def _wrong_path(before: vulkan.Dispatch | None, name: str, device: vulkan.Device) -> str:
    """What is wrong with the path that a pass took since a dispatch; empty: nothing."""
    last = vulkan.last_dispatch()
    if last is None or (before is not None and last.sequence == before.sequence):
        return "Vulkan did not run"
    if last.direction != _DIRECTIONS[name]:
        return f"Vulkan ran its {last.direction} pass"
    return "" if last.device == device.name else f"it ran on {last.device}"


def _bits(results: dict[str, Any]) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in results.values()]


def _device(wanted: str | None) -> vulkan.Device:
    """The device that calls run on, once the one that is wanted is made the default.

    Raises:
      UsageError: There is none of that index or name.
      UnusableError: Calls cannot run on it; says why.
    """
    if wanted is not None and vulkan.devices():
        found = _find(wanted)
        try:
            vulkan.set_default_device(found)
        except RuntimeError as error:
            raise terminal.UnusableError(str(error)) from error
    if problem := vulkan.problem():
        raise terminal.UnusableError(f"Vulkan cannot be used: {problem}")
    device = vulkan.default_device()
    assert device is not None  # else there is a problem
    one = jnp.ones((1, 1, 1, 1))
    try:
        jax.block_until_ready(tiled_attention(one, one, one, implementation="vulkan"))
    except Exception as error:
        raise terminal.UnusableError(
            f"Vulkan cannot be used: {terminal.in_words(error)}"
        ) from error
    last = vulkan.last_dispatch()
    if wanted is not None and last is not None and last.device != device.name:
        raise terminal.UnusableError(
            f"JAX's platform {last.platform!r} computes on {last.device}, not on {device.name}: "
            "JAX_PLATFORMS=cpu lets every Vulkan device compute"
        )
    return device


def _find(wanted: str) -> vulkan.Device:
    devices = vulkan.devices()
    for device in devices:
        named = wanted.lower() in device.name.lower()
        if wanted == str(device.index) if wanted.isdecimal() else named:
            return device
    known = ", ".join(f"{device.index}: {device.name}" for device in devices)
    raise terminal.UsageError(
        f"--device: got {wanted!r}, expected the index or a part of the name of a device ({known})"
    )
