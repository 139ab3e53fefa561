"""What the figures of a benchmark depend on."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from jax_aat.commands import bench


def surroundings() -> dict[str, Any]:
    """Returns what the figures depend on: commit, command, devices, versions."""
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(folder):
        script = script.relative_to(folder.parent)

    return {
        "commit": git("rev-parse", "HEAD"),
        "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        **bench.surroundings(),
    }
