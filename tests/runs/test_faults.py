"""What a machine does to a run: preempts it, runs out of disk, lets nothing be written. Real processes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import experiments.pretrain
from jaxgpt.config import PRESETS as MODELS
from jaxgpt.data import sources, streams
from jaxgpt.data.jsonl import write_rows
from jaxgpt.data.tokenizer import cached_tokenizer
from jaxgpt.runs import verify
from jaxgpt.runs.cli import cli
from tests.slow.soak import ROOT, Program, lines_of


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """With what is learnt from it in a folder beside it, so that a run has only its own files to write."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_rows(path, ({"text": text} for text in (ROOT / "LICENSE").read_text().split("\n\n")))
    train, test = sources.open_both(str(path), path.parent)
    tok = cached_tokenizer("bpe", train, MODELS["toy"].vocab, path.parent)
    for documents in (train, test):
        streams.tokenize_stream(documents, tok, path.parent)
    return path


def words(text: Path, run: Path, *flags: str) -> list[str]:
    """Of a long toy run."""
    return [
        "--preset",
        "toy",
        "--data",
        str(text),
        "--cache",
        str(text.parent),
        "--run",
        str(run),
        "--model.layers",
        "1",
        "--steps",
        "100000",
        "--log-every",
        "1",
        "--eval-every",
        "100000",
        *flags,
    ]


def pretrain(text: Path, run: Path, *flags: str, limit: int | None = None) -> subprocess.Popen[str]:
    """No file of it may grow beyond `limit` bytes."""
    settle: Callable[[], None] | None = None
    if limit is not None:
        settle = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    flags_of_xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain", *words(text, run, *flags)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=settle,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "XLA_FLAGS": flags_of_xla},
    )


def await_lines(child: subprocess.Popen[str], run: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(lines_of(run)) < count:
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["preempted", "ctrl-c"],
)
def test_a_signal_saves_and_the_exit_code_says_which(text, tmp_path, number, code, capsys):
    run = tmp_path / "run"
    child = pretrain(text, run, "--save.every", "0")
    await_lines(child, run, 2)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors
    (saved,) = (run / "checkpoints").iterdir()
    assert f"stopped: saved after step {saved.name} of 100000" in errors and "Traceback" not in errors
    assert json.loads(lines_of(run)[-1])["step"] == int(saved.name)
    assert verify.main([str(run)]) == 0


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_both_at_the_same_step(text, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.pretrain", *words(text, run, "--save.every", "0")]
    both = Program(command, 2, tmp_path / "log")
    end = time.monotonic() + 120
    while len(lines_of(run)) < 5 and both.running and time.monotonic() < end:
        time.sleep(0.01)
    both.processes[1].send_signal(signal.SIGTERM)
    codes = [one.wait(120) for one in both.processes]
    told = (tmp_path / "log.0.txt").read_text()
    assert codes == [75, 75], told
    (saved,) = (run / "checkpoints").iterdir()
    assert f"stopped: saved after step {saved.name} of 100000" in told
    assert f"stopped: saved after step {saved.name} of 100000" in (tmp_path / "log.1.txt").read_text()
    assert verify.main([str(run)]) == 0


@pytest.mark.slow
def test_a_full_disk_while_saving(text, tmp_path):
    """The first checkpoints fit, then the limit comes down: as when others fill the disk."""
    run = tmp_path / "run"
    child = pretrain(text, run, "--save.every", "5")
    await_lines(child, run, 12)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 2, errors
    before, error, told = errors.partition("error: can't write")  # at exit orbax's threads may complain of their own
    assert error and "the same command resumes" in told.splitlines()[0] and "Traceback" not in before
    for line in lines_of(run)[:-1]:
        json.loads(line)
    whole = [step for step, complaint in verify.verify(run) if not complaint and step != run]
    assert whole
    again = pretrain(text, run, "--save.every", "5")
    newest = max(int(step.name) for step in whole)
    assert again.stdout is not None
    told = ""
    while "resumed after step" not in told and again.poll() is None:
        told += again.stdout.readline()
    again.kill()
    again.communicate()
    assert f"resumed after step {newest} of 100000" in told


@pytest.mark.slow
def test_a_full_disk_while_writing_metrics(text, tmp_path):
    run = tmp_path / "run"
    child = pretrain(text, run, "--save.every", "0", limit=6000)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 2, errors
    assert f"error: can't write to the run folder {run} (File too large)" in errors and "Traceback" not in errors


def test_a_folder_that_cant_be_written(text, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(
            experiments.pretrain.main,
            experiments.pretrain.Settings,
            experiments.pretrain.PRESETS,
            words(text, Path("/proc/jaxgpt/run")),
        )
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert "error: can't write to the run folder /proc/jaxgpt/run" in errors and "Traceback" not in errors
