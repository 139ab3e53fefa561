"""What the figures of a benchmark depend on."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import jax_aat


def surroundings() -> dict[str, Any]:
    """Returns what the figures depend on: commit, command, devices, versions."""

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    vulkan = jax_aat.default_device()
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": f"{platform.platform()}, {platform.processor() or platform.machine()}",
        "jax": jax.__version__,
        "jax_device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "vulkan_device": f"{vulkan.name}, {vulkan.driver}" if vulkan else "none",
    }
