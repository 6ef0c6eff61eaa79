"""Several processes: they meet or say who is missing, share every batch, and train to the numbers of one process."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.runs import process
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
        process.join_processes(text)


def test_processes_meet_whatever_their_order():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(process._report_to, "localhost", port, 3, i, 20) for i in (2, 1)]
        first = pool.submit(process._gather, port, 3, 20)
        for one in (first, *others):
            assert one.result(timeout=20) is None


def test_the_missing_ones_are_named():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(process._report_to, "localhost", port, 4, 2, 0.9)
        with pytest.raises(UserError, match=r"of 4 processes, 1, 3 did not connect within 1 s"):
            process._gather(port, 4, 0.8)
        with pytest.raises(UserError, match=rf"process 0 did not answer at localhost:{port} within 1 s"):
            other.result()


def test_two_with_one_number_and_strangers_are_sent_away():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(process._gather, port, 3, 20)
        twins = [pool.submit(process._report_to, "localhost", port, 3, 1, 20) for _ in range(2)]
        for stranger in (b"GET / HTTP/1.1\r\n\r\n", b"", b"jaxgpt 3 x", b"\xff\xfe \xff 1"):
            answer_to(port, stranger)
        with pytest.raises(UserError, match="expects no process 7 of 9"):
            process._report_to("localhost", port, 9, 7, 20)
        refused = next(iter(wait(twins, return_when=FIRST_COMPLETED).done))
        with pytest.raises(UserError, match="expects no process 1 of 3"):
            refused.result()
        process._report_to("localhost", port, 3, 2, 20)
        twins.remove(refused)
        assert first.result() is twins[0].result() is None


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


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server, pytest.raises(UserError, match="can't be used here"):
        process._gather(server.getsockname()[1], 2, 1.0)


def test_one_process_alone_hears_itself():
    assert process.broadcast_from_first({"a": [1, None]}) == {"a": [1, None]}
    process.barrier("alone")
    process._gather(free_port(), 1, 1.0)


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
    """Metrics and parameters agree within rtol 1e-5. Leaves that nothing pulls at (Adam follows rounding there) are
    left out."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in a.keys() - set(WALL_CLOCK):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-6, err_msg=name)
    leaves = [jax.tree_util.tree_flatten_with_path(load_model(run).params)[0] for run in (one, two)]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in without_gradient:
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=name)  # Adam enlarges rounding


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
