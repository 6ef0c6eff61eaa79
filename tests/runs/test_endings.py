"""Programs end in one line: Ctrl-C at any moment, a reader that has gone, files that can't be used."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments import chat
from jaxgpt.data.tokenizer import tokenizer_errors
from jaxgpt.data.votes import Store
from jaxgpt.errors import UserError
from jaxgpt.runs import cli, process
from jaxgpt.runs.endings import Stopped, plain_endings
from jaxgpt.runs.loop import Loop
from jaxgpt.runs.run import Run
from jaxgpt.study.cells import run_study
from jaxgpt.web.server import ServeConfig, Server
from tests.runs.test_run import Settings

ROOT = Path(__file__).parents[2]
CACHE = Path("/nowhere/cache")


@pytest.mark.parametrize("program", ["experiments.studies.imdb", "tpu.plan", "jaxgpt.runs.verify"])
def test_ctrl_c_while_importing_is_one_line(tmp_path, program):
    """Ctrl-C arrives in the middle of an import, here of a JAX that presses it."""
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('late')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background would ignore it
    try:
        done = subprocess.run([sys.executable, "-m", program], env=environment, capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such data; name another"), 2, "error: no such data; name another"),
        (Stopped("SIGTERM received", 75), 75, "stopped: SIGTERM received"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "error: not enough memory (MemoryError); use a smaller batch or model"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9000000000 bytes.\nBuffers"),
            2,
            "error: not enough memory for an array of 9.0 GB; use a smaller batch or model",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 9 bytes."), 2, "not enough"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "can't use /x (Permission denied); check",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "/x"),
            2,
            "can't use /x (File name too long); check the path",
        ),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/x"), 2, "can't use /x (Too many levels of symb"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"/x/y"), 2, "can't use /x/y (Not a directory); check"),
        (OSError(errno.EROFS, "Read-only file system", str(CACHE / "tfds")), 2, "set JAXGPT_CACHE to a folder that"),
        (OSError(errno.ENOENT, "No such file or directory", str(CACHE / "tfds")), 2, "set JAXGPT_CACHE to a folder"),
    ],
)
def test_what_is_no_bug_ends_in_one_line(capsys, monkeypatch, error, status, line):
    monkeypatch.setenv("JAXGPT_CACHE", str(CACHE))
    with pytest.raises(SystemExit) as stop, plain_endings():
        raise error
    said = capsys.readouterr().err
    assert stop.value.code == status and line in said and said.count("\n") == 1


def test_a_signal_is_no_error_of_what_it_interrupts():
    """Such as a tokenizer, whose errors of any type are said to be its own."""
    with pytest.raises(Stopped), tokenizer_errors("can't encode"):
        raise Stopped("SIGTERM received", 75)


def test_nothing_more_is_said_at_exit_after_memory_ran_out():
    """JAX's exit handlers wait for its programs, which raise the same error again."""
    program = """
import atexit, sys
from jaxgpt.runs.endings import plain_endings
atexit.register(print, "late", file=sys.stderr)
with plain_endings(whole_process=True):
    raise MemoryError
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: not enough memory") and "late" not in done.stderr


@pytest.mark.parametrize(
    "bug",
    [
        ZeroDivisionError(),
        FileNotFoundError(2, "No such file", "/x"),
        BrokenPipeError(),
        jax.errors.JaxRuntimeError("INTERNAL: broken"),
    ],
)
def test_a_bug_is_raised_as_it_is(bug):
    with pytest.raises(type(bug)) as raised, plain_endings():
        raise bug
    assert raised.value is bug


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("print('a' * 9, flush=True)", 141, ""),
        ("print('a' * 9)", 141, ""),  # found out only at the end
        ("print('help'); sys.exit()", 0, ""),
        ("with Stage(): print('a', flush=True)", 141, "stopped: nothing reads the output any more; goes on\n"),
    ],
)
def test_a_reader_that_has_gone_leaves_no_traceback(body, status, line):
    """`| head` has ended: silence, unless a run was stopped that way."""
    program = f"""
import sys
from jaxgpt.runs.endings import plain_endings, tell_next_start
class Stage:
    def __enter__(self): pass
    def __exit__(self, kind, error, traceback): tell_next_start(error, "goes on")
with plain_endings():
    {body}
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_the_terminal_lacks_is_escaped(encoding):
    """An interval's sign or a name that is not UTF-8 must not end a run."""
    program = "from jaxgpt.runs.endings import plain_endings\nwith plain_endings(): print('1 ± 2 → \\udcff')"
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True)
    said = "1 ± 2 → \udcff\n".encode(encoding, "backslashreplace")
    assert (done.returncode, done.stdout, done.stderr) == (0, said, b"")


GOES_ON = """
import sys
from jaxgpt.runs.endings import go_on_without_output, plain_endings
with plain_endings():
    go_on_without_output()
    for n in range(3000):
        print(n, flush=n % 100 == 0)
open(sys.argv[1], "w").write("trained")
sys.exit(3)
"""
NOTE = "note: the output can't be written ({}); the run continues, and its log.txt has the rest\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("gone", NOTE.format("Broken pipe")),
        ("terminal", NOTE.format("Input/output error")),
        ("full", NOTE.format("No space left on device")),
        ("closed", ""),
        ("", ""),
    ],
)
def test_a_run_goes_on_when_its_output_cant_be_written(tmp_path, output, said):
    """`| head` has ended, its window was closed, /dev/full, `>&-`: one note, and nothing of it at exit."""
    reader, writer = os.openpty() if output == "terminal" else os.pipe()
    os.close(reader)
    redirect = {"gone": "", "terminal": "", "full": ">/dev/full", "closed": ">&-", "": ">/dev/null"}[output]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", GOES_ON, str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (3, said)
    assert (tmp_path / "file").read_text() == "trained"


