"""Going on from where a run stopped, to the same bits.

    saves = Saves(run, settings, settings.steps, tok, batches)
    first, state = saves.restore(shapes, start)        the newest good checkpoint, else step 1 and start()
    with saves:
        for i in range(first, settings.steps + 1):
            arrays = saves.next_batch()
            state, metrics = step(state, ...)
            ...
            saves.after(i, state, metrics, arrays)

A checkpoint is the folder checkpoints/STEP of the run: state/ (Orbax: parameters, optimiser, keys, controller), the
tokenizer, and checkpoint.json, which is written last and holds everything else (the position in data and metrics, what
the state was made with) and the sha256 of every file. A folder without it is a save that was not finished.

On SIGTERM (preemption) the run saves after the step it is in and exits with 75; on Ctrl-C too, with 130, and a second
Ctrl-C quits at once.
"""

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import check_files, read_json, sha256_of_folder, write_json
from jaxgpt.runs.process import Stopped, barrier, from_first_process
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import describe, refuse_differences
from jaxgpt.training.guard import GuardConfig

with needs_extra("train"):
    from orbax.checkpoint import v1 as ocp

FORMAT = 1
RECORD = "checkpoint.json"
IN_FLIGHT = 2  # steps whose figures are not looked at yet, so that the device is not waited for
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """How often a run saves what it needs to go on."""

    every: int = 100  # steps between two checkpoints; 0: only when asked to stop
    keep: int = 2  # how many stay

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise UserError(f"save.every is {self.every} and save.keep {self.keep}; at least 0 and 1 are needed")


class Settings(Protocol):
    """What `Saves` reads of an experiment's settings."""

    @property
    def save(self) -> SaveConfig: ...  # noqa: D102
    @property
    def guard(self) -> GuardConfig: ...  # noqa: D102
    @property
    def force(self) -> bool: ...  # noqa: D102


