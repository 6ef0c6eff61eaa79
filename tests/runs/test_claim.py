"""One process at a time works in a run folder, on file systems with locks and without."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxgpt.errors import UserError
from jaxgpt.runs.claim import Claim
from tests.torture.places import no_locks


@pytest.fixture
def claim(tmp_path):
    def make() -> Claim:
        made.append(Claim(tmp_path, said.append))
        return made[-1]

    made: list[Claim] = []
    said: list[str] = []
    yield make
    for one in made:
        one.release()


@pytest.mark.parametrize("locks", [True, False])
def test_one_at_a_time(claim, locks):
    with contextlib.nullcontext() if locks else no_locks():
        first, second = claim(), claim()
        first.take()
        first.check()
        with pytest.raises(UserError, match=rf"is in use by another process \(pid {os.getpid()} on "):
            second.take()
        first.check()
        first.release()
        second.take()
        second.check()


def test_a_lease_whose_process_has_ended_is_taken_over_at_once(claim, tmp_path):

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / ".lock").write_text(json.dumps({"id": "x", "host": socket.gethostname(), "pid": ended.pid, "beat": 1}))
    with no_locks():
        one = claim()
        one.take()
        one.check()


def test_the_file_is_never_empty_while_it_is_held(claim, tmp_path, monkeypatch):
    """Whoever reads it in the middle of a rewriting must not take the folder for free."""
    one, found = claim(), []
    one.take()
    for name in ("write", "truncate"):
        real = getattr(one._file, name)

        def spied(*words: object, real=real) -> object:
            found.append((tmp_path / ".lock").read_bytes())
            result = real(*words)
            found.append((tmp_path / ".lock").read_bytes())
            return result

        monkeypatch.setattr(one, "_file", Spied(one._file, {name: spied}))
    for beat in (9, 10, 11):
        one._write(beat)
        one.check()
    assert all(json.loads(content)["id"] == one.id for content in found)


class Spied:
    """A file some of whose methods are others."""

    def __init__(self, file, others):
        self.file, self.others = file, others

    def __getattr__(self, name):
        return self.others[name] if name in self.others else getattr(self.file, name)


@pytest.mark.parametrize("taken", [True, False])
def test_a_holder_that_slept_notices_whether_another_one_took_over(claim, tmp_path, monkeypatch, taken):
    """As after a suspended machine: its lease grew older than others respect."""
    with no_locks():
        sleeper, other = claim(), claim()
        sleeper.take()
        sleeper._released.set()
        sleeper._beats.join()
        sleeper._write(7)  # it beats no more
        if taken:
            other.take()
        sleeper._released.clear()
        sleeper._beats = threading.Thread(target=sleeper._beat)
        sleeper._beats.start()
        time.sleep(0.2)
        if not taken:
            sleeper.check()
        else:
            other.check()
            with pytest.raises(UserError, match="was moved, deleted or taken over"):
                sleeper.check()


def test_a_claim_that_was_taken_over_is_noticed(claim, tmp_path):
    one = claim()
    one.take()
    (tmp_path / ".lock").write_text(json.dumps({"id": "another"}))
    with pytest.raises(UserError, match="was moved, deleted or taken over"):
        one.check()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_what_a_link_points_to_is_not_overwritten(claim, tmp_path, link):
    other = tmp_path / "other"
    other.write_text("precious")
    link(other, tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock is a link, and what it points to would be overwritten; remove it"):
        claim().take()
    assert other.read_text() == "precious"
