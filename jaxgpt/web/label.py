"""The API behind the page on which people rank answers; votes go to a `votes.Store`.

    app = label.application(store, LabelConfig(), ServeConfig(), token="")

Annotators don't see where an answer comes from. The answers are reshuffled for each annotator and each time a prompt is
shown again; an answer that an annotator writes is inserted at a random place, and the others keep their order. A vote
is on disk before its request is answered.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgpt.config import Fraction, check_settings
from jaxgpt.data import votes
from jaxgpt.data.jsonl import checked_text
from jaxgpt.errors import needs_extra
from jaxgpt.web import server
from jaxgpt.web.server import ServeConfig, require_field

with needs_extra("web"):
    from starlette.concurrency import run_in_threadpool


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Which prompts each annotator gets."""

    overlap: Fraction = 0.15  # fraction of prompts that every annotator gets, to measure how well they agree
    repeat: Fraction = 0.04  # repeated prompts per prompt an annotator has voted on, to measure their consistency

    def __post_init__(self) -> None:
        check_settings(self)


def application(
    store: votes.Store,
    config: LabelConfig,
    serve: ServeConfig,
    token: str,
    preparing: Callable[[], str] = lambda: "",
) -> server.Guard:
    """The label page and its API calls. `preparing` returns what is being prepared in the background, or ''."""
    progress = LabelStatistics(store, config.overlap)

    def page_state(task: votes.Task | None, annotator: str) -> dict[str, Any]:
        shown = None
        if task:
            order = insertion_shuffle(len(task.answers), f"{task.id} {annotator} {store.has_voted(task.id, annotator)}")
            answers = [{"index": i, "text": task.answers[i].text, "ended": task.answers[i].ended} for i in order]
            shown = {"id": task.id, "prompt": task.prompt, "answers": answers}
        return {"task": shown, "preparing": preparing(), "stats": progress.of(annotator)}

    def next_task(annotator: str) -> dict[str, Any]:
        task, _ = store.next_task(annotator, **dataclasses.asdict(config)) or (None, False)
        return page_state(task, annotator)

    def vote(data: dict[str, Any], annotator: str) -> dict[str, Any]:
        tiers = require_field(data, "tiers", list)
        shown = require_field(data, "shown", list)
        if not all(isinstance(tier, list) for tier in tiers):
            raise server.RequestRefused(400, "tiers must be a list of lists of answer indices")
        if not all(type(i) is int for i in [*shown, *(i for tier in tiers for i in tier)]):
            raise server.RequestRefused(400, "answers must be given by their indices, as whole numbers")
        store.vote(
            votes.Vote(
                id=require_field(data, "id", str),
                task=require_field(data, "task", str),
                annotator=annotator,
                kind=require_field(data, "kind", str),
                tiers=tuple(map(tuple, tiers)),
                shown=tuple(shown),
                seconds=require_field(data, "seconds", (int, float), None),
            )
        )
        return next_task(annotator)

    def undo(data: dict[str, Any], annotator: str) -> dict[str, Any]:
        task = store.undo(annotator, require_field(data, "id", str))
        if task is None:
            raise server.RequestRefused(409, "you have no vote to undo")
        return page_state(task, annotator)

    def answer(data: dict[str, Any], annotator: str) -> dict[str, Any]:
        origin = {"by": annotator, "edited": require_field(data, "edited", int, None)}
        written = votes.Answer(require_field(data, "text", str).strip(), origin=origin)
        task = store.add_answer(require_field(data, "task", str), written, require_field(data, "id", str))
        return page_state(task, annotator)

    def make_call(function: Callable[[dict[str, Any], str], dict[str, Any]]) -> server.Call:
        async def handle(data: dict[str, Any]) -> dict[str, Any]:
            name = checked_text(require_field(data, "annotator", str), "annotator", blank=True).strip()
            if not 1 <= len(name) <= 64:
                raise server.RequestRefused(400, "give your name: 1 to 64 characters")
            return await run_in_threadpool(function, data, name)

        return handle

    calls = {
        "next": make_call(lambda data, annotator: next_task(annotator)),
        "vote": make_call(vote),
        "undo": make_call(undo),
        "answer": make_call(answer),
    }
    return server.application("label", calls, serve, token)


def insertion_shuffle(count: int, seed: str) -> list[int]:
    """A random order, made by inserting each number among those before it: a larger count keeps their order."""
    rng, order = random.Random(seed), list[int]()
    for number in range(count):
        order.insert(rng.randrange(number + 1), number)
    return order


class LabelStatistics:
    """Progress, speed and agreement, as the page shows them. Computing agreement reads all votes, so it is recomputed
    at most once per `every` seconds."""

    def __init__(self, store: votes.Store, overlap: float = 0.0, every: float = 3.0) -> None:
        self.store, self.overlap, self.every = store, overlap, every
        self._cache: dict[str | None, tuple[float, dict[str, Any] | None]] = {}

    def of(self, annotator: str) -> dict[str, Any]:
        """The statistics shown to one annotator."""
        seconds = self.store.seconds(annotator, 50)
        return {
            "mine": self.store.count(annotator),
            "all": self.store.count(),
            "waiting": self.store.count_waiting(annotator, overlap=self.overlap),
            "seconds": statistics.median(seconds) if seconds else None,
            "with_myself": self._agreement(annotator),
            "with_others": self._agreement(None),
        }

    def _agreement(self, annotator: str | None) -> dict[str, Any] | None:
        """Agreement of one annotator with themselves, or, for None, between all annotators."""
        now = time.monotonic()
        computed_at, cached = self._cache.get(annotator, (-np.inf, None))
        if now - computed_at > self.every:
            agreement = votes.agreement(
                self.store.votes(annotator), within=annotator is not None, tasks=self.store.tasks()
            )
            cached = {**dataclasses.asdict(agreement), "kappa": agreement.kappa} if agreement else None
            self._cache[annotator] = now, cached
        return cached
