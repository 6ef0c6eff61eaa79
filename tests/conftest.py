"""Tests run on the CPU, split into eight devices so that sharding is real.

Most of their time is spent compiling small programs once. So the machine code is left unoptimised (XLA's own passes
all run), each program is compiled in one piece, jaxlib 0.10 takes its older and quicker path, operations carry no stack
traces, and Python's garbage collector leaves alone what was imported. The larger programs are kept in .pytest_cache for
the next run. Each flag can be changed from outside:
XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

LONGEST = ("stages", "process", "soak", "pages", "sharding", "many", "generate", "scripts", "ppo", "faults", "proofs")
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones abort at a flag that they no longer know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # half of the compilation time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
for flag in FLAGS:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_debug_key_reuse", True)
# The same cases every time, so that a change fails by its own fault; new ones: --hypothesis-profile=default.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: several processes then end at about the same time."""
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Tracing makes millions of short-lived objects; scanning every imported module for each of them took a tenth of
    the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


@pytest.fixture
def strict() -> Iterator[None]:
    """No implicit dtype promotion, no leaked tracers."""
    with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
        yield
