"""The run folder: what an experiment was asked to do, what it measured, and whether it has finished.

    with Run(settings.run, settings, "sft", inputs={"pretrain": run_fingerprint(settings.pretrained)}) as run:
        if run.finished:
            return run.results
        ...
        run.log(step, {"loss": loss})
        run.finish({"loss": loss})

A folder holds settings.json, metrics.jsonl, log.txt, tensorboard/, done.json and what the experiment saves (model/, …).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax
import numpy as np

from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import (
    append_only,
    read_json,
    read_record,
    refuse_no_file,
    refuse_pattern,
    remove,
    sha256_of_file,
    write_record,
)
from jaxgpt.pretrained import loading
from jaxgpt.runs.claim import Claim
from jaxgpt.runs.endings import STOPS, tell_next_start
from jaxgpt.runs.process import barrier, broadcast_from_first, prepare_process, print_device, versions
from jaxgpt.runs.progress import Bar, progress_bar
from jaxgpt.runs.settings import flatten_json, leaves, settings_to_json

with needs_extra("train"):
    from rich.console import Console

__all__ = ["Run", "prepare_process", "print_device", "run_fingerprint"]

# Settings that say where or how to run, and do not change the result; another mesh only rounds differently.
PLACE_FIELDS = frozenset({"run", "cache", "fresh", "force", "save", "mesh", "profile"})
RUN_FILES = (  # removed in this order when a run starts over; settings.json, by which it is known, is replaced
    "done.json",
    "checkpoints",
    "metrics.jsonl",
    "log.txt",
    "tensorboard",
    "model",
    "adapters",
    "critic",
    "rollouts",
    "profile",
)
MAKE_ROOM = "free some space; the same command then resumes from the newest checkpoint"
FLUSH_SECONDS = 10.0  # between flushes of TensorBoard's event file
SETTINGS = ("stage", "settings", "inputs", "versions")  # what settings.json holds
DONE = ("stage", "fingerprint", "results", "files")  # and done.json


def run_fingerprint(folder: Path, stage: str | None = None) -> str:
    """The fingerprint of a finished run (or of a pretrained model from elsewhere), to pass as an input to a later
    stage. UserError when `folder` holds neither, or when `stage` is given and the run is not of that stage."""
    if stage is None and loading.is_pretrained(folder):
        return loading.fingerprint(folder)
    experiment = (stage, "--run", str(folder)) if stage else ()
    if not (folder / "done.json").exists():
        state = "is not finished" if (folder / "settings.json").exists() else "does not exist or is not a run folder"
        advice = "" if stage else loading.missing_advice(folder)
        raise UserError(
            f"{folder} {state}{advice or '; first run the experiment that makes it'}", experiment=experiment
        )
    done = read_done(folder)
    if stage is not None and done["stage"] != stage:
        raise UserError(f"{folder} is a run of {done['stage']!r}, but one of {stage!r} is needed; give another folder")
    check_outputs(folder, done)
    return str(done["fingerprint"])


def read_settings(folder: Path) -> dict[str, Any]:
    """A run's settings.json. UserError if it is damaged or is not a run's."""
    path = folder / "settings.json"
    found = read_record(path, SETTINGS, "restore it from a copy, or choose another --run", older=SETTINGS)
    if not all(isinstance(found[name], kind) for name, kind in zip(SETTINGS, (str, dict, dict, dict), strict=True)):
        raise UserError(f"{path} is not a run's settings file; choose another --run")
    return found


def read_done(folder: Path) -> dict[str, Any]:
    """A finished run's done.json. UserError if it is damaged. One of jaxgpt 0.1.0 lists no files."""
    path = folder / "done.json"
    done = read_record(path, DONE, "restore it from a copy, or run the stage again with --fresh", older=DONE[:3])
    done.setdefault("files", {})
    if not all(isinstance(done[name], kind) for name, kind in zip(DONE, (str, str, dict, dict), strict=True)):
        raise UserError(f"{path} is not a run's record; give the folder of a run")
    return done


def check_outputs(folder: Path, done: Mapping[str, Any], *, measured: bool = False) -> None:
    """UserError if a file that a finished run wrote for later stages has changed since. `measured`: check its metrics
    too."""
    for name, digest in done["files"].items():
        if name == "metrics.jsonl" and not measured:
            continue
        path = folder / name
        if not path.is_file() or sha256_of_file(path) != digest:
            state = "is not what its run wrote (its checksum differs)" if path.is_file() else "is missing"
            rows = name.endswith(".jsonl") and name != "metrics.jsonl"
            edited = " (to use edited rows, copy the file to another folder)" if rows else ""
            raise UserError(f"{path} {state}; restore it from a copy, or run the stage again with --fresh{edited}")


