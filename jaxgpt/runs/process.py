"""The process an experiment runs in: its allocator, compilation cache and devices; `runs.peers` has its siblings."""

import contextlib
import ctypes
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.runs.versions import accelerator_versions


def prepare_process() -> None:
    """Set up the allocator and the on-disk cache of compiled programs. Call once, before any array exists."""
    configure_malloc()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax also logs each error it raises, with a traceback
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = str(cache_root() / "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
    _say_once_that_programs_are_not_cached(folder)


def _say_once_that_programs_are_not_cached(folder: str) -> None:
    """Replace JAX's warnings, one for every program, by one note. A cache that can't be used (no permission, a full
    disk, a damaged entry) only costs time."""
    show = warnings.showwarning
    said: set[str] = set()

    def note(message: Warning | str, *rest: Any, **more: Any) -> None:
        found = re.match(r"Error (reading|writing) persistent compilation cache entry for .*?: (.*)", str(message))
        if not found:
            return show(message, *rest, **more)
        verb = {"reading": "read from", "writing": "written to"}[found[1]]
        if verb not in said:
            said.add(verb)
            print(
                f"note: compiled programs can't be {verb} {folder} ({found[2]}), so they are compiled again at each "
                "start; free some space, delete that folder, or set JAXGPT_CACHE to one that you may write to",
                file=sys.stderr,
            )

    warnings.showwarning = note
    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache")


def configure_malloc() -> bool:
    """Make glibc keep freed memory instead of returning each large array to the kernel: training on a CPU gets 1.4
    times faster. True if it was set; without glibc, or with JAXGPT_MALLOC=0, nothing changes."""
    if os.environ.get("JAXGPT_MALLOC") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_… of <malloc.h>
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, -1), mallopt(arena_max, 1)])  # -1: never


DETERMINISTIC_FLAGS = (
    "--xla_gpu_deterministic_ops=true",  # no sum in a random order, no kernel chosen by its measured time
    "--xla_gpu_enable_triton_gemm=false",  # those that XLA prepares for Triton may not compile with that flag
    "--xla_gpu_shard_autotuning=false",  # several processes would wait for measurements that nobody makes
)


def request_determinism() -> None:
    """Have the same program give the same bits in every run on the same kind of GPU (docs/runs.md says at what cost).
    Changes nothing on a CPU or TPU. Call before a device is used. Flags that XLA_FLAGS already has are left as they
    are; UserError if it is the name of a file."""
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):
        raise UserError(
            f"XLA_FLAGS is the name of a file ({given}); for --deterministic, set it to the flags themselves"
        )
    names = {word.partition("=")[0] for word in given.split()}
    missing = [flag for flag in DETERMINISTIC_FLAGS if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # sums in the NVLink switches come in no fixed order
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # kernels that earlier runs measured


def _is_deterministic() -> bool:
    """Whether XLA_FLAGS asks for the same bits in every run; the last of several values counts."""
    values = re.findall(r"--xla_gpu_deterministic_ops(?:=(\S+)|(?!\S))", os.environ.get("XLA_FLAGS", ""))
    return bool(values) and values[-1].lower() in ("", "1", "true")


def describe_devices() -> str:
    """For example "device: cpu (2 cores), jax 0.10.2" or "device: 8 x NVIDIA H100, jax 0.12.0"."""
    devices = jax.devices()
    name = devices[0].device_kind
    if devices[0].platform == "cpu":
        cores = count_cores()
        name = f"cpu ({cores} core{'s' * (cores != 1)})"
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"device: {count}{name}{processes}, jax {jax.__version__}"


PACKAGES = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
ROUND_NOTHING = {"python", "jaxgpt", "orbax-checkpoint", "numpy"}  # versions that resuming doesn't compare


def versions() -> dict[str, str]:
    """The versions that a run records: Python's, those of PACKAGES, and of what drives a GPU or TPU."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | accelerator_versions()


def describe_rounding(arrays: Any) -> dict[str, str]:
    """Everything that decides how numbers are rounded: runs for which it is equal give the same bits. `arrays`: a tree
    of arrays or shapes, for its mesh."""
    devices = jax.devices()
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arrays))
    mesh: Mapping[str, int] = next(
        (one.mesh.shape for one in shardings if isinstance(one, jax.sharding.NamedSharding)), {}
    )
    found = {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "mesh": " x ".join(f"{name} {size}" for name, size in mesh.items()),
    }
    if devices[0].platform == "cpu":
        found["cpu"] = f"{cpu_kind()}, {count_cores()} cores"
    if devices[0].platform == "gpu":
        found["deterministic"] = "yes" if _is_deterministic() else "no"
    return found | {name: version for name, version in versions().items() if name not in ROUND_NOTHING}


def differences_in_rounding(there: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What to add to "resumed" if the bits may differ, or an empty string. `there`: from the checkpoint."""
    changed = [
        f"{name} {there[name] or 'none'} before, {now.get(name) or 'none'} now"
        for name in there
        if there[name] != now.get(name)
    ]
    if not changed and now.get("deterministic") == "no":
        changed = ["a GPU without --deterministic"]
    return f"; equal up to rounding, not bit for bit ({'; '.join(changed)})" if changed else ""


def count_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_kind() -> str:
    """For example "AMD EPYC, family 25, model 17", since XLA compiles for this CPU."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        kinds = [f"{name.split()[-1]} {fields[name]}" for name in ("cpu family", "model") if name in fields]
        return ", ".join([fields["model name"], *kinds])
    return platform.processor() or platform.machine()


def print_device() -> None:
    """One line on stdout, from the first process only."""
    if jax.process_index() == 0:
        print(describe_devices(), flush=True)


def broadcast_from_first(value: Any) -> Any:
    """Broadcast the first process's JSON value to every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    buffer = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = data
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).decode())


def barrier(name: str) -> None:
    """Wait until every process has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxgpt {name}")
