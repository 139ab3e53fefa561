"""``python -m jax_aat``: what computes attention here, how well and how fast."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from jax_aat.commands import bench, info, selftest, show, trace, tune
from jax_aat.commands.terminal import BAD, EXIT_CODES, PROGRAM, UnusableError, UsageError

COMMANDS = (info, selftest, bench, tune, trace, show)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: Those after the name of the program; None: those of this process.

    Returns:
      The exit code.

    Raises:
      SystemExit: With code 2, after a message, where the arguments do not fit; with 0 after help.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Adaptive tiled attention for JAX, by Vulkan.",
        epilog=f"'{PROGRAM} COMMAND --help' describes a command.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except UsageError as error:
        commands.choices[options.command].error(str(error))
    except UnusableError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return BAD
    except BrokenPipeError:
        # Whoever reads has enough; what is left must not fail again when Python flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD
    return code


if __name__ == "__main__":
    sys.exit(main())
