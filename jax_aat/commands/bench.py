"""``python -m jax_aat bench``: attentions of JAX side by side on this machine."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat import vulkan
from jax_aat.adaptation import Adaptation
from jax_aat.attention import Implementation, tiled_attention
from jax_aat.commands import terminal
from jax_aat.commands.contenders import Case, Direction, Pass, errors, jax_nn, ours, reference
from jax_aat.report import Report

_WARM_UP = 2
"""Untimed runs of each contender; the first one compiles kernels."""


def add_to(commands: Any) -> None:
    """Adds the parser of ``bench``."""
    parser = terminal.add_command(
        commands,
        "bench",
        run,
        help="time attentions of JAX side by side on this machine",
        description=(
            "Times exact and adaptive attention of jax_aat by Vulkan and by XLA beside\n"
            "jax.nn.dot_product_attention by XLA, and by cuDNN where JAX has a CUDA device, on\n"
            "standard normal operands. The contenders take turns, so that what else the machine\n"
            "does hits all alike. 'ms' is the median of calls that are each waited for, with the\n"
            "quartiles beside it, 'device ms' the median by timestamps of the Vulkan device, in\n"
            "calls of their own. 'error' is ||x - reference|| / ||reference|| against dense\n"
            "attention in float32 in the first key/value head, the largest of out, dq, dk, dv;\n"
            "random operands, whose attention is spread evenly, are hard on adaptive attention."
        ),
        examples=[
            "",
            "--queries 4096 --keys 4096 --heads 16 --head-dim 128 --dtype bfloat16 --causal",
            "--backward --budget 0.125 --json bench.json",
        ],
    )
    sizes = (
        ("--batch", 1, "batch size"),
        ("--queries", 1024, "number of queries"),
        ("--keys", 1024, "number of keys"),
        ("--heads", 2, "number of query heads"),
        ("--kv-heads", 1, "number of key/value heads, which divides --heads"),
        ("--head-dim", 32, "size of a head"),
        ("--repeats", 10, "timed calls of each contender"),
    )
    for name, default, meaning in sizes:
        parser.add_argument(
            name,
            type=terminal.positive,
            default=default,
            metavar="N",
            help=f"{meaning}; default: {default}",
        )
    parser.add_argument(
        "--dtype", choices=vulkan.DTYPES, default="float32", help="default: float32"
    )
    parser.add_argument("--causal", action="store_true", help="query t sees keys s <= t only")
    parser.add_argument(
        "--budget",
        type=float,
        default=0.25,
        metavar="FRACTION",
        help="FLOPs that adaptive attention may spend, of those of exact attention; default: 0.25",
    )
    parser.add_argument(
        "--backward", action="store_true", help="time forward and backward pass together"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def run(options: argparse.Namespace) -> int:
    """Measures and prints."""
    case, adaptation = _checked(options)
    console = terminal.console()
    contenders: dict[str, Callable[..., Pass]] = {
        "jax_aat exact, vulkan": ours,
        "jax_aat exact, xla": partial(ours, implementation="xla"),
        "jax_aat adaptive, vulkan": partial(ours, adaptation=adaptation),
        "jax_aat adaptive, xla": partial(ours, implementation="xla", adaptation=adaptation),
        "jax.nn, xla": partial(jax_nn, "xla"),
    }
    if _has_cuda() and case.dtype != "float32":
        contenders["jax.nn, cudnn"] = partial(jax_nn, "cudnn")
    figures: dict[str, Any] = {
        **surroundings(),
        "case": asdict(case) | {"backward": options.backward, "repeats": options.repeats},
        "budget": adaptation.budget,
    }
    try:
        direction: Direction = "backward" if options.backward else "forward"
        rows = measure(case, contenders, direction, options.repeats)
        console.print(_heading(figures), soft_wrap=True)
        console.print(_table(rows))
        by_vulkan = "failed" not in rows["jax_aat adaptive, vulkan"]
        spent = _relative_flops(case, adaptation, "vulkan" if by_vulkan else "xla")
    except RuntimeError as error:
        raise terminal.UnusableError(terminal.in_words(error)) from error
    figures |= {"relative_flops": spent, "contenders": rows}
    console.print(
        f"FLOPs of adaptive attention, by its report: {spent:.1%} of those of exact attention, "
        f"where {adaptation.budget:.1%} are allowed",
        soft_wrap=True,
    )
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise terminal.UnusableError(f"--json: {error}") from error
    failed = any("failed" in row for name, row in rows.items() if name.startswith("jax_aat"))
    return terminal.BAD if failed else terminal.GOOD


def measure(
    case: Case, contenders: Mapping[str, Callable[..., Pass]], direction: Direction, repeats: int
) -> dict[str, dict[str, Any]]:
    """Measures contenders in turn; one that fails does not hide the others.

    Args:
      case: The problem.
      contenders: By name: functions of case, arrays and `direction`.
      direction: What is measured: the forward pass, or with the backward one.
      repeats: Timed calls of each.

    Returns:
      By name the path, relative errors by tensor, and quartiles of milliseconds, or why it failed.
    """
    arrays = case.arrays(seed=0)
    expected = reference(case, arrays)
    rows: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    ready: dict[str, Pass] = {}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    device_times: dict[str, list[float | None]] = {name: [] for name in contenders}

    def prepare(name: str) -> None:
        made = contenders[name](case, arrays, direction)
        for _ in range(_WARM_UP):
            results = made.wait(made.start())
        rows[name] |= {"path": made.path(), "errors": errors(case, made, results, expected)}
        made.device_milliseconds()
        ready[name] = made

    def time_one(name: str) -> None:
        began = time.perf_counter()
        ready[name].wait(ready[name].start())
        times[name].append((time.perf_counter() - began) * 1e3)
        device_times[name].append(ready[name].device_milliseconds())

    with terminal.progress(len(contenders) * (1 + repeats)) as bar:
        for run_one in (prepare, *[time_one] * repeats):
            for name, row in rows.items():
                if "failed" not in row:
                    bar.set_description(name)
                    try:
                        run_one(name)
                    except Exception as error:
                        row["failed"] = terminal.in_words(error)
                bar.update()
    for name, row in rows.items():
        if "failed" not in row:
            row["milliseconds"] = _quartiles(times[name])
            row["device_milliseconds"] = _quartiles(device_times[name])
    return rows


def surroundings() -> dict[str, Any]:
    """What figures depend on beside the commit: date, devices, versions."""
    device = vulkan.default_device()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": f"{platform.platform()}, {platform.processor() or platform.machine()}",
        "jax": jax.__version__,
        "jax_device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "vulkan_device": f"{device.name}, {device.driver}" if device else "none",
    }


def _checked(options: argparse.Namespace) -> tuple[Case, Adaptation]:
    """The problem and how adaptive attention computes it.

    Raises:
      UsageError: An option does not fit.
    """
    if options.heads % options.kv_heads:
        raise terminal.UsageError(
            f"--heads: got {options.heads}, expected a multiple of --kv-heads, {options.kv_heads}"
        )
    if options.head_dim > vulkan.MAX_HEAD_DIM:
        raise terminal.UsageError(
            f"--head-dim: got {options.head_dim}, expected at most {vulkan.MAX_HEAD_DIM}"
        )
    try:
        adaptation = Adaptation(budget=options.budget)
    except ValueError as error:
        raise terminal.UsageError(f"--{error}") from error
    names = (field.name for field in fields(Case))
    return Case(**{name: getattr(options, name) for name in names}), adaptation


def _has_cuda() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def _relative_flops(case: Case, adaptation: Adaptation, implementation: Implementation) -> float:
    """FLOPs of the adaptive call over those of exact attention."""
    operands = [jnp.asarray(x, case.dtype) for x in case.arrays(seed=0)[:3]]
    attention = partial(
        tiled_attention,
        is_causal=case.causal,
        implementation=implementation,
        adaptation=adaptation,
        return_report=True,
    )
    report: Report = jax.jit(lambda *xs: attention(*xs)[1])(*operands)
    # Exact attention takes the same FLOPs in every head.
    return float(report.relative_flops.mean())


def _quartiles(times: Sequence[float | None]) -> list[float] | None:
    """First quartile, median and third quartile; None where a time is not known."""
    if None in times:
        return None
    return [float(x) for x in np.percentile(np.array(times, float), (25, 50, 75))]


def _heading(figures: Mapping[str, Any]) -> str:
    case = figures["case"]
    return (
        f"q [{case['batch']}, {case['queries']}, {case['heads']}, {case['head_dim']}], "
        f"k and v [{case['batch']}, {case['keys']}, {case['kv_heads']}, {case['head_dim']}], "
        f"{case['dtype']}, {'causal' if case['causal'] else 'not causal'}, "
        f"{'forward and backward' if case['backward'] else 'forward'}, {case['repeats']} calls\n"
        f"JAX {figures['jax']} on {figures['jax_device']}; Vulkan on {figures['vulkan_device']}"
    )


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Any:
    titles = ("contender", "ms", "quartiles", "device ms", "error", "path")
    table = terminal.table(*titles, numbers=("ms", "quartiles", "device ms", "error"))
    for name, row in rows.items():
        if "failed" in row:
            table.add_row(name, "", "", "", "", f"failed: {row['failed']}")
            continue
        first, median, third = row["milliseconds"]
        device = row["device_milliseconds"]
        table.add_row(
            *(name, f"{median:.3f}", f"{first:.3f} to {third:.3f}"),
            *("" if device is None else f"{device[1]:.3f}", f"{max(row['errors'].values()):.1e}"),
            row["path"].partition(":")[0],
        )
    return table
