"""The run folder: what an experiment was asked to do, what it measured, and whether it is done.

    with Run(settings.run, settings, "sft", inputs={"pretrain": run_fingerprint(settings.pretrained)}) as run:
        if run.finished:
            return run.results
        ...
        run.log(step, {"loss": loss})
        run.finish({"loss": loss})

A folder holds settings.json, metrics.jsonl, log.txt, tensorboard/, done.json and what the experiment saves (model/, …).
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax
import numpy as np

from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import read_json, write_json
from jaxgpt.pretrained import loading
from jaxgpt.runs.process import barrier, broadcast_from_first, prepare_process, print_device
from jaxgpt.runs.progress import Bar, progress_bar
from jaxgpt.runs.settings import flatten_json, settings_to_json

with needs_extra("train"):
    from rich.console import Console

__all__ = ["Run", "prepare_process", "print_device", "run_fingerprint"]

PLACE_FIELDS = frozenset(
    {"run", "cache", "fresh", "force", "save"}
)  # settings that name a place or a way to run, not a result
OWN_FILES = (  # removed by a restart
    "done.json",
    "settings.json",
    "metrics.jsonl",
    "log.txt",
    "tensorboard",
    "model",
    "adapters",
    "critic",
    "rollouts",
    "checkpoints",
)
MAKE_ROOM = "make room, and the same command resumes from the newest checkpoint"
FLUSH_SECONDS = 10.0  # between two moments at which TensorBoard sees the curves grow
PACKAGES = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def run_fingerprint(folder: Path, stage: str | None = None) -> str:
    """The fingerprint of a finished run, to pass as an input of a later stage; or of a model that others trained.
    UserError when `folder` is neither, or not a run of `stage`, if one is given."""
    if stage is None and loading.is_pretrained(folder):
        return loading.fingerprint(folder)
    experiment = (stage, "--run", str(folder)) if stage else ()
    if not (folder / "done.json").exists():
        state = "is not finished" if (folder / "settings.json").exists() else "does not exist or is not a run folder"
        raise UserError(f"{folder} {state}; run the experiment that makes it first", experiment=experiment)
    done = read_json(folder / "done.json")
    if not isinstance(done, dict) or not {"stage", "fingerprint", "results"} <= done.keys():
        raise UserError(
            f"{folder / 'done.json'} is damaged; run the experiment again",
            experiment=(*experiment, "--fresh") if stage else (),
        )
    if stage is not None and done["stage"] != stage:
        raise UserError(f"{folder} is a run of {done['stage']!r}, and one of {stage!r} is needed; name another folder")
    return str(done["fingerprint"])


class Run:
    """A run folder, claimed on entry (see the module's docstring).

    A folder with the same stage, settings and inputs is continued: finished -> `finished` is True and `results` holds
    what it found; not finished -> it resumes from its newest checkpoint (`runs.loop`), and where there is none its
    files are removed and it starts again. UserError if the folder is not a run's, is another stage's, was made with
    other settings or inputs (unless `fresh`; or `force`, for one that isn't finished), or is in use by another process.
    Settings named in PLACE_FIELDS, or in a class variable PLACE_FIELDS of the settings, may differ.
    With several processes, the first one writes and all get the same answer.
    """

    def __init__(
        self,
        folder: Path,
        settings: Any,
        stage: str,
        inputs: Mapping[str, str] | None = None,
        fresh: bool | None = None,
        force: bool | None = None,
    ) -> None:
        self.folder, self.stage = Path(folder), stage
        self.fresh = getattr(settings, "fresh", False) if fresh is None else fresh
        self.force = getattr(settings, "force", False) if force is None else force
        self.finished = False
        self._forced = ""  # what differs from the run that is gone on with
        self.results: dict[str, Any] = {}
        self.console = Console(highlight=False)
        written = settings_to_json(settings)
        for name in ("fresh", "force"):  # a replay of settings.json is not to replace the run
            written.pop(name, None)
        self._record = {"stage": stage, "settings": written, "inputs": dict(inputs or {})}
        self._places = PLACE_FIELDS | set(getattr(type(settings), "PLACE_FIELDS", ()))
        self._files = contextlib.ExitStack()
        self._metrics: IO[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._curves: _Curves | None = None
        self._wandb: Any = None
        self._started = time.monotonic()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the stage, its settings without the places, and the fingerprints of its inputs."""
        text = json.dumps(_identity(self._record, self._places), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __enter__(self) -> Self:
        answer: dict[str, Any] = {}
        if self._first:
            try:
                answer = {"results": self._claim()}
            except UserError as error:
                answer = {"error": str(error)}
        answer = broadcast_from_first(answer)
        if "error" in answer:
            self._files.close()
            raise UserError(answer["error"])
        self.finished, self.results = answer["results"] is not None, answer["results"] or {}
        if self.finished:
            self.say(f"{self.stage}: already done in {self.folder}")
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._log is not None:
            with contextlib.suppress(OSError):
                self._log.write(f"stopped by {kind.__name__}: {error}\n".encode())
        self._files.close()
        self._metrics = self._log = None

    @property
    def _first(self) -> bool:
        return jax.process_index() == 0

    def _claim(self) -> dict[str, Any] | None:
        """The results of a finished run with the same settings, or None after the folder is made ready to start in."""
        done = self._inspect()
        if done is not None:
            return done
        wandb, project = None, os.environ.get("JAXGPT_WANDB")
        if project:
            wandb = _import_wandb()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            if self.fresh or not any((self.folder / "checkpoints").glob("*/checkpoint.json")):
                for name in OWN_FILES:
                    path = self.folder / name
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            write_json(self.folder / "settings.json", self._record | {"versions": _versions()})
            self._open()
            if self._forced:
                self.say(f"WARNING: resuming with other settings ({self._forced})")
        except OSError as error:
            raise UserError(f"can't write to the run folder {self.folder}: {error.strerror or error}") from None
        if wandb is not None:
            config = flatten_json(self._record)
            self._wandb = wandb.init(project=project, name=self.folder.name, dir=str(self.folder), config=config)
            self._files.callback(self._wandb.finish)
        return None

    def _lock(self) -> None:
        """Held until exit, or until the process ends in any way."""
        lock = self._files.enter_context(open(self.folder / ".lock", "w"))  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is in use by another process; choose another --run") from None
        except OSError:
            pass  # some network file systems have no locks

    def _open(self) -> None:
        """Without a buffer: what couldn't be written is not tried again when the file is closed."""
        self._metrics = self._files.enter_context(open(self.folder / "metrics.jsonl", "ab", buffering=0))  # noqa: SIM115
        self._log = self._files.enter_context(open(self.folder / "log.txt", "ab", buffering=0))  # noqa: SIM115

    def _inspect(self) -> dict[str, Any] | None:
        """The results of a finished run with the same settings, or None when it is to start; touches nothing."""
        found = self._read_found()
        if found is None or self.fresh or not self._holds_results():
            return None
        differences = _differences(_identity(found, self._places), _identity(self._record, self._places))
        path = self.folder / "done.json"
        if differences and self.force and not path.exists():
            self._forced = differences
        elif differences:
            raise UserError(
                f"{self.folder} holds a run with other settings ({differences}); choose another --run, "
                "or pass --fresh to replace it"
            )
        if not path.exists():
            return None
        done = read_json(path)
        results = done.get("results") if isinstance(done, dict) else None
        return results if isinstance(results, dict) else None

    def _holds_results(self) -> bool:
        """False for a run that was stopped (by a mistake in its settings, say) before it measured anything."""
        metrics = self.folder / "metrics.jsonl"
        if any((self.folder / "checkpoints").glob("*/checkpoint.json")):
            return True
        return (self.folder / "done.json").exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def _read_found(self) -> dict[str, Any] | None:
        """settings.json of an earlier run of this stage; None where the folder is missing or empty."""
        if not self.folder.exists():
            return None
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file, and a run needs a folder; choose another --run")
        path = self.folder / "settings.json"
        if not path.exists():
            if {entry.name for entry in self.folder.iterdir()} - {".lock"}:
                raise UserError(f"{self.folder} is not empty and is not a run folder; choose another --run")
            return None
        found = read_json(path)
        if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("settings", "inputs")):
            raise UserError(f"{path} is not a run's; choose another --run")
        if found.get("stage") != self.stage:
            stages = f"a run of {found.get('stage')!r}, not {self.stage!r}"
            raise UserError(f"{self.folder} holds {stages}; choose another --run")
        return found

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, {"step", "time" (seconds since the start), name: number, …}, and the same curves
        in TensorBoard. A number that is not finite becomes null and is named under "nonfinite". Waits for jax arrays.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        if self._metrics is None:
            return
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": int(step), "time": round(time.monotonic() - self._started, 3)}
        line |= {name: finite.get(name) for name in numbers}
        if len(finite) < len(numbers):
            line["nonfinite"] = sorted(numbers.keys() - finite.keys())
        try:
            text = (json.dumps(line, allow_nan=False) + "\n").encode()
            while text:  # a disk that is nearly full takes a part
                text = text[self._metrics.write(text) :]
            if self._curves is None:
                self._curves = _Curves(self.folder / "tensorboard", int(step))
                self._files.callback(self._curves.close)
            self._curves.add(int(step), finite)
        except OSError as error:
            raise UserError(f"can't write to the run folder {self.folder} ({error.strerror}); {MAKE_ROOM}") from None
        if self._wandb is not None:
            self._wandb.log(finite, step=int(step))

    def position(self) -> dict[str, float]:
        """Where the metrics stand, for `rewind`; they are on the disk (or in the bucket) up to there."""
        end = 0
        if self._metrics is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._metrics.fileno())
            end = os.fstat(self._metrics.fileno()).st_size
        return {"metrics_bytes": end, "seconds": time.monotonic() - self._started}

    def rewind(self, position: Mapping[str, float] | None) -> None:
        """Drop the metrics written after `position` (None: all of them), the torn line of a killed run included."""
        end, seconds = (0, 0.0) if position is None else (int(position["metrics_bytes"]), position["seconds"])
        self._started = time.monotonic() - seconds
        if self._metrics is None:
            return
        found = os.fstat(self._metrics.fileno()).st_size
        if found < end:
            self.say(f"WARNING: metrics.jsonl has {found} bytes, and had {end} at the checkpoint: figures are missing")
        os.truncate(self._metrics.fileno(), min(found, end))

    def say(self, text: str) -> None:
        """A milestone: one line on the terminal (above a live bar) and in log.txt."""
        if not self._first:
            return
        if self.console.is_terminal:
            self.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk: it has been said, and metrics and checkpoints will stop
                self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n".encode())

    def progress(self, total: int, label: str, done: int = 0) -> contextlib.AbstractContextManager[Bar]:
        """`with run.progress(steps, "pretrain") as bar: bar.update(1, tokens=4096, loss=2.3)`. `done` of them were done
        before."""
        return progress_bar(self.console, total, label, done=done, quiet=not self._first)

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Mark the run as done, and return its results. They come back from later runs of the same settings, so they
        must be JSON: numbers (arrays become numbers or lists, NaN becomes null), text, lists and dicts."""
        self.finished, self.results = True, plain(results)
        if self._first:
            done = {"stage": self.stage, "fingerprint": self.fingerprint, "results": self.results}
            write_json(self.folder / "done.json", done)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # nothing is left to resume
        barrier("run finished")  # another stage of this process may read the folder next
        return self.results


class _Curves:
    """TensorBoard's event file, written by the caller's own thread, so that an error reaches the caller."""

    def __init__(self, folder: Path, first_step: int) -> None:
        with needs_extra("train"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # what was drawn from this step on is dropped
        self._writer.write_event(self._event(wall_time=time.time(), step=first_step, session_log=start))
        self._flushed = 0.0

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


def _identity(record: Mapping[str, Any], places: frozenset[str] | set[str]) -> dict[str, Any]:
    """The part of a record that decides the result."""
    settings = {name: value for name, value in record["settings"].items() if name not in places}
    return {"stage": record["stage"], "settings": settings, "inputs": record["inputs"]}


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Such as "lr: 0.001 there, 0.003 now", or an empty string."""
    old, new = flatten_json(there["settings"]), flatten_json(now["settings"])
    absent = "absent"
    changed = [
        f"{name}: {old.get(name, absent)} there, {new.get(name, absent)} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
    ]
    names = dict.fromkeys([*there["inputs"], *now["inputs"]])
    changed += [f"made from another {name}" for name in names if there["inputs"].get(name) != now["inputs"].get(name)]
    return "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        advice = "pip install 'jaxgpt[wandb]', or unset it"
        raise UserError(f"JAXGPT_WANDB is set but wandb is not installed; {advice}") from None
    return wandb


def plain(value: Any) -> Any:
    """Results as JSON values."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return settings_to_json(value)
