"""A trace of a few steps of a run by JAX's profiler: what host and devices did, and when."""

import shutil

import jax

from jaxgpt.runs.run import Run

WARM_UP = 2  # steps of this process before the trace: they compile


class Profile:
    """Traces `steps` steps of a run, after those that compile. With 0 it does nothing.

    A trace has a folder of its own below the run's profile/, named after its first step; with several processes, each
    has one below that. A trace that can't be written is reported, and the run continues."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps = run, steps
        self._seen = 0  # steps of this process
        self._step = 0  # the last of them, and what it computed
        self._results: object = None
        self._first: int | None = None  # the first step of the trace that is being taken
        self._folder = run.folder / "profile"

    def after(self, step: int, results: object) -> None:
        """Call this after every step, with arrays that it computed."""
        if self.steps == 0:
            return
        self._seen, self._step, self._results = self._seen + 1, step, results
        if self._seen == WARM_UP:
            self._start(step + 1)
        elif self._seen == WARM_UP + self.steps:
            self._stop()

    def close(self) -> None:
        """Call this after the last step: it ends a trace of fewer steps."""
        self._stop()
        if 0 < self._seen <= WARM_UP and self.steps:
            self.run.say(f"{self.run.stage}: nothing was profiled: the first {WARM_UP} steps compile")

    def _start(self, step: int) -> None:
        jax.block_until_ready(self._results)
        folder = self._folder / str(step)
        if jax.process_count() > 1:  # on one machine they would write to the same file
            folder /= f"process_{jax.process_index()}"
        try:
            shutil.rmtree(folder, ignore_errors=True)  # from before the checkpoint that this process resumed from
            folder.mkdir(parents=True)
            jax.profiler.start_trace(folder)
            self._first = step
        except (OSError, RuntimeError) as error:
            self.run.say(f"WARNING: nothing is profiled ({error})")

    def _stop(self) -> None:
        if self._first is None:
            return
        first, self._first = self._first, None
        try:
            jax.block_until_ready(self._results)
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self.run.say(f"WARNING: the profile could not be written ({error})")
            return
        self.run.say(
            f"{self.run.stage}: profiled steps {first} to {self._step}; to look at them: "
            f"pip install xprof, then xprof --logdir={self._folder / str(first)}"
        )
