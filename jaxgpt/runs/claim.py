"""A claim on a run folder: one process at a time may write there, and only while the folder stays where it was.

The file .lock in the folder names the holder. A file lock keeps others out. File systems without locks (some network
file systems and buckets) get a lease instead: the holder rewrites the file every few seconds, and a process that finds
it unchanged for much longer takes it over. This needs neither synchronised clocks nor atomic renames.
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
from jaxgpt.files import WATCHED, is_link, refuse_no_file

BEAT = 5.0  # seconds after which the holder rewrites a lease
PATIENCE = 6 * BEAT  # seconds for which an unchanged lease is respected
SIZE = 512  # bytes of the file: it is overwritten in place, so that nobody finds it empty while it is held


class Claim:
    """`take` it, `check` it before each save, and `release` it. `say` tells the user why taking it has to wait."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.path, self.say = folder, folder / ".lock", say
        self._place = Path(os.path.abspath(folder))
        self.id = secrets.token_hex(16)
        self._file: Any = None
        self._released = threading.Event()
        self._beats: threading.Thread | None = None

    def take(self) -> None:
        """Hold the folder until `release`, or until the process ends. UserError if another process holds it."""
        refuse_no_file(self.path)
        if is_link(self.path):
            raise UserError(f"{self.path} is a link, and what it points to would be overwritten; remove it")
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)  # "w" would empty another holder's
        self._file = open(handle, "r+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise self._in_use() from None
        except OSError:  # no locks here
            self._take_lease()
        self._write(0)
        WATCHED[self._place] = self.check

    def check(self) -> None:
        """UserError if the folder was moved, deleted, replaced or taken over, so that nothing may be saved there."""
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
        """Give the folder up."""
        self._released.set()
        if WATCHED.get(self._place) == self.check:
            del WATCHED[self._place]
        if self._beats is not None:
            self._beats.join()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _in_use(self) -> UserError:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self.path.read_bytes())
            holder += f" (pid {int(found['pid'])} on {found['host']})"
        return UserError(f"{self.folder} is in use by {holder}; wait until it ends, or choose another --run")

    def _write(self, beat: int) -> None:
        content = {"id": self.id, "host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
        os.pwrite(self._file.fileno(), json.dumps(content).encode().ljust(SIZE), 0)
        self._file.truncate(SIZE)

    # ---- file systems without locks ----

    def _take_lease(self) -> None:
        before = self.path.read_bytes()
        if before and not _holder_ended(before):
            self.say(f"{self.folder} may be in use, and its file system has no locks: waiting {PATIENCE:.0f} s to see")
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                time.sleep(BEAT / 5)
                if self.path.read_bytes() != before:
                    raise self._in_use()
        self._write(0)
        time.sleep(BEAT / 5)  # another process may be doing the same: the last to write holds it
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
                self.check()  # never overwrite another holder's lease
                self._write(beat)
        with contextlib.suppress(OSError, UserError):
            self.check()
            self._file.truncate(0)  # so that the next process need not wait


def _holder_ended(content: bytes) -> bool:
    """Whether a lease was written by a process on this machine that has ended."""
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
