"""The right to write into a run folder: for one process at a time, and only while the folder stays where it was.

The file .lock in the folder names the holder. A lock of the file system keeps others out; where there are none (some
network file systems and buckets), a lease does: the holder rewrites the file every few seconds, and whoever finds it
unchanged for longer than that takes it over. That needs neither clocks that agree nor a rename in one step.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError

BEAT = 5.0  # seconds between two rewritings of a lease
PATIENCE = 6 * BEAT  # for which an unchanged lease is respected


class Claim:
    """`take` it, `check` it before each save, and `release` it. `say` tells the user why it takes a while."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.path, self.say = folder, folder / ".lock", say
        self.id = secrets.token_hex(16)
        self._file: Any = None
        self._released = threading.Event()
        self._beats: threading.Thread | None = None

    def take(self) -> None:
        """Hold the folder until `release`, or until the process ends. UserError if another process holds it."""
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  and don't empty what another one holds
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise self._in_use() from None
        except OSError:  # no locks here
            self._take_lease()
        self._write(0)

    def check(self) -> None:
        """UserError if the folder is no longer there, is another one, or was taken over: nothing must be saved then."""
        for attempt in range(3):
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(self.path.read_bytes())
                if isinstance(found, dict) and found.get("id") == self.id:
                    return
            time.sleep(0.1 * attempt)  # a lease may be in the middle of being rewritten
        raise UserError(
            f"the run folder {self.folder} was moved, deleted or taken over while this run was working in it, so "
            "nothing more is saved there; put it back, and the same command resumes from its newest checkpoint"
        )

    def release(self) -> None:
        """Let others in."""
        self._released.set()
        if self._beats is not None:
            self._beats.join()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _in_use(self) -> UserError:
        return UserError(f"{self.folder} is in use by another process; choose another --run")

    def _write(self, beat: int) -> None:
        content = {"id": self.id, "host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
        self._file.truncate(0)
        self._file.write(json.dumps(content).encode())

    # ---- file systems without locks ----

    def _take_lease(self) -> None:
        before = self.path.read_bytes()
        if before and not _ended(before):
            self.say(f"{self.folder} may be in use, and its file system has no locks: waiting {PATIENCE:.0f} s to see")
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                time.sleep(BEAT / 5)
                if self.path.read_bytes() != before:
                    raise self._in_use()
        self._write(0)
        time.sleep(BEAT / 5)  # another one may be doing the same: the last to write holds it
        with contextlib.suppress(ValueError):
            if json.loads(self.path.read_bytes()).get("id") == self.id:
                self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
                self._beats.start()
                return
        raise self._in_use()

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(BEAT):
            beat += 1
            with contextlib.suppress(OSError, UserError):
                self.check()  # never over another one's
                self._write(beat)
        with contextlib.suppress(OSError, UserError):
            self.check()
            self._file.truncate(0)  # the next one need not wait


def _ended(content: bytes) -> bool:
    """Whether the process that wrote a lease ran on this machine and has ended."""
    try:
        found = json.loads(content)
        if found["host"] != socket.gethostname():
            return False
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return False
    return False
