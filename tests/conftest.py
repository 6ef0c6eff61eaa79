"""Tests run on the CPU, split into eight devices so that sharding is real."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def strict() -> Iterator[None]:
    """No implicit dtype promotion, no leaked tracers."""
    with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
        yield
