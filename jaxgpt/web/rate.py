"""A person as the reward function of reinforcement learning, in place of a learned reward model.

    person = HumanReward(store, "ada")              # a host reward function: (prompts, answers) -> rewards
    app = rate.application(person, ServeConfig(), token)

The loop calls `person(prompts, answers)` and waits; the page shows one answer after another and asks for one to five
stars. Every rating is on disk before its request is answered: a loop restarted with the same answers asks only for
those that are still unrated.
"""

import dataclasses
import hashlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.data import votes
from jaxgpt.errors import needs_extra
from jaxgpt.web import server
from jaxgpt.web.server import RequestRefused, ServeConfig, require_field

with needs_extra("web"):
    from starlette.concurrency import run_in_threadpool


@dataclasses.dataclass(frozen=True)
class RatingItem:
    """An answer that is waiting for a rating."""

    id: str
    prompt: str
    answer: str


class HumanReward:
    """reward_fn(prompts, answers) -> stars - 3, [B] float32, -2 to 2.

    `waited`: total seconds that calls waited for the person."""

    def __init__(self, store: votes.Store, annotator: str = "person") -> None:
        self.store, self.annotator = store, annotator
        self.waited, self.calls, self.about, self.finished = 0.0, 0, "", False
        self._items: list[RatingItem] = []
        self._change = threading.Condition()

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """One reward per answer, once the person has rated all of them."""
        started = time.monotonic()
        self.calls += 1
        items = [
            RatingItem(
                hashlib.sha256(f"{self.calls}\0{i}\0{prompt}\0{answer}".encode()).hexdigest()[:32], prompt, answer
            )
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        with self._change:
            self._items = items
            while any(self.store.rating(item.id) is None for item in items):
                self._change.wait(1.0)
        self.waited += time.monotonic() - started
        stars = [self.store.rating(item.id) or 3 for item in items]
        return np.array(stars, np.float32) - 3

    def state(self) -> dict[str, Any]:
        """What the page shows: the next unrated item, and how many of this call have been rated."""
        with self._change:
            unrated = [item for item in self._items if self.store.rating(item.id) is None]
            return {
                "item": dataclasses.asdict(unrated[0]) if unrated else None,
                "rated": len(self._items) - len(unrated),
                "of": len(self._items),
                "about": self.about,
                "finished": self.finished,
            }

    def rate(self, id_: str, stars: int, seconds: float | None) -> dict[str, Any]:
        """Store a rating; returns what the page shows next."""
        with self._change:
            item = next((item for item in self._items if item.id == id_), None)
            if item is None:
                raise RequestRefused(409, "this answer is no longer waiting for a rating")
            self.store.rate(item.id, item.prompt, item.answer, self.annotator, stars, seconds)
            self._change.notify_all()
        return self.state()


def application(person: HumanReward, serve: ServeConfig, token: str) -> server.Guard:
    """The rating page and its API calls."""

    async def state(data: dict[str, Any]) -> Any:
        return await run_in_threadpool(person.state)

    async def rate(data: dict[str, Any]) -> Any:
        id_, stars = require_field(data, "id", str), require_field(data, "stars", int)
        return await run_in_threadpool(person.rate, id_, stars, require_field(data, "seconds", (int, float), None))

    return server.application("rate", {"state": state, "rate": rate}, serve, token)
