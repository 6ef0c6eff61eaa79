"""Checkpoints: all that a run needs to resume bit for bit (`runs.loop` decides when to save one).

A checkpoint is the folder checkpoints/STEP of the run: state/ (Orbax: parameters, optimiser, keys, controller), the
tokenizer, and checkpoint.json, which is written last and holds everything else (the position in data and metrics,
and what the run was made with) and the sha256 of every file. A folder without checkpoint.json is an unfinished save.
"""

import dataclasses
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from jaxgpt.config import Count, CountOrZero, check_settings
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, first_line, needs_extra
from jaxgpt.files import check_files, read_record, remove, sha256_of_folder, sync_folder, sync_names, write_record
from jaxgpt.runs.process import barrier, broadcast_from_first, describe_rounding, differences_in_rounding
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import check_params_match, describe_params

with needs_extra("train"):
    from orbax.checkpoint import v1 as ocp

FORMAT = 2  # 2: checkpoint.json holds its own sha256
RECORD = "checkpoint.json"
OLDER = "an older checkpoint may be intact"
NAMES = ("format", "step", "run", "tokenizer", "arrays", "data", "position", "devices", "files")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """How often a run saves what it needs to resume."""

    every: CountOrZero = 100  # steps between checkpoints; 0: save only when the run is asked to stop
    keep: Count = 2  # how many checkpoints to keep, the newest ones

    def __post_init__(self) -> None:
        check_settings(self)


