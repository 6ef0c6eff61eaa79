"""The training loop that every stage shares; each stage writes the loop's body.

    with Loop(run, settings, tok, settings.steps, batches, config.vocab) as loop:
        state = loop.restore(shapes, start)              # the newest good checkpoint, or start()
        for step, batch in loop:
            state, metrics = train_step(state, batch)
            loop.record(step, state, metrics)            # the only place that logs and saves

The loop resumes at the step after the checkpoint, with results bit-identical to an uninterrupted run. It yields
batches, shows progress, writes metrics.jsonl every `log_every` steps, saves every `save.every` steps, and stops after
`guard.patience` skipped updates in a row, leaving the last batch in the run folder.

On SIGTERM (preemption) or SIGHUP (a closed terminal; not under nohup) it saves after the current step and exits with
code 75; on Ctrl-C it does the same with code 130, and a second Ctrl-C quits at once. With several processes, all of
them run the same loop.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.config import Count, CountOrZero, check_settings
from jaxgpt.data.pipelines import check_tokens
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.runs.checkpoints import Checkpoints, ResumableIterator, SaveConfig
from jaxgpt.runs.endings import Stopped, take_hangup_as_sigterm
from jaxgpt.runs.profiling import Profile
from jaxgpt.runs.progress import Bar
from jaxgpt.runs.run import Run
from jaxgpt.training.guard import GuardConfig
from jaxgpt.training.step import Metrics, to_floats

UNCHECKED = 2  # newest steps whose guard result is left unread, so that the loop doesn't wait for the device
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Settings that all stages share."""

    log_every: Count = 10  # steps
    profile: CountOrZero = 0  # steps to trace with JAX's profiler, after the first two, which compile
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    save: SaveConfig = SaveConfig()
    force: bool = False  # resume although settings, data or tokenizer differ from the checkpoint's
    fresh: bool = False  # replace an earlier run in this folder

    def __post_init__(self) -> None:
        check_settings(self)


