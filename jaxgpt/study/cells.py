"""A study and its parts, each saved as soon as it is done: a stopped study resumes after the last saved part."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.files import read_record, write_record
from jaxgpt.runs.endings import STOPS, tell_next_start
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run, results_to_json, run_fingerprint
from jaxgpt.runs.saved_model import load_model, save_model
from jaxgpt.structs import Params

T = TypeVar("T")


class ResultCache:
    """Results cached as cells/NAME.json in a run folder. A cell of a study with other settings or inputs is remade."""

    def __init__(self, run: Run) -> None:
        self.run, self.folder = run, run.folder / "cells"
        if run.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)

    def __call__(self, name: str, make: Callable[[], Any], steps: int, bar: Bar) -> Any:
        """What `make` returns, or returned in an earlier start of the same study: JSON (numbers, text, lists, dicts).
        `make` advances the bar by `steps` itself; for a cached result, this does."""
        path = self.folder / f"{_file(name)}.json"
        names = ("study", "found")
        kept = self._read(path, lambda: read_record(path, names, "", older=names))
        if kept and kept["study"] == self.run.fingerprint:
            bar.update(steps)
            return kept["found"]
        found = results_to_json(make())
        write_record(path, {"study": self.run.fingerprint, "found": found})
        return found

    def model(
        self, name: str, make: Callable[[], tuple[Params, ModelConfig]], steps: int, bar: Bar
    ) -> tuple[Params, ModelConfig]:
        """The same for a model that other parts of the study need."""
        folder = self.folder / _file(name)
        kept = self._read(folder, lambda: load_model(folder))
        if kept and kept.extra.get("study") == self.run.fingerprint:
            bar.update(steps)
            return kept.params, kept.config
        params, config = make()
        save_model(folder, params, config, extra={"study": self.run.fingerprint})
        return params, config

    def _read(self, path: Path, read: Callable[[], T]) -> T | None:
        """A part saved earlier, or None if there is none. A damaged part is removed, with a warning."""
        if not os.path.lexists(path):
            return None
        try:
            return read()
        except UserError as error:
            self.run.say(f"WARNING: {str(error).partition(';')[0]}; this part is made again")
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return None


def run_study(
    name: str, settings: Any, inputs: Mapping[str, str], study: Callable[[Any, Run, ResultCache], dict[str, Any]]
) -> dict[str, Any]:
    """Run a study, unless an earlier run with these settings finished; returns its results. `study` writes
    report.html."""
    with Run(settings.run, settings, stage=name, inputs=dict(inputs), fresh=settings.fresh) as run:
        page = run.folder / "report.html"
        if run.finished:
            run.say(f"{name}: already done, see {page}")
        else:
            try:
                results = study(settings, run, ResultCache(run))
            except STOPS as stop:
                tell_next_start(stop, "the same command resumes after the last finished part")
                raise
            run.say(f"{name}: {page}")
            run.finish(results)
        return run.results


def stage_fingerprints(start: Path, *names: str) -> dict[str, str]:
    """A study's inputs: the fingerprints of finished stages in the folder `start`. UserError if one is missing."""
    return {name: run_fingerprint(start / name, name) for name in names}


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)
