"""What holds for every test: eight CPU devices, a seed, silent validation layers."""

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import pytest

# What is compared with would multiply float32 by TF32 on a GPU.
jax.config.update("jax_default_matmul_precision", "highest")

# In the environment, so that the processes of pytest-xdist share it.
SEED = int(
    os.environ.setdefault("JAX_AAT_TEST_SEED", str(np.random.SeedSequence().entropy % 2**32))
)


def pytest_report_header() -> str:
    return f"seed: {SEED} (JAX_AAT_TEST_SEED repeats it)"


@pytest.fixture(scope="session", autouse=True)
def validation_layers_are_silent():
    """Under JAX_AAT_VALIDATION=1 the run fails at its end if a validation layer said anything."""
    yield
    if native := sys.modules.get("jax_aat._native"):
        assert native.validation_messages() == []


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
    """Thousands of them would fill the memory, and no other module needs them."""
    yield
    jax.clear_caches()


@pytest.fixture
def set_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str, Any], None]]:
    """`monkeypatch.setattr` of what is read while a call is traced: no other trace is reused."""

    from jax_aat import router

    def forget() -> None:
        jax.clear_caches()
        router._rows_by_shape.cache_clear()

    def set_and_forget(target: Any, name: str, value: Any) -> None:
        monkeypatch.setattr(target, name, value)
        forget()

    yield set_and_forget
    forget()


@pytest.fixture(params=["xla", "vulkan"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this run and this test, the same for both implementations."""
    name = request.node.nodeid.replace("vulkan", "xla")
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])
