"""Several processes of one run: how they connect, and how the others end when one of them dies.

`jax.distributed` alone does neither well (jax 0.10.2, two processes on a CPU). It waits 300 s for a process that never
starts and 54 to 100 s for one that dies, and then aborts with a C++ stack trace and status 134. A shorter
`heartbeat_timeout_seconds` ends in the same abort and mistakes slow processes for dead ones;
`jax_enable_recoverability` leaves the others waiting in a collective that the dead process never enters.

So process 0 keeps a connection to every other process from the start. The kernel closes it when a process dies, and
keepalive probes notice within 25 s that a machine is gone. In each process a thread waits for that; jax's own heartbeat
remains as a fallback.
"""

import contextlib
import ctypes
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src import distributed  # the only place that knows the coordinator's address

from jaxgpt.errors import UserError, first_line
from jaxgpt.runs.process import broadcast_from_first

DIED = -1  # in place of an exit status
SETTLE_SECONDS = 2.0  # after an error: time to learn whether another process's death caused it
GRACE_SECONDS = 3.0  # after another process's error: time for this one to end with its own message
AUTO_SECONDS = 60.0  # time for the processes that a cluster started to connect to process 0
PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds; the last is a count


class Peers:
    """Watches the other processes. When one dies, this process ends with one line and status 75, which launch scripts
    take as "start it again". When one ends with an error, this process ends with the same status."""

    def __init__(self, index: int, count: int, connections: dict[int, socket.socket]) -> None:
        self.index, self.count, self._connections = index, count, connections
        self._leaving = False
        self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._watcher.start()
        # When process 0 dies, jax's client aborts this process too. A handler in C delays that until the watcher has
        # ended the process; Python's own signal handlers would wait for the main thread.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: time.sleep(SETTLE_SECONDS + GRACE_SECONDS))
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._on_abort)

    def settle(self) -> None:
        """Call this after an error. If another process's death caused it, the watcher ends this process meanwhile."""
        time.sleep(SETTLE_SECONDS)

    def leave(self, status: int, *, together: bool) -> None:
        """Tell the others that this process is about to end. With `together`, all of them end here, and this waits for
        them. Otherwise process 0 waits a little: without it, jax would abort the others before they can say why."""
        if together:
            jax.distributed.shutdown()
        self._leaving = not together
        self._tell(self.index, 0 if together else status)
        if self.index == 0 and not together:
            with contextlib.suppress(KeyboardInterrupt):
                self._watcher.join(SETTLE_SECONDS + GRACE_SECONDS)

    def _tell(self, index: int, status: int) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{index} {status}\n".encode())

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    index, status = self._read(key.data)
                    if status != 0 and not self._leaving:
                        self._end(index, status)
                    selector.unregister(key.fileobj)

    def _read(self, peer: int) -> tuple[int, int]:
        """The index and exit status of the process that has ended, from a peer's message or closed connection."""
        with contextlib.suppress(OSError, ValueError):
            index, status = map(int, self._connections[peer].recv(64).split(b"\n")[0].split())
            return index, status
        return peer, DIED

    def _end(self, index: int, status: int) -> NoReturn:
        if self.index == 0:
            self._tell(index, status)
        if status != DIED:
            time.sleep(GRACE_SECONDS)
        what, advice = "has died", "start all processes again: they resume from the newest checkpoint, if there is one"
        if status != DIED:
            what, advice = f"has ended with status {status}", "its own last line says why"
        with contextlib.suppress(OSError):
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
            os.write(2, f"stopped: process {index} of {self.count} {what}; {advice}\n".encode())
        if self.index == 0 and self.count > 2:  # without process 0, jax would abort the others
            time.sleep(0.5)
        os._exit(75 if status == DIED else status)


def join_processes(text: str, patience: float = 300.0) -> Peers:
    """Join several processes that share their devices (`jax.distributed`), and watch them. Call before any array
    exists.

    "auto" asks the environment (a Cloud TPU slice, GKE, Slurm, Open MPI). "HOST:PORT,COUNT,INDEX" gives the address of
    process 0, the number of processes, and the index of this one. UserError if the text is neither, or if processes
    are still missing after `patience` seconds, naming them.
    """
    if text == "auto":
        return _join_cluster()
    host, port, count, index = _parse_address(text)
    connections = _meet(host, port, count, index, patience)
    peers = Peers(index, count, connections)
    jax.distributed.initialize(f"{host}:{port}", num_processes=count, process_id=index)
    return peers


