"""What holds for every test."""

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def validation_layers_are_silent():
    """Under JAX_AAT_VALIDATION=1 the run fails at its end if a validation layer said anything."""
    yield
    if native := sys.modules.get("jax_aat._native"):
        assert native.validation_messages() == []
