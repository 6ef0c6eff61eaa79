"""One process at a time works in a run folder, on file systems with locks and without."""

import contextlib
import json
import socket
import subprocess
import sys

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
        with pytest.raises(UserError, match="is in use by another process"):
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


def test_a_claim_that_was_taken_over_is_noticed(claim, tmp_path):
    one = claim()
    one.take()
    (tmp_path / ".lock").write_text(json.dumps({"id": "another"}))
    with pytest.raises(UserError, match="was moved, deleted or taken over"):
        one.check()
