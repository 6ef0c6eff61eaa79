"""Progress: a live bar (rich) on a terminal, otherwise a plain line now and then."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from jaxgpt.errors import needs_extra

with needs_extra("train"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column


PLAIN_LINE_SECONDS = 10.0  # between lines when the output is not a terminal
SPEED_WINDOW = 50  # updates over which the speed is averaged


class Bar:
    """Counts steps and tokens, and renders them; `Run.progress` creates one."""

    def __init__(self, total: int, label: str, done: int = 0) -> None:
        self.total, self.label, self.done = total, label, done
        self.fields: dict[str, Any] = {}
        self.started = time.monotonic()
        self._tokens = 0
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=SPEED_WINDOW)  # (time, steps, tokens) after an update

    def update(self, n: int = 1, *, tokens: int = 0, **fields: Any) -> None:
        """Advance by n steps and `tokens` tokens. A field is shown until it is passed again; a jax array is waited
        for, so pass fields only where the loop logs anyway."""
        self.count(n, tokens=tokens, **fields)
        self._render()

    def count(self, n: int = 1, *, tokens: int = 0, **fields: Any) -> None:
        """Like `update`, but nothing is shown before the next update or the end."""
        self.done += n
        self._tokens += tokens
        self.fields.update({name: _format_value(value) for name, value in fields.items()})
        self._marks.append((time.monotonic(), self.done, self._tokens))

    def _render(self) -> None:
        """Overridden by the two bars below; processes other than the first show nothing."""

    def status(self, finished: bool = False) -> str:
        """For example "1:20 left · 7.1k tokens/s · loss 3.21". The first update, which compiles, is left out of
        speeds."""
        parts = []
        elapsed = time.monotonic() - self.started
        seconds, steps, tokens = 0.0, 0, 0
        if len(self._marks) > 1:
            first, last = self._marks[0], self._marks[-1]
            seconds, steps, tokens = last[0] - first[0], last[1] - first[1], last[2] - first[2]
        if finished:
            parts.append(f"in {_clock(elapsed)}")
        elif seconds > 0 and steps > 0:
            parts.append(f"{_clock((self.total - self.done) * seconds / steps)} left")
        if seconds > 0 and tokens > 0:
            parts.append(f"{_count(tokens / seconds)} tokens/s")
        return " · ".join(parts + [f"{name.replace('_', ' ')} {value}" for name, value in self.fields.items()])


class _PlainBar(Bar):
    def __init__(self, total: int, label: str, done: int = 0) -> None:
        super().__init__(total, label, done)
        self._next_line = self.started + PLAIN_LINE_SECONDS

    def _render(self) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_LINE_SECONDS
            self.line()

    def line(self, finished: bool = False) -> None:
        percent = f" ({100 * self.done // self.total}%)" if self.total else ""
        print(f"{self.label} {self.done}/{self.total}{percent}  {self.status(finished)}".rstrip(), flush=True)


class _LiveBar(Bar):
    def __init__(self, total: int, label: str, live: Progress, done: int = 0) -> None:
        super().__init__(total, label, done)
        self._live = live
        self._task = live.add_task(label, total=total, completed=done, status="")

    def _render(self, finished: bool = False) -> None:
        self._live.update(self._task, completed=self.done, status=self.status(finished))


@contextlib.contextmanager
def progress_bar(console: Console, total: int, label: str, *, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """A Bar for `total` steps, the first `done` of them over: live on a terminal, plain lines elsewhere, or quiet."""
    if quiet:
        yield Bar(total, label, done)
    elif not console.is_terminal:
        plain = _PlainBar(total, label, done)
        try:
            yield plain
        finally:
            with contextlib.suppress(BrokenPipeError):  # nothing reads it any more; what ended the loop matters more
                plain.line(finished=True)
    else:
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        )
        with Progress(*columns, console=console, refresh_per_second=4, expand=True) as live:
            bar = _LiveBar(total, label, live, done)
            try:
                yield bar
            finally:
                bar._render(finished=True)


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{float(value):.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
