"""What is recorded about an accelerator's libraries and driver, and that nothing of it has to be there."""

import subprocess
from types import SimpleNamespace

import jax
import pytest

from jaxgpt.runs import versions

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU without libraries, driver or nvidia-smi."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(versions, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(jax._src.lib, "cuda_versions", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_a_cpu_has_none():
    assert versions.accelerator_versions() == {}


def test_what_is_missing_is_left_out(gpu):
    assert versions.accelerator_versions() == {}


def test_numbers_of_libraries_become_versions(gpu, monkeypatch):
    libraries = SimpleNamespace(cuda_runtime_get_version=lambda: 12090, cudnn_get_version=lambda: 91002)
    monkeypatch.setattr(jax._src.lib, "cuda_versions", libraries)
    assert versions.accelerator_versions() == {"cuda": "12.9", "cudnn": "9.10.2"}


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.129.03"), (OPEN, "580.65.06")])
def test_the_driver_is_read_from_the_kernel(gpu, text, version):
    (gpu / "version").write_text(text)
    assert versions.accelerator_versions() == {"driver": version}


def test_or_else_nvidia_smi_is_asked(gpu, monkeypatch):
    def run(command, **_):
        assert command[0] == "nvidia-smi"
        return SimpleNamespace(stdout="570.1.2\n570.1.2\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert versions.accelerator_versions() == {"driver": "570.1.2"}