class Loop:
    """See the module's docstring.

    `total`: number of steps. `batches`: an iterator of dicts of host arrays that can save and restore its position,
    such as `data.pipelines.Batches`. `vocab`: a batch with a token outside [0, vocab) is refused. `tokens`: tokens per
    step, for the bar's tokens per second and the metric `tokens` (tokens so far); 0 leaves both out. `names`: a
    metric's name -> its name in metrics.jsonl, where they differ. `shown`: metrics on the progress bar.
    """

    def __init__(
        self,
        run: Run,
        settings: LoopSettings,
        tok: Tokenizer,
        total: int,
        batches: ResumableIterator,
        vocab: int,
        tokens: int = 0,
        names: Mapping[str, str] | None = None,
        *,
        shown: Sequence[str] = ("loss", "accuracy"),
    ) -> None:
        self.run, self.settings, self.total, self.batches, self.vocab = run, settings, total, batches, vocab
        self.tokens, self.names, self.shown = tokens, names or {}, shown
        self._checkpoints = Checkpoints(run, settings.save, tok, batches)
        self._profile = Profile(run, settings.profile)
        self._first = 1
        self._bar: Bar | None = None
        self._batch: Any = None  # the current step's
        self._exit_code: int | None = None  # set by a signal that asks to stop
        self._unchecked: deque[tuple[int, Metrics, Any]] = deque()
        self._waited = {"seconds_data": 0.0, "seconds_device": 0.0}
        self._cleanup = contextlib.ExitStack()

    def restore(self, shapes: T, start: Callable[[], T]) -> T:
        """The state to start from: the newest good checkpoint's, or start() if there is none. `shapes`: arrays or
        `jax.ShapeDtypeStruct`s with shardings; their mesh may differ from the checkpoint's.

        UserError if the newest good checkpoint has different parameters (each is listed), or (unless settings.force) a
        different tokenizer or data. Damaged checkpoints are reported and skipped."""
        record = self._checkpoints.newest(shapes, force=self.settings.force)
        if record is None:
            self.run.rewind(None)
            return start()
        state = self._checkpoints.load(record, shapes, self.total)
        self._first = record["step"] + 1
        return state

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        bar = self.run.progress(self.total, self.run.stage, done=self._first - 1)
        self._bar = self._cleanup.enter_context(bar)
        for step in range(self._first, self.total + 1):
            before = time.monotonic()
            self._batch = next(self.batches)
            self._waited["seconds_data"] += time.monotonic() - before
            check_tokens(self._batch, self.vocab)
            with jax.profiler.StepTraceAnnotation(self.run.stage, step_num=step):
                yield step, self._batch

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps is due at this step; at the last step it always is."""
        return step % every == 0 or step == self.total

    def record(
        self,
        step: int,
        state: Any,
        metrics: Metrics,
        heldout: Mapping[str, float] | None = None,
        tokens: int | None = None,
    ) -> dict[str, float]:
        """Log the step's metrics if due, and any `heldout` metrics in a line of their own; save if due or if a signal
        asked for it. Returns the metrics as floats, or {} if logging wasn't due.

        Raises `Stopped` after a save that a signal asked for, and UserError after too many skipped updates or when the
        disk is full."""
        floats: dict[str, float] = {}
        if self.is_due(step, self.settings.log_every):
            floats = to_floats(metrics)
            waited, self._waited = self._waited, dict.fromkeys(self._waited, 0.0)
            count = {"tokens": step * self.tokens} if self.tokens else {}  # a Python int: int32 would overflow
            named = {self.names.get(name, name): value for name, value in floats.items()}
            self.run.log(step, {**named, **count, **waited})
        if self._bar is not None:
            shown: dict[str, Any] = {name: floats[name] for name in self.shown if name in floats}
            advance = self._bar.update if self._exit_code is None else self._bar.count  # Ctrl-C also ends `| tee`
            advance(tokens=self.tokens if tokens is None else tokens, **shown)
        if heldout:
            self.run.log(step, heldout)
        self._unchecked.append((step, metrics, self._batch))
        self._profile.after(step, metrics)
        self._save_if_due(step, state)
        return floats

    def _save_if_due(self, step: int, state: Any) -> None:
        last = step == self.total
        asked = not last and self._asked_to_stop(step)
        due = not last and self.settings.save.every > 0 and step % self.settings.save.every == 0
        self._check_guard(0 if asked or due or last else UNCHECKED)
        if asked or due:
            self._checkpoints.save(step, state)
        if asked:
            self._checkpoints.wait()
            raise Stopped(f"saved after step {step} of {self.total}", self._exit_code or 75)

    def _check_guard(self, unchecked: int) -> None:
        count = step = 0
        while len(self._unchecked) > unchecked:
            step, metrics, batch = self._unchecked.popleft()
            before = time.monotonic()
            count = int(np.max(np.asarray(metrics["skipped_in_a_row"])))
            self._waited["seconds_device"] += time.monotonic() - before
            if count >= self.settings.guard.patience:
                raise UserError(
                    f"{count} updates in a row were skipped, the last at step {step}: {_what_was_wrong(metrics)}"
                    "; the parameters are unchanged. Look at the last batch "
                    f"({_write_batch(self.run.folder / f'bad_batch_{step}.npz', batch)}), or lower the learning rate"
                )
        if unchecked == 0 and count and step == self.total:
            self.run.say(
                f"{self.run.stage}: WARNING: the last {count} updates were skipped: {_what_was_wrong(metrics)}"
            )

    # ---- signals ----

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1  # then jax.distributed handles SIGTERM and tells all processes
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._cleanup.callback(signal.signal, number, signal.signal(number, self._on_signal))
            self._cleanup.callback(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))
            take_hangup_as_sigterm()
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(BrokenPipeError):
                self.run.say("saving after this step; press Ctrl-C again to quit at once")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self._exit_code = 130 if number == signal.SIGINT else 75

    def _asked_to_stop(self, step: int) -> bool:
        if jax.process_count() > 1:  # all processes stop at the same step
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._exit_code is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()
        self._profile.close()
        self._checkpoints.wait(report=kind is None)


def _what_was_wrong(metrics: Metrics) -> str:
    names = sorted(name for name, value in to_floats(metrics).items() if not np.isfinite(value))
    return f"not finite: {', '.join(names)}" if names else "the update was not finite, or the loss jumped"


def _write_batch(path: Path, batch: Any) -> Path:
    if jax.process_index() == 0:
        arrays: dict[str, Any] = {
            jax.tree_util.keystr(at, simple=True, separator="."): np.asarray(leaf)
            for at, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
        }
        np.savez(path, **arrays)
    return path
