"""``python -m jax_aat info``: what would compute attention on this machine, and why."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jax_aat import tuning, vulkan
from jax_aat.commands import terminal
from jax_aat.primitives.rules import SHORT_CALLS, lowered_platform

PASSES = ("forward", "tangent", "backward")
HEAD_DIMS = (64, 128, 256)
VARIABLES = {
    "JAX_AAT_DEVICE": "index, or part of the name, of the Vulkan device to use",
    vulkan.SWITCH: "1 or true switches the custom calls off",
    "JAX_AAT_LOG": "least severe messages written: error, warning, info or debug",
    "JAX_AAT_VALIDATION": "1 runs under the Vulkan validation layers",
    "JAX_AAT_MEMORY_LIMIT": "bytes of device memory that may be held",
    "JAX_AAT_CACHE_DIR": "folder of compiled pipelines and tunings",
}


def add_to(commands: Any) -> None:
    """Adds the parser of ``info``."""
    terminal.add_command(
        commands,
        "info",
        run,
        help="what would compute attention on this machine, and why",
        description="Prints driver, devices, features, the kernels that will be chosen and why,\n"
        "and what is missing. Exits with 0 if Vulkan can compute attention here, with 1 if not.",
        examples=[""],
    )


def run(_: argparse.Namespace) -> int:
    """Prints the report."""
    for line in report():
        print(line)
    return terminal.BAD if vulkan.problem() else terminal.GOOD


def report() -> Iterator[str]:
    """The lines that ``info`` prints."""
    python = platform.python_version()
    yield f"jax_aat {_version()}, JAX {jax.__version__} ({jax.default_backend()}), Python {python}"
    default = vulkan.default_device()
    for device in vulkan.devices():
        yield ""
        yield from _describe(device, used=device == default)
    yield ""
    if problem := vulkan.problem():
        yield f"Vulkan cannot be used: {problem}"
    if default is not None:
        yield "kernels, for calls without bias or mask:"
        yield from _table(_kernels(default))
        yield ""
        yield from _tuning(default)
        yield f"pipeline cache: {_pipeline_cache()}"
    with warnings.catch_warnings(action="ignore"):  # of what stands above
        chosen = vulkan.choose_implementation(None, "float32", HEAD_DIMS[0])
    yield f"implementation=None means {chosen!r} here: {_reason(default, chosen)}"
    yield ""
    yield "environment variables:"
    yield from _table((name, os.environ.get(name, "unset"), use) for name, use in VARIABLES.items())


def _version() -> str:
    try:
        return version("jax_aat")
    except PackageNotFoundError:
        return "not installed"


def _describe(device: vulkan.Device, used: bool) -> Iterator[str]:
    yield f"device {device.index}: {device.name} ({device.kind}){', used' if used else ''}"
    yield f"  driver    {device.driver}"
    yield f"  Vulkan    {device.api_version}, device UUID {device.uuid}"
    for title, present in (("has", True), ("lacks", False)):
        names = [name for name, found in device.features.items() if found is present]
        yield f"  {title:<9} {', '.join(names) or 'nothing'}"
    yield f"  traits    {', '.join(f'{k} {v}' for k, v in device.traits.items())}"
    if device.missing:
        yield f"  cannot be used: it lacks {', '.join(device.missing)}"


def _kernels(device: vulkan.Device) -> Iterator[Sequence[str]]:
    from jax_aat import _native

    yield "pass", "dtype", "head_dim", "path", "shaders", "why"
    for name, dtype in itertools.product(PASSES, vulkan.DTYPES):

        def choice(head_dim: int, name: str = name, dtype: str = dtype) -> tuple[str, str, str]:
            plan = _native.example_plan(device.index, name, dtype, head_dim)
            shaders = ", ".join(s for s in plan["shaders"] if not s.startswith("work_lists"))
            return plan["path"], shaders, _why(plan["path"], dtype, device.traits)

        for chosen, head_dims in itertools.groupby(HEAD_DIMS, choice):
            yield name, dtype, ", ".join(map(str, head_dims)), *chosen


def _why(path: str, dtype: str, traits: Mapping[str, Any]) -> str:
    """Why the planner took that family of kernels."""
    if path != "portable":
        if traits["coopmat_layout_known"]:
            return "cooperative matrices"
        return "cooperative matrices, of which elements pass through shared memory"
    if dtype == "float32":
        return "matrix units do not multiply float32"
    if not (traits["coopmat_float16"] if dtype == "float16" else traits["coopmat_bfloat16"]):
        return f"no 16x16x16 cooperative matrices of {dtype}"
    if not vulkan.has_matrices(traits, dtype):
        return "elements of the device's cooperative matrices were not found where they belong"
    return "no matrix kernel for this pass and head_dim"


def _reason(device: vulkan.Device | None, chosen: str) -> str:
    if vulkan.problem() or device is None:
        return "Vulkan cannot be used"
    words = f"the device is of the kind {device.kind!r}"
    if chosen == "vulkan" and (most := SHORT_CALLS.get(lowered_platform())):
        words += f"; short exact calls, of up to {most:,} pairs of a query row and a key, get 'xla'"
    return words


def _table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  " + "  ".join(map(str.ljust, row, widths)).rstrip()


def _tuning(device: vulkan.Device) -> Iterator[str]:
    file = tuning.file_of(device)
    shapes = tuning.tuning(device)
    if not shapes:
        would = f"{terminal.PROGRAM} tune would write {file}" if file else terminal.NO_FOLDER
        yield f"tuning: none, {would}"
        return
    yield f"tuning: {file}"
    rows = [("kernel", "dtype", "head_dim", "calls", "shape")]
    for kernel, shape in shapes.items():
        rule = tuning.shapes_of(device, kernel)[0]
        rows.append((*kernel.words(), f"{shape}{' (default)' if shape == rule else ''}"))
    yield from _table(rows)
    yield ""


def _pipeline_cache() -> str:
    from jax_aat import _native

    if not (path := _native.cache_path()):
        return terminal.NO_FOLDER
    file = Path(path)
    return f"{file}, {file.stat().st_size} bytes" if file.exists() else f"{file}, not written yet"
