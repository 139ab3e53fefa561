"""What the commands share: their parsers, exit codes, errors in words, tables, progress bars."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

PROGRAM = "python -m jax_aat"
GOOD, BAD, USAGE = range(3)
EXIT_CODES = f"""exit codes:
  {GOOD}  good
  {BAD}  a verdict is bad, or something that is needed cannot be used
  {USAGE}  wrong usage"""

NO_FOLDER = "there is no folder to keep it in: set JAX_AAT_CACHE_DIR to one"
_PIPE_WIDTH = 200
"""Columns of what is not written to a terminal, which has no width of its own."""


class UsageError(Exception):
    """Arguments do not fit; the message says which."""


class UnusableError(Exception):
    """Something that is needed cannot be used; the message says why and what to do."""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    """Adds the parser of a command.

    Args:
      commands: What `argparse.ArgumentParser.add_subparsers` returned.
      name: Of the command.
      run: Runs it; returns the exit code, raises `UsageError` or `UnusableError`.
      help: One line for the list of commands.
      description: What its own help says.
      examples: Arguments that its help shows.
    """
    lines = "\n".join(f"  {PROGRAM} {name} {example}".rstrip() for example in examples)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{lines}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """Reads an integer of at least 1, for argparse.

    Raises:
      ArgumentTypeError: It is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return int(text)


def in_words(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def console() -> Any:
    """A `rich.console.Console` that writes to standard output.

    Raises:
      UnusableError: rich is not installed.
    """
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    # Messages may have brackets, which markup is made of.
    return _of_extra("rich.console").Console(width=width, highlight=False, markup=False)


def table(*columns: str, numbers: Sequence[str] = ()) -> Any:
    """A `rich.table.Table` without rows.

    Args:
      *columns: Their titles.
      numbers: Titles of those that are aligned to the right.

    Raises:
      UnusableError: rich is not installed.
    """
    made = _of_extra("rich.table").Table(box=_of_extra("rich.box").SIMPLE)
    for title in columns:
        made.add_column(title, justify="right" if title in numbers else "left", overflow="fold")
    return made


def progress(total: int) -> Any:
    """A `tqdm.tqdm` of that many steps on standard error, drawn in terminals only.

    Raises:
      UnusableError: tqdm is not installed.
    """
    return _of_extra("tqdm").tqdm(total=total, file=sys.stderr, disable=None, leave=False)


def _of_extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnusableError(f"{package} is not installed: pip install {package}") from error