class ResumableIterator(Protocol):
    """An iterator that knows where it is: `data.pipelines.Batches`."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...  # noqa: D102
    def set_state(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102


class Checkpoints:
    """The checkpoints of a run: `newest` and `load` to resume, `save` and `wait` while training. With several
    processes, all of them must make every call."""

    def __init__(self, run: Run, config: SaveConfig, tok: Tokenizer, batches: ResumableIterator) -> None:
        self.run, self.config, self.tok, self.batches = run, config, tok, batches
        self.folder = Path(os.path.abspath(run.folder)) / "checkpoints"
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None
        self._damaged: set[Path] = set()

    # ---- resuming ----

    def newest(self, shapes: Any, *, force: bool = False) -> dict[str, Any] | None:
        """The record of the newest good checkpoint, or None. Damaged ones are reported and skipped. UserError if
        it doesn't fit this run: see `loop.Loop.restore`."""
        result: dict[str, Any] = {}
        if jax.process_index() == 0:
            record = self._newest_good()
            result = {"record": record, "error": self._objection(record, shapes, force)}
        result = broadcast_from_first(result)
        if result["error"]:
            raise UserError(result["error"])
        newest: dict[str, Any] | None = result["record"]
        return newest

    def load(self, record: Mapping[str, Any], shapes: T, total: int) -> T:
        """The state of a checkpoint, sharded as `shapes` says; data and metrics continue from there. `total`: the run's
        steps, for the log."""
        state = load_state(self.folder / str(record["step"]), shapes)
        if record["data"]["fingerprint"] == self.batches.get_state()["fingerprint"]:
            self.batches.set_state(record["data"])
        else:
            self.run.say("WARNING: the data has changed since the checkpoint: reading it from the beginning (--force)")
        self.run.rewind(record["position"])
        moved = differences_in_rounding(record["devices"], describe_rounding(shapes))
        self.run.say(f"{self.run.stage}: resumed after step {record['step']} of {total}{moved}")
        return state

    def _newest_good(self) -> dict[str, Any] | None:
        for folder in list_checkpoints(self.folder):
            try:
                return read_checkpoint(folder)
            except UserError as error:
                self._damaged.add(folder)
                self.run.say(f"WARNING: skipped checkpoint {folder.name}: {error}")
        if self._damaged:
            self.run.say(
                f"WARNING: no checkpoint in {self.folder} is intact: {self.run.stage} starts again from step 1"
            )
        return None

    def _objection(self, record: Mapping[str, Any] | None, shapes: Any, force: bool) -> str | None:
        """Why a checkpoint can't be resumed from, or None."""
        if record is None:
            return None
        folder = self.folder / str(record["step"])
        try:
            check_params_match(folder, describe_params(shapes), record["arrays"], "of this run")
        except UserError as error:
            return str(error)
        pairs = {
            "run": (record["run"], self.run.fingerprint),
            "tokenizer": (record["tokenizer"], self.tok.fingerprint),
            "data": (record["data"]["fingerprint"], self.batches.get_state()["fingerprint"]),
        }
        changed = [
            f"{name} {there[:12]} before, {now[:12]} now" for name, (there, now) in pairs.items() if there != now
        ]
        if changed and not force:
            return (
                f"{folder} was made with other inputs ({'; '.join(changed)}); restore them, choose another --run, or "
                "pass --force to resume with the present ones"
            )
        return None

    # ---- saving ----

    def save(self, step: int, state: Any) -> None:
        """Start writing a checkpoint; returns once the previous one is complete and this one is copied to the host."""
        self.wait()
        self.run.check_folder()
        folder = self.folder / str(step)
        first = jax.process_index() == 0
        record = {
            "format": FORMAT,
            "step": step,
            "run": self.run.fingerprint,
            "tokenizer": self.tok.fingerprint,
            "arrays": describe_params(state),
            "data": self.batches.get_state(),
            "position": self.run.position(),
            "devices": describe_rounding(state),
        }
        try:
            if first:
                self.folder.mkdir(exist_ok=True)
                remove(folder)
                folder.mkdir()
                self._damaged.discard(folder)
                self.tok.save(folder)
            barrier("checkpoint")
            response = ocp.save_async(folder / "state", state)
        except OSError as error:
            raise UserError(_cant_write(folder, error)) from error

        def finish() -> None:
            try:
                response.result()
                if first:
                    files = sha256_of_folder(folder)
                    sync_folder(folder)
                    sync_names(self.folder)
                    sync_names(self.folder.parent)
                    self.run.check_folder()
                    write_record(folder / RECORD, {**record, "files": files})
                    self._remove_older(folder)
            except Exception as error:  # raised by `wait`
                self._failure = error

        self._writing = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._writing.start()

    def _remove_older(self, newest: Path) -> None:
        """Only whole checkpoints count as kept; those of later steps, which couldn't be used, are left alone."""
        older = [one for one in list_checkpoints(self.folder) if int(one.name) < int(newest.name)]
        whole = [one for one in older if (one / RECORD).exists() and one not in self._damaged]
        for one in set(older) - set(whole[: self.config.keep - 1]):
            shutil.rmtree(one, ignore_errors=True)

    def wait(self, *, report: bool = True) -> None:
        """Wait until the checkpoint being written is complete. With `report`, UserError if it couldn't be written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if report and self._failure is not None:
            failure, self._failure = self._failure, None
            self.run.check_folder()  # says it better than a file that is missing
            raise UserError(_cant_write(self.folder, failure)) from failure


# ---- checkpoints in a folder ----


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a run's checkpoints/, newest first, unfinished ones included."""
    if not folder.is_dir():
        return []
    numbered = [one for one in folder.iterdir() if re.fullmatch("[1-9][0-9]*", one.name)]
    return sorted(numbered, key=lambda one: -int(one.name))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of checkpoint.json, after every byte of the checkpoint has been checked against it. UserError names
    what is wrong."""
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is unfinished: it has no {RECORD}")
    record = read_record(folder / RECORD, NAMES, OLDER)
    if record["format"] != FORMAT:
        raise UserError(f"{folder} has format {record['format']}, but this version reads {FORMAT}")
    if folder.name != str(record["step"]):
        raise UserError(f"{folder} holds the checkpoint of step {record['step']}: it was renamed; rename it back")
    check_files(folder, record["files"], OLDER)
    return record


def load_state(folder: Path, shapes: T) -> T:
    """The arrays of a checkpoint, sharded as `shapes` (arrays, or `jax.ShapeDtypeStruct`s with shardings) says."""
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shapes)
    try:
        return ocp.load(folder / "state", target)
    except Exception as error:  # whatever Orbax or its storage raises, the file is unusable
        raise UserError(f"{folder / 'state'} can't be read ({type(error).__name__}: {error})") from error


def _cant_write(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or first_line(error)
    return (
        f"can't write the checkpoint {folder} ({reason}); older checkpoints are intact. Free some space; "
        "the same command resumes from the newest"
    )