def check_metrics(path: Path, position: Mapping[str, Any]) -> None:
    """UserError if the metrics up to a checkpoint's position are not those that it was saved with."""
    end = int(position["metrics_bytes"])
    with open(path, "rb") as file:
        kept = file.read(end)
    if hashlib.sha256(kept).hexdigest() != position["metrics_sha256"]:
        how = f"it has {len(kept)} bytes but had {end}" if len(kept) < end else "other bytes"
        raise UserError(
            f"{path} has changed since the checkpoint was saved ({how}), so its figures up to that step may be wrong; "
            "the model is not affected"
        )


def _outputs(folder: Path) -> dict[str, str]:
    """{name: sha256} of what later stages and the doctor read of a finished run. For a model, its model.json is enough,
    since that has the hashes of its other files."""
    names = ["settings.json", *(path.name for path in folder.glob("[!.]*.jsonl"))]
    names += [f"{path.parent.name}/model.json" for path in folder.glob("[!.]*/model.json")]
    return {name: sha256_of_file(folder / name) for name in sorted(names)}


class Run:
    """A run folder, claimed on entry (see the module's docstring).

    If the folder already holds a run with the same stage, settings and inputs, that run is continued. If it has
    finished, `finished` is True and `results` holds its results. If not, it resumes from its newest checkpoint
    (`runs.loop`); without a checkpoint, its files are removed and it starts over. UserError if the folder is not a run
    folder, belongs to another stage, holds what a setting names, was made with other settings or inputs (unless
    `fresh`; or `force`, for an unfinished run), or is in use by another process. Settings named in PLACE_FIELDS, here
    or in a class variable of the settings, may differ. With several processes, only the first one writes, and all see
    the same outcome.
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
        self._can_force = hasattr(settings, "force")
        self.finished = False
        self._forced = ""  # how the settings differ from those of the run being resumed, under `force`
        self.results: dict[str, Any] = {}
        self.console = Console(highlight=False)
        written = settings_to_json(settings)
        for name in ("fresh", "force"):  # replaying settings.json must not replace the run
            written.pop(name, None)
        self._record = {"stage": stage, "settings": written, "inputs": dict(inputs or {})}
        self._places = PLACE_FIELDS | set(getattr(type(settings), "PLACE_FIELDS", ()))
        self._files = contextlib.ExitStack()
        self._folder_claim = Claim(self.folder, self.say)
        self._metrics: IO[bytes] | None = None
        self._metrics_bytes, self._metrics_hash = 0, hashlib.sha256()
        self._log: IO[bytes] | None = None
        self._curves: _Curves | None = None
        self._wandb: Any = None
        self._started = time.monotonic()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the stage, its settings except PLACE_FIELDS, and the fingerprints of its inputs."""
        text = json.dumps(_identity(self._record, self._places), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __enter__(self) -> Self:
        outcome: dict[str, Any] = {}
        if self._first:
            try:
                outcome = {"results": self._claim()}
            except UserError as error:
                outcome = {"error": str(error)}
            except BaseException:
                self._files.close()
                raise
        outcome = broadcast_from_first(outcome)
        if "error" in outcome:
            self._files.close()
            raise UserError(outcome["error"])
        self.finished, self.results = outcome["results"] is not None, outcome["results"] or {}
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
        if isinstance(error, STOPS):
            does = "resumes from the newest checkpoint" if self.has_checkpoint() else "starts again"
            tell_next_start(error, f"the same command {does}")
        self._files.close()
        self._metrics = self._log = None

    @property
    def _first(self) -> bool:
        return jax.process_index() == 0

    def _claim(self) -> dict[str, Any] | None:
        """The results of a finished run with the same settings, or None once the folder is ready to run in."""
        done = self._inspect()
        if done is not None:
            return done
        wandb, project = None, os.environ.get("JAXGPT_WANDB")
        if project:
            wandb = _import_wandb()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._folder_claim.take()
            self._files.callback(self._folder_claim.release)
            done = self._inspect()  # another process may have finished it just now
            if done is not None:
                return done
            if self.fresh or not self.has_checkpoint():
                for name in RUN_FILES:
                    for path in (name, f".{name}.old", f".{name}.new"):  # the latter two: what `save_model` left
                        remove(self.folder / path)
            write_record(self.folder / "settings.json", self._record | {"versions": versions()})
            self._open()
            if self._forced:
                self.say(f"WARNING: resuming with other settings ({self._forced})")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"can't write to the run folder {self.folder} ({reason}); choose another --run") from None
        if wandb is not None:
            config = flatten_json(self._record)
            self._wandb = wandb.init(project=project, name=self.folder.name, dir=str(self.folder), config=config)
            self._files.callback(self._wandb.finish)
        return None

    def _open(self) -> None:
        curves = self.folder / "tensorboard"
        if os.path.lexists(curves) and not curves.is_dir():
            raise UserError(f"{curves} is not a folder; remove it")
        self._metrics = self._files.enter_context(append_only(self.folder / "metrics.jsonl"))
        self._log = self._files.enter_context(append_only(self.folder / "log.txt"))

    def _inspect(self) -> dict[str, Any] | None:
        """The results of a finished run with the same settings, or None if it has yet to run; changes nothing."""
        refuse_pattern(self.folder)
        self._refuse_own_inputs()
        found = self._read_found()
        if found is None or self.fresh or not self._holds_results():
            return None
        differences = _differences(_identity(found, self._places), _identity(self._record, self._places))
        path = self.folder / "done.json"
        if differences and self.force and not os.path.lexists(path):
            self._forced = differences
        elif differences:
            raise UserError(self._refusal(differences, finished=os.path.lexists(path)))
        if not os.path.lexists(path):
            return None
        results: dict[str, Any] = read_done(self.folder)["results"]
        return results

    def _refuse_own_inputs(self) -> None:
        """UserError if a setting names something in this folder, which the run may remove before it is read."""
        home = os.path.realpath(self.folder)
        for name, value in leaves(self._record["settings"]):
            for place in value.split(",") if isinstance(value, str) and name not in PLACE_FIELDS else ():
                if os.path.lexists(place) and Path(os.path.realpath(place)).is_relative_to(home):
                    raise UserError(f"{name} {place} lies in the run's own folder {self.folder}; choose another --run")

    def check_folder(self) -> None:
        """UserError if the folder was moved, deleted or taken over by another process since the run began."""
        if self._metrics is not None:
            self._folder_claim.check()

    def _refusal(self, differences: str, *, finished: bool) -> str:
        """The message for other settings; the ways that keep the existing run come first."""
        which = "a finished run" if finished else "an unfinished run"
        ways = ["restore them to read its results" if finished else "restore them to resume it", "choose another --run"]
        if self.has_checkpoint() and self._can_force:
            ways.append("pass --force to resume it with the new ones")
        elif not self.has_checkpoint():
            ways.append("pass --fresh, which deletes it and starts again")
        said = f"{', '.join(ways[:-1])}, or {ways[-1]}"
        return f"{self.folder} holds {which} with other settings ({differences}); {said}"

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from. OSError if it can't be looked for."""
        folder = self.folder / "checkpoints"
        return folder.is_dir() and any((step / "checkpoint.json").exists() for step in folder.iterdir())

    def _holds_results(self) -> bool:
        """False for a run that stopped (because of a wrong setting, say) before it measured anything."""
        metrics = self.folder / "metrics.jsonl"
        if self.has_checkpoint():
            return True
        return os.path.lexists(self.folder / "done.json") or (metrics.exists() and metrics.stat().st_size > 0)

    def _read_found(self) -> dict[str, Any] | None:
        """settings.json of an earlier run of this stage; None where the folder is missing or empty."""
        if not self.folder.exists():
            return None
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file, and a run needs a folder; choose another --run")
        names = {entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".settings.json.")}
        if not names - {".lock"}:
            return None
        try:
            if "settings.json" not in names:
                raise UserError(f"{self.folder} is not empty and is not a run folder; choose another --run")
            found = read_settings(self.folder)
        except UserError as error:
            known = {".lock", "log.txt"} <= names and self._is_of_stage()
            if not self._holds_this_run() and not (self.fresh and known):
                raise error from None
            return self._record
        if found["stage"] != self.stage:
            mismatch = f"a run of {found['stage']!r}, not {self.stage!r}"
            raise UserError(f"{self.folder} holds {mismatch}; choose another --run")
        return found

    def _holds_this_run(self) -> bool:
        """Whether another record in the folder shows that this is its run, although settings.json is unreadable."""
        for path in (self.folder / "done.json", *(self.folder / "checkpoints").glob("*/checkpoint.json")):
            with contextlib.suppress(UserError):
                refuse_no_file(path)
                found = read_json(path)
                if isinstance(found, dict) and self.fingerprint in (found.get("run"), found.get("fingerprint")):
                    return True
        return False

    def _is_of_stage(self) -> bool:
        """Whether no other record in the folder says that it is a run of another stage."""
        found = []
        for name in ("settings.json", "done.json"):
            with contextlib.suppress(UserError):
                refuse_no_file(self.folder / name)
                record = read_json(self.folder / name)
                found.append(record.get("stage") if isinstance(record, dict) else None)
        return all(stage in (None, self.stage) for stage in found)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, {"step", "time" (seconds since the start), name: number, …}, and add the same
        numbers to TensorBoard's curves. A number that is not finite becomes null and is listed under "nonfinite".
        Blocks until JAX arrays are ready."""
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
            while text:  # a nearly full disk may take only part of it
                size = self._metrics.write(text)
                self._metrics_hash.update(text[:size])
                self._metrics_bytes += size
                text = text[size:]
            if self._curves is None:
                self._curves = _Curves(self.folder / "tensorboard", int(step))
                self._files.callback(self._curves.close)
            self._curves.add(int(step), finite)
        except OSError as error:
            raise self._cant_write(error) from None
        if self._wandb is not None:
            self._wandb.log(finite, step=int(step))

    def _cant_write(self, error: OSError) -> UserError:
        return UserError(f"can't write to the run folder {self.folder} ({error.strerror or error}); {MAKE_ROOM}")

    def position(self) -> dict[str, Any]:
        """The current end of the metrics, for `rewind`; all before it is safely on the disk (or in the bucket)."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._metrics.fileno())
        return {
            "metrics_bytes": self._metrics_bytes,
            "metrics_sha256": self._metrics_hash.hexdigest(),
            "seconds": time.monotonic() - self._started,
        }

    def rewind(self, position: Mapping[str, Any] | None) -> None:
        """Drop the metrics written after `position` (None: all), including the incomplete last line of a killed run."""
        end, seconds = (0, 0.0) if position is None else (int(position["metrics_bytes"]), position["seconds"])
        self._started = time.monotonic() - seconds
        if self._metrics is None:
            return
        path = self.folder / "metrics.jsonl"
        if position is not None:
            try:
                check_metrics(path, position)
            except UserError as error:
                self.say(f"WARNING: {error}")
        with open(path, "rb") as file:
            kept = file.read(end)
        self._metrics_bytes, self._metrics_hash = len(kept), hashlib.sha256(kept)
        os.truncate(self._metrics.fileno(), len(kept))

    def say(self, text: str) -> None:
        """Report a milestone in one line, on the terminal (above a live progress bar) and in log.txt."""
        if not self._first:
            return
        if self.console.is_terminal:
            self.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)
        if self._log is not None:
            with contextlib.suppress(OSError):  # full disk: the line was printed, and saving will stop the run
                self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n".encode())

    def progress(self, total: int, label: str, done: int = 0) -> contextlib.AbstractContextManager[Bar]:
        """`with run.progress(steps, "pretrain") as bar: bar.update(1, tokens=4096, loss=2.3)`. `done` of the
        total were done by an earlier process."""
        return progress_bar(self.console, total, label, done=done, quiet=not self._first)

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Mark the run as done, and return its results. Later runs with the same settings read them from done.json, so
        they must be JSON values: numbers (arrays become numbers or lists, NaN becomes null), text, lists and dicts."""
        self.finished, self.results = True, results_to_json(results)
        if self._first:
            self.check_folder()
            written = self.position()["metrics_sha256"]  # and the metrics are on the disk
            done = {"stage": self.stage, "fingerprint": self.fingerprint, "results": self.results}
            try:
                files = {**_outputs(self.folder), "metrics.jsonl": written}
                write_record(self.folder / "done.json", {**done, "files": files})
            except OSError as error:
                raise self._cant_write(error) from None
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # nothing is left to resume
        barrier("run finished")  # another stage of this process may read the folder next
        return self.results


class _Curves:
    """TensorBoard's event file, written in the caller's own thread, so that an error reaches the caller."""

    def __init__(self, folder: Path, first_step: int) -> None:
        with needs_extra("train"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # TensorBoard drops older points from here on
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
    """For example "lr: 0.001 before, 0.003 now"; an empty string if nothing differs."""
    old, new = flatten_json(there["settings"]), flatten_json(now["settings"])
    absent = "absent"
    changed = [
        f"{name}: {old.get(name, absent)} before, {new.get(name, absent)} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
    ]
    names = dict.fromkeys([*there["inputs"], *now["inputs"]])
    changed += [f"made from another {name}" for name in names if there["inputs"].get(name) != now["inputs"].get(name)]
    return "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        advice = "pip install 'jaxgpt[wandb]', or unset it"
        raise UserError(f"JAXGPT_WANDB is set but wandb is not installed; {advice}") from None
    return wandb


def results_to_json(value: Any) -> Any:
    """Convert results to JSON values."""
    if isinstance(value, Mapping):
        return {str(key): results_to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [results_to_json(inner) for inner in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return results_to_json(np.asarray(value).tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return results_to_json(dataclasses.asdict(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return settings_to_json(value)