def _join_cluster() -> Peers:
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed auto found no cluster here ({first_line(error)}); give --distributed HOST:PORT,COUNT,INDEX"
        ) from None
    index, count = jax.process_index(), jax.process_count()
    connections: dict[int, socket.socket] = {}
    host = str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")
    port = broadcast_from_first(_free_port() if index == 0 else 0)
    try:
        connections = _meet(host, port, count, index, AUTO_SECONDS)
    except UserError as error:
        print(f"note: the others will notice late if a process dies ({error})", file=sys.stderr, flush=True)
    return Peers(index, count, connections)


def _meet(host: str, port: int, count: int, index: int, patience: float) -> dict[int, socket.socket]:
    return _gather(port, count, patience) if index == 0 else _report_to(host, port, count, index, patience)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


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


def _probe(connection: socket.socket) -> socket.socket:
    """Have the kernel close the connection when the other machine no longer answers; returns it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _gather(port: int, count: int, patience: float) -> dict[int, socket.socket]:
    """Process 0: wait until every other process has connected, then release them all. Returns their connections, by
    index. A process that dies in the meantime may be started again."""
    deadline = time.monotonic() + patience
    waiting: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as open_sockets:
        try:
            server = open_sockets.enter_context(socket.create_server(("", port), backlog=count))
        except OSError as error:
            raise UserError(f"--distributed: port {port} can't be used here ({error.strerror}); use another") from None
        while len(waiting) < count - 1:
            ready = select.select([server, *waiting.values()], [], [], max(deadline - time.monotonic(), 0.001))[0]
            for index, caller in list(waiting.items()):
                if caller in ready:  # they send nothing more, so it has died
                    waiting.pop(index).close()
            if not ready:
                for caller in waiting.values():
                    caller.close()
                missing = ", ".join(str(i) for i in range(1, count) if i not in waiting)
                raise UserError(
                    f"--distributed: of {count} processes, {missing} did not connect within {patience:.0f} s; "
                    "start them, and check that they can reach this machine's port"
                )
            if server not in ready:
                continue
            caller = _probe(server.accept()[0])
            try:
                caller.settimeout(10)
                word, of, index_text = caller.recv(64).decode("ascii", "replace").split()
                index = int(index_text)
                if word == "jaxgpt" and int(of) == count and 0 < index < count and index not in waiting:
                    waiting[index] = caller
                    continue
                caller.sendall(b"no")
            except (OSError, ValueError):
                pass  # not one of our processes
            caller.close()
        for caller in waiting.values():
            with contextlib.suppress(OSError):
                caller.sendall(b"go")
            caller.settimeout(None)
    return waiting


def _report_to(host: str, port: int, count: int, index: int, patience: float) -> dict[int, socket.socket]:
    """Any other process: connect to process 0 and wait until all are there. Returns {0: connection}."""
    deadline = time.monotonic() + patience
    reason = ""
    while time.monotonic() < deadline:
        left = deadline - time.monotonic()
        answer = b""
        with contextlib.ExitStack() as failed:
            try:
                caller = _probe(socket.create_connection((host, port), timeout=min(left, 10)))
                failed.callback(caller.close)
                caller.sendall(f"jaxgpt {count} {index}".encode())
                caller.settimeout(left)
                answer = caller.recv(2)
            except OSError as error:
                reason = error.strerror or str(error)
            if answer == b"go":
                failed.pop_all()
                caller.settimeout(None)
                return {0: caller}
        if answer == b"no":
            raise UserError(f"--distributed: {host}:{port} expects no process {index} of {count}; check the numbers")
        time.sleep(0.2)
    raise UserError(
        f"--distributed: process 0 did not answer at {host}:{port} within {patience:.0f} s ({reason or 'no answer'}); "
        "start it, and check the address"
    )
