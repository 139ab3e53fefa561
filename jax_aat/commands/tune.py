"""``python -m jax_aat tune``: shapes of kernels chosen by measuring them on this device."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import jax

from jax_aat import tuning, vulkan
from jax_aat.commands import terminal
from jax_aat.tuning import Kernel, Measured

HEAD_DIMS = (64, 128)


def add_to(commands: Any) -> None:
    """Adds the parser of ``tune``."""
    parser = terminal.add_command(
        commands,
        "tune",
        run,
        help="choose the shapes of attention kernels by measuring them on this device",
        description=(
            "Runs each kernel of attention in the few shapes that fit the device, compares the\n"
            "results with those of the shape that rules choose, and times them in turn by the\n"
            f"device's timestamps. A shape that saves {tuning.GAIN:.0%} of the time, in at least "
            f"{tuning.WINS} of {tuning.ROUNDS}\n"
            "rounds, is used from then on, by later processes too, as long as device, driver\n"
            "and shaders stay the same: the choice is kept in a file that 'info' names. Kernels\n"
            "that are not measured keep what an earlier run chose. On a processor, which takes\n"
            "seconds to compile a kernel, only those of exact float32 calls are measured unless\n"
            "dtypes are given. Another shape adds in another order: results may differ in their\n"
            "last bits from before, and are the same every time."
        ),
        examples=["", "--dtype bfloat16 --head-dim 128 96 --dry-run", "--reset"],
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=vulkan.DTYPES,
        metavar="DTYPE",
        help=f"of {', '.join(vulkan.DTYPES)}; default: all, on processors float32",
    )
    parser.add_argument(
        "--head-dim",
        nargs="+",
        type=terminal.positive,
        default=HEAD_DIMS,
        metavar="N",
        help=f"sizes of a head; default: {' and '.join(map(str, HEAD_DIMS))}",
    )
    parser.add_argument(
        "--length",
        type=terminal.positive,
        metavar="N",
        help="of the calls; default: by a first timing 128 to 4096",
    )
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--dry-run", action="store_true", help="measure, keep nothing")
    does.add_argument("--reset", action="store_true", help="forget the tuning of this device")


def run(options: argparse.Namespace) -> int:
    """Measures, prints and keeps the choice."""
    if too_large := [size for size in options.head_dim if size > vulkan.MAX_HEAD_DIM]:
        raise terminal.UsageError(
            f"--head-dim: got {too_large[0]}, expected at most {vulkan.MAX_HEAD_DIM}"
        )
    if options.length is not None and options.length < tuning.MIN_LENGTH:
        raise terminal.UsageError(
            f"--length: got {options.length}, expected at least {tuning.MIN_LENGTH}"
        )
    console = terminal.console()
    try:
        device = tuning.computing_device()
        if options.reset:
            tuning.set_tuning(device, {}, save=True)
            console.print(f"{device.name} is not tuned any more", soft_wrap=True)
            return terminal.GOOD
        if not options.dry_run and tuning.file_of(device) is None:
            raise terminal.UnusableError(f"a tuning is to be kept, and {terminal.NO_FOLDER}")
        measured, refused = _measure(device, options)
        console.print(_table(measured))
        chosen = {one.kernel: one.shapes[one.chosen] for one in measured}
        if not options.dry_run:
            tuning.set_tuning(device, tuning.tuning(device) | chosen, save=True)
    except RuntimeError as error:
        raise terminal.UnusableError(terminal.in_words(error)) from error
    for kernel, words in refused:
        console.print(f"refused for {' '.join(kernel.words())}: {words}", soft_wrap=True)
    better = sum(one.chosen != 0 for one in measured)
    console.print(
        f"{better} of {len(measured)} kernels have a better shape on {device.name}; "
        + ("nothing is kept" if options.dry_run else f"kept in {tuning.file_of(device)}"),
        soft_wrap=True,
    )
    return terminal.BAD if refused else terminal.GOOD


def kernels_for(
    device: vulkan.Device, dtypes: Sequence[str] | None, head_dims: Sequence[int]
) -> list[Kernel]:
    """The kernels that are measured on a device: those that have more than one shape there.

    Not the tangents of adaptive calls, which are rare and take long to compile.

    Args:
      device: The device.
      dtypes: Those that are asked for; None: those that the device has time for.
      head_dims: Sizes of a head.
    """
    slow = device.kind == "cpu"
    wide = ("float32",) if slow or not device.traits["storage_16bit"] else vulkan.DTYPES
    every = itertools.product(dtypes or wide, head_dims, (False,) if slow else (False, True))
    kernels = [Kernel(name, *rest) for rest in every for name in tuning.KERNELS]
    return [
        kernel
        for kernel in kernels
        if len(tuning.shapes_of(device, kernel)) > 1
        and not (kernel.planned and kernel.name == "tangent")
    ]


def _measure(
    device: vulkan.Device, options: argparse.Namespace
) -> tuple[list[Measured], list[tuple[Kernel, str]]]:
    """What was measured, and why shapes of a kernel, or all of them, are refused."""
    kernels = kernels_for(device, options.dtype, options.head_dim)
    first = options.dtype[0] if options.dtype else "float32"
    length = options.length or tuning.representative_length(device, first, max(options.head_dim))
    steps = sum(tuning.steps_of(tuning.shapes_of(device, kernel)) for kernel in kernels)
    measured, refused = [], []
    with terminal.progress(steps) as bar:
        for kernel in kernels:
            bar.set_description(" ".join(kernel.words()))
            try:
                measured.append(tuning.measure(device, kernel, length, bar.update))
            except jax.errors.JaxRuntimeError as error:
                refused.append((kernel, terminal.in_words(error)))
            else:
                refused += [(kernel, words) for words in measured[-1].refused]
    return measured, refused


def _table(measured: Sequence[Measured]) -> Any:
    titles = ("kernel", "dtype", "head_dim", "calls", "default ms", "chosen ms", "shape")
    table = terminal.table(*titles, numbers=("head_dim", "default ms", "chosen ms"))
    for one in measured:
        table.add_row(
            *one.kernel.words(),
            *(f"{one.milliseconds[index]:.3f}" for index in (0, one.chosen)),
            f"{one.shapes[one.chosen]}{'' if one.chosen else ' (default)'}",
        )
    return table