def test_a_full_output_ends_a_program_that_only_prints_in_one_line():
    program = "from jaxgpt.runs.endings import plain_endings\nwith plain_endings(): print('a' * 9)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: can't write the output (No space left on device)\n")


def test_a_file_never_gets_the_number_of_a_closed_stdout(tmp_path):
    """What a C library prints would land in it."""
    program = (
        "import sys, os, jaxgpt.runs\nfile = open(sys.argv[1], 'w')\nos.write(1, b'from C')\nsys.exit(file.fileno())"
    )
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(words, cwd=ROOT)
    assert done.returncode > 2 and (tmp_path / "file").read_text() == ""


def test_a_program_with_a_run_folder_goes_on_without_output_and_others_do_not(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "go_on_without_output", lambda: calls.append("goes on"))
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    for name in ("run", "votes"):
        settings = dataclasses.make_dataclass("Settings", [(name, str, "a")], frozen=True)
        cli.cli(lambda settings: calls.append(settings), settings, {}, [])
    assert calls[0] == "goes on" and len(calls) == 3


def test_whoever_is_stopped_says_what_the_same_command_does(tmp_path, capsys):
    """A run without a checkpoint starts again, one with a checkpoint resumes; a study keeps its finished parts; the
    rest, such as a server, says nothing."""

    def ending(body) -> str:
        with pytest.raises(SystemExit), plain_endings():
            body()
        return capsys.readouterr().err

    def stop(*_) -> dict:
        raise Stopped("SIGTERM received", 75)

    def run() -> None:
        with Run(tmp_path / "run", Settings(), "sft"):
            stop()

    assert ending(stop) == "stopped: SIGTERM received\n"
    assert ending(run) == "stopped: SIGTERM received; the same command starts again\n"
    (tmp_path / "run/checkpoints/1").mkdir(parents=True)
    (tmp_path / "run/checkpoints/1/checkpoint.json").touch()
    assert ending(run) == "stopped: SIGTERM received; the same command resumes from the newest checkpoint\n"
    settings = Settings(run=tmp_path / "study")
    said = "stopped: SIGTERM received; the same command resumes after the last finished part\n"
    assert ending(lambda: run_study("study", settings, {}, stop)) == said


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), Stopped("SIGTERM received", 75)])
def test_a_signal_ends_a_server_as_planned(monkeypatch, signal):
    bound = Server(ServeConfig(port=0), "")
    bound._socket.close()

    def run(**_) -> None:
        raise signal  # as uvicorn does after it has shut down

    monkeypatch.setattr(bound._server, "run", run)
    bound.run(lambda *_: None)


def test_ctrl_c_in_chat_stops_the_answer_and_not_the_chat(monkeypatch, capsys):
    def press(*_):
        raise KeyboardInterrupt

    class Chat:
        speaker = SimpleNamespace(config=SimpleNamespace(layers=1, width=8))

        def __init__(self, settings) -> None:
            self.last = ""

        def reply(self, text, key):
            yield f"{text} "
            if text == "long":
                press()
            yield "to the end"

    lines = iter(["long", None, "short", "/quit"])
    monkeypatch.setattr(chat, "Chat", Chat)
    monkeypatch.setattr("builtins.input", lambda _: next(lines) or press())
    chat.main(chat.Settings())
    said = capsys.readouterr().out.splitlines()[1:]
    leave = "/quit or Ctrl-D to leave)"
    assert said == [f"long  (stopped; {leave}", "", f"({leave}", "short to the end"]


def test_ctrl_c_saves_though_it_ended_the_reader_too(monkeypatch):
    """`| tee log` gets the same Ctrl-C: nothing that would be printed may keep the loop from saving."""

    def gone(*_):
        raise BrokenPipeError

    loop = Loop.__new__(Loop)
    loop.run, loop._exit_code = SimpleNamespace(say=gone), None
    monkeypatch.setattr("signal.signal", lambda *_: None)
    loop._on_signal(2, None)
    assert loop._exit_code == 130


@pytest.mark.parametrize("read_only", [True, False])
def test_a_folder_is_no_database(tmp_path, read_only):
    with pytest.raises(UserError, match=r"is a folder; give a file, such as .*votes.sqlite"):
        Store(tmp_path, read_only=read_only)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("writing persistent compilation cache entry for 'jit_f': OSError: [Errno 28] No space left", "written to"),
        ("writing persistent compilation cache entry for 'jit_f': PermissionError: not yours", "written to"),
        ("reading persistent compilation cache entry for 'jit_f': ZstdError: truncated", "read from"),
    ],
)
def test_a_cache_that_cant_be_used_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capsys, reason, said):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(process, "configure_malloc", lambda: False)
    before = jax.config.jax_compilation_cache_dir
    others = []
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: others.append(str(message))
            process.prepare_process()
            for n in range(3):
                warnings.warn(f"Error {reason.replace('jit_f', f'jit_{n}')}", stacklevel=1)
            warnings.warn("another matter", stacklevel=1)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    errors = capsys.readouterr().err
    assert errors.startswith(f"note: compiled programs can't be {said} {tmp_path}/xla ({reason.split(': ', 1)[1]})")
    assert errors.count("\n") == 1 and others == ["another matter"]
