"""``python -m jax_aat info``, in processes of their own: it depends on the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax_aat


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jax_aat", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_info_names_device_kernels_and_caches() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    device = jax_aat.default_device()
    assert device is not None
    assert f"device {device.index}: {device.name}" in done.stdout
    assert device.driver in done.stdout
    assert "bufferDeviceAddress" in done.stdout
    for kernel in ("attend_forward", "attend_tangent", "attend_backward_dq"):
        assert kernel in done.stdout
    assert "pipeline cache: " in done.stdout
    assert "JAX_AAT_VALIDATION" in done.stdout


def test_info_says_why_a_kernel_is_chosen() -> None:
    lines = [re.split(" {2,}", line.strip()) for line in run("info").stdout.splitlines()]
    float32 = [line for line in lines if line[:2] == ["forward", "float32"]]
    assert float32
    assert all(line[-1] == "matrix units do not multiply float32" for line in float32)


def test_info_without_a_driver_says_what_to_install() -> None:
    done = run("info", VK_ICD_FILENAMES="/nowhere", VK_DRIVER_FILES="/nowhere")
    assert done.returncode == 1
    assert "Vulkan cannot be used: No Vulkan driver was found. Install" in done.stdout
    assert "implementation=None means 'xla' here" in done.stdout


def test_info_with_a_device_that_is_not_there() -> None:
    done = run("info", JAX_AAT_DEVICE="no such device")
    assert done.returncode == 1
    assert "JAX_AAT_DEVICE=no such device" in done.stdout


def test_info_with_vulkan_switched_off() -> None:
    done = run("info", JAX_AAT_DISABLE="1")
    assert done.returncode == 1
    assert "JAX_AAT_DISABLE=1 switches Vulkan off: unset it" in done.stdout


def test_no_command_prints_the_usage() -> None:
    done = run()
    assert done.returncode == 2
    assert "usage: python -m jax_aat" in done.stderr
