"""``python -m jax_aat trace``: profiles a Python script."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from jax_aat import vulkan
from jax_aat.commands import terminal
from jax_aat.profiling import Profile, profile


def add_to(commands: Any) -> None:
    """Adds the parser of ``trace``."""
    parser = terminal.add_command(
        commands,
        "trace",
        run,
        help="profile a Python script and write a trace for Perfetto",
        description=(
            "Runs a script under jax_aat.profile, as Python itself would run it, writes a trace,\n"
            "and prints times by kernel and what limits them. What the script compiles is seen,\n"
            "too: profile a part of it by jax_aat.profile in the script itself.\n\n"
            "A script that ends with an exit code other than 0 gives its own to this command."
        ),
        examples=["train.py --steps 20", "--output step.json --json step-calls.json train.py"],
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("trace.json"),
        metavar="FILE",
        help="the trace, in the Chrome trace event format (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every call and kernel as JSON")
    parser.add_argument(
        "--by-call", action="store_true", help="time calls as a whole, which may overlap kernels"
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the script")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the script and tells what its calls took."""
    console = terminal.console()
    if problem := vulkan.problem():
        raise terminal.UnusableError(problem)
    if not options.script.is_file():
        raise terminal.UnusableError(f"{options.script}: there is no such file")
    with profile(by_kernel=not options.by_call) as profiled:
        code = _run_script(options.script, options.arguments)
    try:
        profiled.to_trace(options.output)
        if options.json is not None:
            profiled.to_json(options.json)
    except OSError as error:
        raise terminal.UnusableError(f"{error.filename}: {error.strerror}") from error
    _tell(console, profiled)
    console.print(f"written: {options.output}", soft_wrap=True, markup=False)
    return code


def _tell(console: Any, profiled: Profile) -> None:
    if not profiled.calls:
        console.print("the script made no custom calls: XLA computed its attention, if any")
        return
    console.print(profiled.table())
    for insight in profiled.insights():
        console.print(str(insight), markup=False)


def _run_script(script: Path, arguments: list[str]) -> int:
    """Runs it as `python script arguments` would; returns its exit code."""
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or terminal.GOOD
        print(end.code, file=sys.stderr)
        return terminal.BAD
    finally:
        sys.argv, sys.path[:] = argv, path
    return terminal.GOOD
