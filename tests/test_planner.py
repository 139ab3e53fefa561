"""The planner, which needs no GPU: builds and runs its C++ tests (tests/cpp)."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_planner(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "no C++ compiler: set CXX"
    program = tmp_path / "planner_test"
    folders = (ROOT / "tests/cpp", ROOT / "csrc/attention")
    sources = [source for folder in folders for source in folder.glob("*.cc")]
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "shaders")]
    subprocess.run([compiler, "-std=c++20", "-O1", *includes, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
