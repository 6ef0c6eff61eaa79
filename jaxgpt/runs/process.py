"""The process an experiment runs in: its allocator, compilation cache, devices and sibling processes."""

import contextlib
import ctypes
import json
import logging
import os
import platform
import socket
import sys
import time
import warnings
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.errors import UserError
from jaxgpt.files import cache_root


def prepare_process() -> None:
    """Set up the allocator and the on-disk cache of compiled programs. Call once, before any array exists."""
    configure_malloc()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax also logs each error it raises, with a traceback
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_root() / "xla"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # once is enough
            print(
                f"note: can't write to {folder}, so programs are compiled again at each start; "
                "set JAXGPT_CACHE to a folder that you may write to",
                file=sys.stderr,
            )
        jax.config.update("jax_compilation_cache_dir", str(folder))


def configure_malloc() -> bool:
    """Make glibc keep freed memory instead of returning each large array to the kernel: training on a CPU gets 1.4
    times faster. True if it was set; without glibc, or with JAXGPT_MALLOC=0, nothing changes."""
    if os.environ.get("JAXGPT_MALLOC") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_… of <malloc.h>
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, -1), mallopt(arena_max, 1)])  # -1: never


def describe_devices() -> str:
    """For example "device: cpu (2 cores), jax 0.10.2" or "device: 8 x NVIDIA H100, jax 0.12.0"."""
    devices = jax.devices()
    name = devices[0].device_kind
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"cpu ({cores} cores)"
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"device: {count}{name}{processes}, jax {jax.__version__}"


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


# ---- several processes ----


def join_processes(text: str, patience: float = 300.0) -> None:
    """Join several processes that share their devices (`jax.distributed`). Call before any array exists.

    "auto" asks the environment (a Cloud TPU slice, GKE, Slurm, Open MPI). "HOST:PORT,COUNT,INDEX" gives the address of
    process 0, the number of processes, and the index of this one. UserError if the text is neither, or if processes
    are still missing after `patience` seconds, naming them: jax alone would abort with a C++ stack trace.
    """
    if text == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed auto found no cluster here ({_first_line(error)}); "
                "give --distributed HOST:PORT,COUNT,INDEX"
            ) from None
        return
    host, port, count, index = _parse_address(text)
    if index == 0:
        _gather(port, count, patience)
    else:
        _report_to(host, port, count, index, patience)
    jax.distributed.initialize(f"{host}:{port}", num_processes=count, process_id=index)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _parse_address(text: str) -> tuple[str, int, int, int]:
    with contextlib.suppress(ValueError):
        address, *numbers = text.split(",")
        host, _, port_text = address.rpartition(":")
        port, (count, index) = int(port_text), map(int, numbers)
        if host and 0 < port < 2**16 and 0 <= index < count:
            return host, port, count, index
    raise UserError(
        f"--distributed {text} is neither auto nor HOST:PORT,COUNT,INDEX with INDEX below COUNT (10.0.0.2:8476,4,0)"
    )


def _gather(port: int, count: int, patience: float) -> None:
    """Process 0: wait until every other process has connected, then release them all."""
    deadline = time.monotonic() + patience
    waiting: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as open_sockets:
        try:
            server = open_sockets.enter_context(socket.create_server(("", port), backlog=count))
        except OSError as error:
            raise UserError(f"--distributed: port {port} can't be used here ({error.strerror}); use another") from None
        while len(waiting) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller = open_sockets.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in waiting)
                raise UserError(
                    f"--distributed: of {count} processes, {missing} did not connect within {patience:.0f} s; "
                    "start them, and check that they can reach this machine's port"
                ) from None
            try:
                caller.settimeout(10)
                word, of, index = caller.recv(64).decode("ascii", "replace").split()
                if word == "jaxgpt" and int(of) == count and 0 < int(index) < count and int(index) not in waiting:
                    waiting[int(index)] = caller
                    continue
                caller.sendall(b"no")
            except (OSError, ValueError):
                pass  # not one of our processes
            caller.close()
        for caller in waiting.values():
            with contextlib.suppress(OSError):
                caller.sendall(b"go")
        for caller in waiting.values():  # let them close first: the side that does keeps the port busy
            with contextlib.suppress(OSError):
                caller.recv(1)


def _report_to(host: str, port: int, count: int, index: int, patience: float) -> None:
    """Any other process: connect to process 0 and wait until all are there."""
    deadline = time.monotonic() + patience
    answer, reason = b"", ""
    while time.monotonic() < deadline:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=min(left, 10)) as caller:
                caller.sendall(f"jaxgpt {count} {index}".encode())
                caller.settimeout(left)
                answer = caller.recv(2)
        except OSError as error:
            reason = error.strerror or str(error)
        if answer == b"go":
            return
        if answer == b"no":
            raise UserError(f"--distributed: {host}:{port} expects no process {index} of {count}; check the numbers")
        time.sleep(0.2)
    raise UserError(
        f"--distributed: process 0 did not answer at {host}:{port} within {patience:.0f} s ({reason or 'no answer'}); "
        "start it, and check the address"
    )
