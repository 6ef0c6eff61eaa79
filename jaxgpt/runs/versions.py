"""The versions of what drives an accelerator: they decide how numbers are rounded, as jax's own version does."""

import contextlib
import importlib
import importlib.metadata
import re
import subprocess
from pathlib import Path

import jax

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def accelerator_versions() -> dict[str, str]:
    """{"cuda": "13.0", "cudnn": "9.12.0", "driver": "580.65.06"} on an NVIDIA GPU, {"libtpu": "0.0.50.1"} on a TPU, and
    an empty dict on a CPU. What can't be found out is left out; nothing is raised."""
    platform = jax.devices()[0].platform
    found = {"gpu": _gpu_versions, "tpu": _tpu_versions}.get(platform, dict)()
    return {name: version for name, version in found.items() if version}


def _gpu_versions() -> dict[str, str]:
    cuda, cudnn = _library_version("cuda_runtime"), _library_version("cudnn")
    return {
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",  # 13050 is 13.5
        "cudnn": f"{cudnn // 10_000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else "",  # 92801 is 9.28.1
        "driver": driver_version(),
    }


def _tpu_versions() -> dict[str, str]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return {"libtpu": importlib.metadata.version("libtpu")}
    return {}


def _library_version(name: str) -> int:
    """The version of a CUDA library as its own number, 0 if it can't be asked. JAX has no public function for this."""
    with contextlib.suppress(Exception):
        versions = importlib.import_module("jax._src.lib").cuda_versions
        return int(getattr(versions, f"{name}_get_version")())
    return 0


def driver_version() -> str:
    """The version of NVIDIA's driver, an empty string if none is found: from the kernel, or else from nvidia-smi."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", DRIVER_FILE.read_text())
        if found:
            return found[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return lines[0] if lines else ""
    return ""
