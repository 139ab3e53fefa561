"""The examples, run as a newcomer runs them, in a tiny size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_text.py"
TINY = ["--layers=1", "--width=32", "--heads=4", "--kv-heads=2", "--context=24", "--batch=2"]
TINY += ["--save-every=3"]


@dataclass
class Run:
    printed: str
    train: list[float]
    held_out: list[list[float]]


def run_example(output: Path, *flags: str) -> Run:
    command = [sys.executable, str(EXAMPLE), f"--output={output}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(done.stdout, **json.loads((output / "history.json").read_text()))


@pytest.fixture(scope="module")
def vulkan_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("vulkan")
    run = run_example(output, *TINY, "--steps=6", "--implementation=vulkan")
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    return run


def test_vulkan_runs_and_reports(vulkan_run: Run) -> None:
    assert re.search(r"^attention  \w+ by Vulkan on ", vulkan_run.printed, re.MULTILINE)
    assert re.search(r"held-out loss of model: \d+\.\d+ nats, \d+\.\d+ bits", vulkan_run.printed)
    assert len(vulkan_run.train) == 6
    assert [step for step, _ in vulkan_run.held_out] == [3, 6]


def test_xla_gives_the_same_losses(vulkan_run: Run, tmp_path: Path) -> None:
    xla = run_example(tmp_path, *TINY, "--steps=6", "--implementation=xla")
    assert "attention  by XLA" in xla.printed
    np.testing.assert_allclose(vulkan_run.train, xla.train, rtol=1e-4)
    np.testing.assert_allclose(vulkan_run.held_out, xla.held_out, rtol=1e-4)


def test_resumed_run_equals_an_uninterrupted_one(vulkan_run: Run, tmp_path: Path) -> None:
    run_example(tmp_path, *TINY, "--steps=3", "--implementation=vulkan")
    resumed = run_example(tmp_path, *TINY, "--steps=6", "--implementation=vulkan", "--resume")
    assert "resumed    at step 3" in resumed.printed
    assert (resumed.train, resumed.held_out) == (vulkan_run.train, vulkan_run.held_out)


def test_learns_more_than_byte_frequencies(tmp_path: Path) -> None:
    flags = ["--steps=80", "--save-every=80", "--context=64", "--implementation=xla"]
    printed = run_example(tmp_path, *flags).printed
    losses = dict(re.findall(r"held-out loss of (.*): (\d+\.\d+) nats", printed))
    assert float(losses["model"]) < float(losses["byte frequencies"]) - 0.3


def test_sizes_that_do_not_fit_are_refused_in_words() -> None:
    command = [sys.executable, str(EXAMPLE), "--width=32", "--heads=5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--width must be an even multiple of --heads" in done.stderr


def test_adaptation_prints_reports_and_draws_the_levels(tmp_path: Path) -> None:
    flags = [*TINY, "--context=128", "--steps=3", "--implementation=xla"]
    run = run_example(tmp_path, *flags, "--adaptation=tolerance=0.1")
    assert re.search(r"^Attention_0\n *head +exact +mean ", run.printed, re.MULTILINE)
    assert len(re.findall(r"^ +\d +\d+\.\d%", run.printed, re.MULTILINE)) == 4
    assert (tmp_path / "resolution.png").read_bytes().startswith(b"\x89PNG")
    assert np.isfinite(run.held_out).all()
    (tmp_path / "resolution.png").unlink()
    resumed = run_example(tmp_path, *flags, "--steps=5", "--adaptation=tolerance=0.1", "--resume")
    assert "resumed    at step 3" in resumed.printed
    assert (tmp_path / "resolution.png").exists()
    assert "Attention_0\n" in resumed.printed
    again = run_example(tmp_path, *flags, "--steps=5", "--adaptation=tolerance=0.1", "--resume")
    assert "attention  none ran, so none is reported: all 5 steps were taken" in again.printed
    assert "Attention_0\n" not in again.printed
    assert (again.train, again.held_out) == (resumed.train, resumed.held_out)


def test_an_adaptation_that_means_nothing_is_refused_in_words() -> None:
    command = [sys.executable, str(EXAMPLE), "--adaptation=speed=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'speed' is not budget, tolerance or threshold" in done.stderr


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("adaptive_attention", ["--length=1024", "--steps=4"], r"^call 3: error 0\.0\d+, \d+"),
        ("long_context", ["--length=2048"], r"^needle at 608: read exactly by 2 of 2 last tiles"),
    ],
)
def test_notebooks_run_and_hold_what_they_assert(name: str, flags: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE.with_name(f"{name}.py")), *flags],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(says, done.stdout, re.MULTILINE)
