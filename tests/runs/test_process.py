"""Several processes: they meet or say who is missing, share every batch, and train to the numbers of one process."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.runs import peers, process
from jaxgpt.runs.saved_model import load_model
from tests.helpers import WALL_CLOCK, few_reviews


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


# ---- meeting ----


@pytest.mark.parametrize(
    "text",
    [
        "",
        "here",
        "host:80",
        "host:80,2",
        "host:80,2,2",
        "host:80,2,-1",
        "host:x,2,0",
        ":80,2,0",
        "host:0,2,0",
        "host:80,2,0,1",
    ],
)
def test_a_place_that_cant_be_read_is_refused(text):
    with pytest.raises(UserError, match="HOST:PORT,COUNT,INDEX"):
        peers.join_processes(text)


def test_processes_meet_whatever_their_order():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(peers._report_to, "localhost", port, 3, i, 20) for i in (2, 1)]
        first = pool.submit(peers._gather, port, 3, 20)
        assert set(first.result(timeout=20)) == {1, 2}
        for one in others:
            assert set(one.result(timeout=20)) == {0}


def test_the_missing_ones_are_named():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(peers._report_to, "localhost", port, 4, 2, 0.9)
        with pytest.raises(UserError, match=r"of 4 processes, 1, 3 did not connect within 1 s"):
            peers._gather(port, 4, 0.8)
        with pytest.raises(UserError, match=rf"process 0 did not answer at localhost:{port} within 1 s"):
            other.result()


def test_two_with_one_number_and_strangers_are_sent_away():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(peers._gather, port, 3, 20)
        twins = [pool.submit(peers._report_to, "localhost", port, 3, 1, 20) for _ in range(2)]
        for stranger in (b"GET / HTTP/1.1\r\n\r\n", b"", b"jaxgpt 3 x", b"\xff\xfe \xff 1"):
            answer_to(port, stranger)
        with pytest.raises(UserError, match="expects no process 7 of 9"):
            peers._report_to("localhost", port, 9, 7, 20)
        refused = next(iter(wait(twins, return_when=FIRST_COMPLETED).done))
        with pytest.raises(UserError, match="expects no process 1 of 3"):
            refused.result()
        peers._report_to("localhost", port, 3, 2, 20)
        twins.remove(refused)
        assert set(first.result()) == {1, 2} and set(twins[0].result()) == {0}


def answer_to(port: int, words: bytes) -> bytes:
    """What process 0 says to a caller who hangs up after half a second."""
    with socket.socket() as caller:
        while caller.connect_ex(("localhost", port)):
            pass
        caller.sendall(words)
        caller.shutdown(socket.SHUT_WR)
        caller.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            return caller.recv(2)
    return b""


def test_one_that_dies_while_they_meet_may_be_started_again():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(peers._gather, port, 3, 20)
        assert answer_to(port, b"") == b""  # it listens
        dead = socket.create_connection(("localhost", port))
        dead.sendall(b"jaxgpt 3 1")
        dead.close()
        again = pool.submit(peers._report_to, "localhost", port, 3, 1, 20)
        assert set(peers._report_to("localhost", port, 3, 2, 20)) == {0}
        assert set(first.result(timeout=20)) == {1, 2} and set(again.result(timeout=20)) == {0}


# ---- dying ----

MEMBER = """
import os, sys, time
from unittest.mock import MagicMock
for name in ("jax", "jax._src", "jax._src.distributed", "jaxgpt.runs.process"):  # takes longer to import than all else
    sys.modules[name] = MagicMock()
from jaxgpt.runs import peers
from jaxgpt.runs.endings import Stopped, plain_endings
port, index, act = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
peers.SETTLE_SECONDS = 5.0
peers.GRACE_SECONDS = 0.1
with plain_endings() as ending:
    found = peers._gather(port, 3, 20) if index == 0 else peers._report_to("localhost", port, 3, index, 20)
    ending.siblings = peers.Peers(index, 3, found)
    print("joined", flush=True)
    if act == "wait":
        time.sleep(60)
    sys.stdin.readline()
    if act == "error":
        peers.Peers.settle = lambda self: None
        raise peers.UserError("no such data; name another")
    print("fails", flush=True)
    if act == "bug":  # as gloo's, when another process has died
        raise ZeroDivisionError
    if act == "abort":  # as jax's client does then
        os.abort()
    if act == "stop":
        raise Stopped("saved", 75)