class Position(Protocol):
    """Something with a place to go on from: `data.pipelines.Batches`."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...  # noqa: D102
    def set_state(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102


class Saves:
    """Checkpoints of a run, the signals that ask for one, and the stop after too many skipped updates (see the module's
    docstring). With several processes all of them call everything."""

    def __init__(self, run: Run, settings: Settings, total: int, tok: Any, batches: Position | None = None) -> None:
        self.run, self.settings, self.total, self.tok, self.batches = run, settings, total, tok, batches
        self.folder = Path(os.path.abspath(run.folder)) / "checkpoints"
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None
        self._asked: int | None = None  # exit code
        self._before: dict[int, Any] = {}  # signal handlers
        self._recent: deque[tuple[int, Any, Any]] = deque()
        self._waited = {"seconds_data": 0.0, "seconds_device": 0.0}

    # ---- going on ----

    def restore(self, shapes: T, start: Callable[[], T]) -> tuple[int, T]:
        """(first step to do, the state before it). `shapes`: arrays or `jax.ShapeDtypeStruct`s with shardings, which
        may be of another mesh than the checkpoint's.

        UserError when the newest good checkpoint has other parameters (each is named), or another tokenizer or data
        than now (unless settings.force). Damaged checkpoints are named and passed over."""
        answer: dict[str, Any] = {}
        if jax.process_index() == 0:
            record = self._newest_good()
            answer = {"record": record, "error": self._objection(record, shapes)}
        answer = from_first_process(answer)
        if answer["error"]:
            raise UserError(answer["error"])
        record = answer["record"]
        if record is None:
            self.run.rewind(None)
            return 1, start()
        folder = self.folder / str(record["step"])
        state = load_state(folder, shapes)
        if self.batches is not None:
            if record["data"]["fingerprint"] == self.batches.get_state()["fingerprint"]:
                self.batches.set_state(record["data"])
            else:
                self.run.say("WARNING: other data than the checkpoint's: read from its beginning (--force)")
        self.run.rewind(record["position"])
        there, here = record["devices"], _devices()
        moved = "" if there == here else f", from {there} to {here}: equal up to rounding, not to the bit"
        self.run.say(f"{self.run.stage}: going on after step {record['step']} of {self.total}{moved}")
        return record["step"] + 1, state

    def _newest_good(self) -> dict[str, Any] | None:
        for folder in steps_of(self.folder):
            try:
                return read_checkpoint(folder)
            except UserError as error:
                self.run.say(f"WARNING: passed over checkpoint {folder.name}: {error}")
        return None

    def _objection(self, record: Mapping[str, Any] | None, shapes: Any) -> str | None:
        """Why a checkpoint can't be gone on from, or None."""
        if record is None:
            return None
        try:
            refuse_differences(self.folder / str(record["step"]), describe(shapes), record["arrays"], "of this run")
        except UserError as error:
            return str(error)
        changed = []
        if record["tokenizer"] != self.tok.fingerprint:
            changed.append(f"tokenizer {record['tokenizer'][:12]} there, {self.tok.fingerprint[:12]} now")
        if self.batches is not None:
            there, now = record["data"]["fingerprint"], self.batches.get_state()["fingerprint"]
            if there != now:
                changed.append(f"data {there[:12]} there, {now[:12]} now")
        if changed and not self.settings.force:
            return (
                f"{self.folder / str(record['step'])} was made with other inputs ({'; '.join(changed)}); restore them, "
                "pass --force to go on nevertheless, or --fresh to start again"
            )
        return None

    # ---- each step ----

    def next_batch(self) -> Any:
        """The next batch."""
        assert self.batches is not None
        before = time.monotonic()
        batch = next(self.batches)
        self._waited["seconds_data"] += time.monotonic() - before
        return batch

    def figures(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What every stage logs: gradient norm, skipped updates, and the seconds that the loop spent making batches and
        waiting for the device since it was last asked."""
        waited, self._waited = self._waited, dict.fromkeys(self._waited, 0.0)
        return {"grad_norm": metrics["grad_norm"], "skipped": metrics["skipped"], **waited}

    def after(self, step: int, state: Any, metrics: Mapping[str, Any], batch: Any = None) -> None:
        """Save if it is time or if a signal asked for it (then raises Stopped). UserError, with `batch` (a pytree of
        host arrays) in the run folder, when `guard.patience` updates in a row were skipped."""
        self._recent.append((step, metrics["skipped_in_a_row"], batch))
        last = step == self.total
        asked = not last and self._asked_to_stop(step)
        due = not last and self.settings.save.every > 0 and step % self.settings.save.every == 0
        self._watch(0 if asked or due or last else IN_FLIGHT)
        if asked or due:
            self._save(step, state)
        if asked:
            self._wait()
            raise Stopped(f"saved after step {step} of {self.total}, and the same command goes on", self._asked or 75)

    def _watch(self, leave: int) -> None:
        while len(self._recent) > leave:
            step, skipped, batch = self._recent.popleft()
            before = time.monotonic()
            count = int(np.max(np.asarray(skipped)))
            self._waited["seconds_device"] += time.monotonic() - before
            if count < self.settings.guard.patience:
                continue
            path = self.run.folder / f"bad_batch_{step}.npz"
            if jax.process_index() == 0 and batch is not None:
                arrays: dict[str, Any] = {
                    jax.tree_util.keystr(at, simple=True, separator="."): np.asarray(leaf)
                    for at, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
                }
                np.savez(path, **arrays)
            raise UserError(
                f"{count} updates in a row were skipped up to step {step}: loss or gradient was not finite"
                + (" or leapt" if self.settings.guard.spike else "")
                + f"; the parameters are as before. Look at the last batch ({path}), or lower the learning rate"
            )

    def _asked_to_stop(self, step: int) -> bool:
        if jax.process_count() > 1:  # all of them at the same step
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked is not None

    # ---- saving ----

    def _save(self, step: int, state: Any) -> None:
        """Start to write a checkpoint; waits only for the one before, and for the copy to the host."""
        self._wait()
        folder = self.folder / str(step)
        first = jax.process_index() == 0
        record = {
            "format": FORMAT,
            "step": step,
            "run": self.run.fingerprint,
            "tokenizer": self.tok.fingerprint,
            "arrays": describe(state),
            "data": None if self.batches is None else self.batches.get_state(),
            "position": self.run.position(),
            "devices": _devices(),
        }
        try:
            if first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                self.tok.save(folder)
            barrier("checkpoint")
            response = ocp.save_async(folder / "state", state)
        except OSError as error:
            raise UserError(_cant_write(folder, error)) from error

        def finish() -> None:
            try:
                response.result()
                if first:
                    write_json(folder / RECORD, {**record, "files": sha256_of_folder(folder)})
                    for old in [one for one in steps_of(self.folder) if one != folder][self.settings.save.keep - 1 :]:
                        shutil.rmtree(old, ignore_errors=True)
            except Exception as error:  # reported by the thread that waits
                self._failure = error

        self._writing = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._writing.start()

    def _wait(self) -> None:
        """Until the checkpoint that is being written is whole. UserError if it can't be written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise UserError(_cant_write(self.folder, failure)) from failure

    # ---- signals ----

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1  # then jax.distributed hears SIGTERM and tells all processes
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.run.say("saving after this step; Ctrl-C once more quits at once")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self._asked = 130 if number == signal.SIGINT else 75

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._wait()
        elif self._writing is not None:
            self._writing.join()


# ---- checkpoints in a folder ----


def steps_of(folder: Path) -> list[Path]:
    """The checkpoints below a run's checkpoints/, newest first, half-written ones included."""
    if not folder.is_dir():
        return []
    return sorted((one for one in folder.iterdir() if one.name.isdigit()), key=lambda one: -int(one.name))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """checkpoint.json, after every byte of the checkpoint was compared with it. UserError names what is wrong."""
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} was not written to its end")
    record = read_json(folder / RECORD)
    wanted = {"format", "step", "run", "tokenizer", "arrays", "data", "position", "devices", "files"}
    if not isinstance(record, dict) or not wanted <= record.keys():
        raise UserError(f"{folder / RECORD} is damaged")
    if record["format"] != FORMAT:
        raise UserError(f"{folder} has format {record['format']}, and this version reads {FORMAT}")
    check_files(folder, record["files"])
    return record


def load_state(folder: Path, shapes: T) -> T:
    """The arrays of a checkpoint, placed as `shapes` (arrays, or `jax.ShapeDtypeStruct`s with shardings) says."""
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shapes)
    try:
        return ocp.load(folder / "state", target)
    except Exception as error:  # whatever Orbax or its storage says, the file is of no use
        raise UserError(f"{folder / 'state'} can't be read ({type(error).__name__}: {error})") from error


def _devices() -> str:
    """What decides how numbers are rounded, for example "8 x cpu in 2 processes"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind} in {jax.process_count()} processes"


def _cant_write(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0:1] or type(error).__name__
    reason = reason if isinstance(reason, str) else reason[0]
    return (
        f"can't write the checkpoint {folder} ({reason}); older checkpoints are as they were. Make room, and the same "
        "command goes on from the newest"
    )
