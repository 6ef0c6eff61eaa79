"""Reads a run folder and checks every type, for the doctor and the report's figures.

`read_run_record` raises UserError for anything that a run would not have written.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jaxgpt.errors import UserError, first_line, needs_extra
from jaxgpt.runs.rollouts import load_rollout
from jaxgpt.runs.run import check_outputs, read_done, read_settings
from jaxgpt.runs.settings import TYPE_NAMES

with needs_extra("train"):
    import msgspec

T = TypeVar("T")
AGAIN = "run the stage again, or copy its folder again"
Number = float | None  # None: it was not finite
Probability = Annotated[float, msgspec.Meta(gt=0, le=1)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


@dataclasses.dataclass(frozen=True)
class Span:
    """A mean and its interval, which is None where there are too few values for one."""

    mean: Number
    low: Number
    high: Number


@dataclasses.dataclass(frozen=True)
class PolicyFigures:
    """A policy's figures in the results of report and align: those that the doctor needs."""

    gold: Span | None = None
    reward: Span | None = None
    judge: Span | None = None
    length: Span | None = None
    words: Span | None = None
    ended: Span | None = None
    win_rate_gold: Span | None = None
    better_than_before: Span | None = None
    distinct_2: Number = None
    distinct_texts: Whole | None = None
    answers: tuple[str, ...] = ()  # some of them


@dataclasses.dataclass(frozen=True)
class PreferencePart:
    """The preferences stage's results for one of its two files."""

    preferences: Whole
    equal_answers: Whole = 0
    ended: Number = None  # share of the answers that ended by themselves


@dataclasses.dataclass(frozen=True)
class Rows:
    """A `data.training_data.RowCounts`, as stored."""

    read: Whole
    used: Whole


@dataclasses.dataclass(frozen=True)
class CalibrationRow:
    """A line of `rlhf.intervals.calibration`'s table."""

    predicted: float
    observed: float
    count: Annotated[float, msgspec.Meta(gt=0)]


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of any stage: those that the doctor and the report need."""

    heldout_nats_per_token: Number = None
    pretraining_nats_before: Number = None
    pretraining_nats_after: Number = None
    accuracy: Number = None
    accuracy_interval: Span | None = None
    chance: Probability | None = None
    nll: Number = None
    chance_nll: Number = None
    calibration: tuple[CalibrationRow, ...] = ()
    annotator: str = ""
    heldout_nll: Number = None
    heldout_accuracy_interval: Span | None = None
    heldout_trained_on: Whole = 0
    equal_answers: Whole = 0
    score: Number = None
    kl: Number = None
    prompts: Whole = 0
    rows: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    train: PreferencePart | None = None
    heldout: PreferencePart | None = None
    policies: Mapping[str, PolicyFigures] = dataclasses.field(default_factory=dict)
    models: Mapping[str, PolicyFigures] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of PPO's rollouts."""

    new_tokens: Whole | None = None


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    """Settings of the PPO stage that its checks need."""

    ppo: Sampling = Sampling()
    dtype: str = "float32"
    fixed_beta: bool = True
    target_kl: float | None = None