"""


def members(*acts: str) -> list[subprocess.Popen[str]]:
    """Three processes that have met, in which nothing else runs."""
    port = free_port()
    found = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(port), str(index), act],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, act in enumerate(acts)
    ]
    assert all(one.stdout.readline() == "joined\n" for one in found)
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_the_others_end_in_one_line_to_be_started_again(victim):
    """Whatever they do: wait, or fail or abort in C++ because of it, even before the death is known."""
    others = ["bug", "abort"] if victim == 0 else ["bug", "wait"]
    acts = [*others[:victim], "wait", *others[victim:]]
    found = members(*acts)
    for one, act in zip(found, acts, strict=True):
        if act != "wait":
            one.stdin.write("now\n")
            one.stdin.flush()
            assert one.stdout.readline() == "fails\n"
    found[victim].kill()
    line = (
        f"stopped: process {victim} of 3 has died; start all processes again: "
        "they resume from the newest checkpoint, if there is one\n"
    )
    for index in {0, 1, 2} - {victim}:
        _, errors = found[index].communicate(timeout=30)
        assert (found[index].returncode, errors) == (75, line), acts[index]
    found[victim].communicate()


def test_an_error_of_one_ends_the_others_with_its_status():
    found = members("wait", "error", "wait")
    found[1].stdin.write("now\n")
    found[1].stdin.flush()
    said = [one.communicate(timeout=30)[1] for one in found]
    assert [one.returncode for one in found] == [2, 2, 2]
    assert said[1] == "error: no such data; name another\n"
    assert said[0] == said[2] == "stopped: process 1 of 3 has ended with status 2; its own last line says why\n"


def test_after_its_own_error_process_0_is_the_last_to_end():
    """Without it, jax aborts the others."""
    found = members("error", "wait", "wait")
    found[1].send_signal(signal.SIGSTOP)
    found[0].stdin.write("now\n")
    found[0].stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        found[0].wait(0.5)
    found[1].send_signal(signal.SIGCONT)
    said = [one.communicate(timeout=30)[1] for one in found]
    assert [one.returncode for one in found] == [2, 2, 2]
    assert said[1] == said[2] == "stopped: process 0 of 3 has ended with status 2; its own last line says why\n"


def test_one_that_stops_with_the_others_lets_them_end_in_their_own_time():
    found = members("stop", "stop", "stop")
    for one in reversed(found):
        assert (one.communicate("now\n", timeout=30)[1], one.returncode) == ("stopped: saved\n", 75)
        time.sleep(0.3)  # longer than the grace for one that would take it for an error


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server, pytest.raises(UserError, match="can't be used here"):
        peers._gather(server.getsockname()[1], 2, 1.0)


def test_one_process_alone_hears_itself():
    assert process.broadcast_from_first({"a": [1, None]}) == {"a": [1, None]}
    process.barrier("alone")
    peers._gather(free_port(), 1, 1.0)


# ---- the same bits ----


@pytest.mark.parametrize(
    ("flags", "recorded"),
    [
        ("", "no"),
        ("--xla_gpu_deterministic_ops", "yes"),
        ("--xla_gpu_deterministic_ops=true --xla_dump_to=x", "yes"),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", "no"),
        ("--xla_gpu_deterministic_ops_of_another_kind=true", "no"),
    ],
)
def test_a_gpu_records_whether_its_bits_repeat(monkeypatch, flags, recorded):
    jax.devices()  # before other flags could make fewer of them, for the tests that follow
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert "deterministic" not in process.describe_rounding({}), "a CPU's always do"
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert process.describe_rounding({})["deterministic"] == recorded


def test_a_run_resumes_bit_for_bit_on_a_gpu_only_if_both_processes_were_deterministic():
    yes, no = {"devices": "1 x H100", "deterministic": "yes"}, {"devices": "1 x H100", "deterministic": "no"}
    assert process.differences_in_rounding(yes, yes) == ""
    for there, now in ((yes, no), (no, yes), (no, no)):
        assert "equal up to rounding" in process.differences_in_rounding(there, now)


def test_deterministic_refuses_flags_in_a_file_which_it_could_not_add_to(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    with pytest.raises(UserError, match="flags.txt"):
        process.request_determinism()


# ---- training ----


def run_experiment(name: str, *flags: str, cache: Path, processes: int, devices: int) -> list[str]:
    """What each process printed, the experiment having succeeded in each."""
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    environment = os.environ | {"XLA_FLAGS": xla, "JAXGPT_CACHE": str(cache)}
    command = [sys.executable, "-m", f"experiments.{name}", *flags]
    port, children, outputs = free_port(), [], [""] * processes
    for index in range(processes):
        place = ["--distributed", f"localhost:{port},{processes},{index}"] if processes > 1 else []
        children.append(
            subprocess.Popen(
                command + place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    readers = []
    for index, child in enumerate(children):

        def read(index: int = index, child: subprocess.Popen[str] = child) -> None:
            outputs[index] = child.communicate(timeout=400)[0]

        readers.append(threading.Thread(target=read))
        readers[-1].start()
    for reader in readers:
        reader.join()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
    return outputs


def assert_same_run(one: Path, two: Path, without_gradient: tuple[str, ...] = ()) -> None:
    """Metrics agree within rtol 1e-5, parameters within 5e-5: Adam enlarges the rounding of small gradients. Leaves
    that nothing pulls at (Adam follows rounding there) are left out."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in a.keys() - set(WALL_CLOCK):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-6, err_msg=name)
    leaves = [jax.tree_util.tree_flatten_with_path(load_model(run).params)[0] for run in (one, two)]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in without_gradient:
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=5e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_go_all_the_way_to_the_numbers_of_one(tmp_path):
    """Every stage, on meshes that divide parameters and heads: preferences and report too, with equal answers."""
    few_reviews(tmp_path / "data")
    flags = ["--preset", "toy", "--preferences.experts", "1", "--pretrain.model.layers", "1"]
    flags += ["--pretrain.mesh.fsdp", "4", "--sft.mesh.tensor", "2", "--dpo.mesh.fsdp", "4", "--ppo.mesh.fsdp", "2"]
    run = functools.partial(run_experiment, "assistant", *flags, cache=tmp_path)
    run("--run", str(tmp_path / "one"), processes=1, devices=4)
    first, second = run("--run", str(tmp_path / "two"), processes=2, devices=2)
    assert "4 x cpu" in first and "in 2 processes" in first and "held-out" in first
    assert "device:" not in second and "held-out" not in second  # one voice
    files = [tmp_path / run / "preferences/train.jsonl" for run in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    shift = ("bias", "head/bias", "model/final_norm/bias")  # of all scores: the softmax doesn't see it
    for stage in ("pretrain", "sft", "reward", "ppo", "dpo"):
        assert_same_run(tmp_path / "one" / stage, tmp_path / "two" / stage, shift if stage == "reward" else ())
    reports = [json.loads((tmp_path / run / "report/report.json").read_text()) for run in ("one", "two")]
    for a, b in zip(jax.tree.leaves(reports[0]), jax.tree.leaves(reports[1]), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