FINISHED = {  # stage -> the metrics and the results that a finished run must have
    "pretrain": (("train_nats_per_token", "skipped"), ("heldout_nats_per_token",)),
    "sft": (("train_nats_per_token", "skipped"), ("pretraining_nats_before", "pretraining_nats_after")),
    "preferences": ((), ("train", "heldout")),
    "reward": (("train_loss", "skipped"), ("accuracy", "nll", "chance")),
    "ppo": (
        ("score", "kl", "length", "ended", "sampler_gap_max", "ratio_error_first", "explained_variance", "skipped"),
        ("score", "kl"),
    ),
    "dpo": (("train_loss", "chosen_reward", "rejected_reward", "skipped"), ("heldout_nll",)),
    "report": ((), ("policies",)),
    "align": ((), ("models",)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of metrics.jsonl."""

    step: float
    time: float
    figures: Mapping[str, Number]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder: its stage, its settings, one row per log line, and the results once finished."""

    folder: Path
    stage: str
    settings: PPOSettings  # the defaults for any other stage
    rows: Sequence[Row]
    finished: bool
    results: Results
    not_finite: tuple[str, ...] = ()  # results that are null
    rollout: tuple[str, ...] = ()  # the texts of the newest kept rollout
    raw_results: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def curve(self, name: str) -> list[float]:
        """The finite values of a metric, in order."""
        return [value for _, value in self.points(name)]

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric where it is finite."""
        found = ((row.step, row.figures.get(name)) for row in self.rows)
        return [(step, value) for step, value in found if value is not None]


@dataclasses.dataclass(frozen=True)
class _About:
    stage: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Done:
    stage: str
    results: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Answer:
    tokens: list[str]


@dataclasses.dataclass(frozen=True)
class _Rollout:
    answers: list[_Answer]


def read_run_record(folder: Path) -> RunRecord:
    """Read a run folder. UserError names what can't be read or isn't what the run wrote. Only the last line of a killed
    run's metrics may be incomplete."""
    about = _convert(_read(read_settings, folder / "settings.json"), _About, folder / "settings.json")
    known = about.settings if about.stage == "ppo" else {}
    settings = _convert(known, PPOSettings, folder / "settings.json")
    finished = os.path.lexists(folder / "done.json")
    results = read_results(folder, about.stage) if finished else {}
    if finished:
        check_outputs(folder, read_done(folder), measured=True)
    record = RunRecord(
        folder=folder,
        stage=about.stage,
        settings=settings,
        rows=_read_metrics(folder / "metrics.jsonl", finished) if os.path.lexists(folder / "metrics.jsonl") else [],
        finished=finished,
        results=_convert(results if about.stage in FINISHED else {}, Results, folder / "done.json"),
        not_finite=tuple(name for name in FINISHED.get(about.stage, ((), ()))[1] if results.get(name, 0) is None),
        rollout=_newest_rollout(folder / "rollouts"),
        raw_results=results,
    )
    _check_complete(record)
    return record


def read_results(folder: Path, stage: str | None = None) -> dict[str, Any]:
    """The results in a run's done.json. UserError if it can't be read, or if its stage isn't `stage`."""
    done = _convert(_read(read_done, folder / "done.json"), _Done, folder / "done.json")
    if stage not in (None, done.stage):
        raise UserError(f"{folder / 'done.json'} is of a run of {done.stage!r}, not {stage!r}; give another folder")
    return done.results


def _check_complete(record: RunRecord) -> None:
    if not record.finished or record.stage not in FINISHED:
        return
    metrics, results = FINISHED[record.stage]
    logged = {name for row in record.rows for name in row.figures}
    for name in metrics:
        if name not in logged:
            raise UserError(f"{record.folder / 'metrics.jsonl'} holds no {name}; {AGAIN}")
    for name in results:
        if name not in record.raw_results:
            raise UserError(f"{record.folder / 'done.json'} holds no results.{name}; {AGAIN}")


def _read_metrics(path: Path, finished: bool) -> list[Row]:
    lines = _read_bytes(path).split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(_row(msgspec.json.decode(line)))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            if number < len(lines) or finished:
                raise UserError(f"{path}:{number} is not a line of metrics ({first_line(error)}); {AGAIN}") from None
    return rows


def _row(line: Any) -> Row:
    line = msgspec.convert(line, dict[str, Any])
    nonfinite = msgspec.convert(line.pop("nonfinite", []), list[str])
    figures = msgspec.convert(line, dict[str, Number])
    step, time = (msgspec.convert(figures.pop(name, None), float) for name in ("step", "time"))
    return Row(step, time, figures | dict.fromkeys(nonfinite))


def _newest_rollout(folder: Path) -> tuple[str, ...]:
    try:
        path = max(folder.glob("*.json"), default=None)
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from None
    if path is None:
        return ()
    return tuple("".join(answer.tokens) for answer in _convert(load_rollout(path), _Rollout, path).answers)


def _read(record: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """`record(folder)` for the folder of this path, after a check that the file itself can be read."""
    _read_bytes(path)
    return record(path.parent)


def _read_bytes(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist; {AGAIN}")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file; {AGAIN}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def _convert(data: Any, kind: type[T], path: Path) -> T:
    try:
        return msgspec.convert(data, kind)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        what, _, place = first_line(error).partition(" - at ")
        types = re.fullmatch(r"Expected `([^`|]+)[^`]*`, got `(\w+)`", what)
        if types:
            wanted, found = (TYPE_NAMES.get(name.strip(), name.strip()) for name in types.groups())
            what = f"must be {wanted}, not {found}"
        name = place.strip("`").removeprefix("$.") or "its content"
        raise UserError(f"{path} is damaged: {name} {what}; {AGAIN}") from None
