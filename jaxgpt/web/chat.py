"""The page on which models answer side by side: its calls.

    say       one model's answer, streamed as lines of JSON; the last line has the figures of every token
    rate      which of the answers was best, or none: a vote in the same database as the label page's
    unrate    takes back such a vote, if it still stands
    models    the models that answer, and the names of the rollouts;  rollout   answers that a PPO run kept

A model samples in a thread of its own, into a queue, so that a slow or absent reader doesn't hold up the others.
"""

import asyncio
import dataclasses
import json
import random
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.data import votes
from jaxgpt.data.formats import join_turns
from jaxgpt.data.jsonl import checked_text
from jaxgpt.data.templates import Turn
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.runs.rollouts import load_rollout
from jaxgpt.runs.run import run_fingerprint
from jaxgpt.web import server
from jaxgpt.web.server import RequestRefused, ServeConfig, require_field
from jaxgpt.web.speaker import SamplingConfig, Speaker, TokenInspector

with needs_extra("web"):
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

TOP_K = (0, 10, 50)  # each compiles a program of its own, so the page offers only a few
MAX_ANSWER_TOKENS = 512  # maximum tokens of an answer
MAX_QUEUED = 8  # requests that may wait for one model


@dataclasses.dataclass
class ChatModel:
    """A model on the page."""

    name: str
    place: Path
    inspector: TokenInspector
    fingerprint: str
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    queued: int = 0

    @property
    def speaker(self) -> Speaker:
        """The model's `Speaker`."""
        return self.inspector.speaker

    def describe_model(self) -> dict[str, Any]:
        """What the page shows about this model."""
        config = self.speaker.config
        return {
            "name": self.name,
            "layers": config.layers,
            "width": config.width,
            "block": config.block,
            "raw": self.speaker.raw,
            "remembers": self.speaker.is_multi_turn,
            "reference": self.inspector.reference is not None,
            "critic": self.inspector.critic is not None,
            "reward_model": self.inspector.reward_model is not None,
        }


def load_models(places: Sequence[Path], reference: Path | None, reward_model: Path | None) -> list[ChatModel]:
    """Load the models. The KL of each is to `reference` if that has the same tokenizer and config; the reward model
    `reward_model` scores the answers of the models that share its tokenizer."""
    compared = Speaker(reference) if reference else None
    found: list[ChatModel] = []
    for place in places:
        speaker = compared if compared and place == reference else Speaker(place)
        alike = compared and (speaker.config, speaker.tok.fingerprint) == (compared.config, compared.tok.fingerprint)
        critic = place / "critic" if (place / "critic" / "model.json").exists() else None
        scope = TokenInspector(speaker, compared.params if compared and alike else None, critic, reward_model)
        name = place.name if place.name not in {seat.name for seat in found} else str(place)
        found.append(ChatModel(name, place, scope, run_fingerprint(place)[:16]))
    return found


def application(
    models: Sequence[ChatModel], store: votes.Store, serve: ServeConfig, token: str, rollouts: Path | None = None
) -> server.Guard:
    """The chat page and its calls."""
    kept = {path.stem: path for path in sorted(rollouts.glob("*.json"))} if rollouts else {}

    async def describe(data: dict[str, Any]) -> dict[str, Any]:
        return {
            "models": [seat.describe_model() for seat in models],
            "top_k": TOP_K,
            "longest": MAX_ANSWER_TOKENS,
            "rollouts": sorted(kept),
        }

    async def rollout(data: dict[str, Any]) -> Any:
        name = require_field(data, "name", str)
        if name not in kept:
            raise RequestRefused(404, "no such rollout")
        return await run_in_threadpool(load_rollout, kept[name])

    async def say(request: Request) -> Response:
        try:
            data = await server.read_json(request)
            number = require_field(data, "model", int)
            if not 0 <= number < len(models):
                raise RequestRefused(404, "no such model")
            seat = models[number]
            how = SamplingConfig(
                temperature=float(require_field(data, "temperature", (int, float))),
                top_p=float(require_field(data, "top_p", (int, float))),
                top_k=require_field(data, "top_k", int),
                new_tokens=min(require_field(data, "new_tokens", int), MAX_ANSWER_TOKENS),
            )
            if how.top_k not in TOP_K:
                raise RequestRefused(400, f"top_k must be one of {', '.join(map(str, TOP_K))}")
            *earlier, (prompt, _) = parse_turns(data)
            ids = seat.speaker.prompt(prompt, earlier, how.new_tokens)
            seat.speaker.answer_budget(ids, how.new_tokens)
            if seat.queued >= MAX_QUEUED:
                raise RequestRefused(429, f"{seat.name} already has {MAX_QUEUED} answers waiting; try again later")
            seed = require_field(data, "seed", int, random.randrange(2**31)) % 2**31
        except RequestRefused as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        loop, gone = asyncio.get_running_loop(), threading.Event()
        lines: asyncio.Queue[str | None] = asyncio.Queue()

        def put(line: str | None) -> None:
            seat.queued -= line is None
            lines.put_nowait(line)

        def sample_answer() -> None:
            for line in stream_answer(seat, ids, how, seed, gone):
                loop.call_soon_threadsafe(put, line)
            loop.call_soon_threadsafe(put, None)

        async def stream_lines() -> AsyncIterator[str]:
            try:
                while (line := await lines.get()) is not None:
                    yield line
            finally:
                gone.set()

        seat.queued += 1
        threading.Thread(target=sample_answer, daemon=True).start()

        return StreamingResponse(stream_lines(), media_type="application/x-ndjson")

    def rate(data: dict[str, Any]) -> dict[str, Any]:
        annotator = checked_text(require_field(data, "annotator", str), "annotator").strip()
        answers = []
        for one in require_field(data, "answers", list):
            if not isinstance(one, dict):
                raise RequestRefused(400, "answers must be objects")
            number, how = require_field(one, "model", int), require_field(one, "how", dict)
            if not 0 <= number < len(models):
                raise RequestRefused(404, "no such model")
            figures = {
                name: how[name]
                for name in ("temperature", "top_p", "top_k", "new_tokens", "seed")
                if isinstance(how.get(name), (int, float))
            }
            origin = {"model": str(models[number].place), "checkpoint": models[number].fingerprint, **figures}
            answers.append(
                votes.Answer(require_field(one, "text", str).strip(), require_field(one, "ended", bool), origin)
            )
        best = require_field(data, "best", (int, type(None)))
        task = votes.Task(format_dialogue(parse_turns(data)), tuple(answers))
        shown = tuple(range(len(answers)))
        if best is not None and best not in shown:
            raise RequestRefused(400, "the best answer is not one of the answers")
        tiers = (shown,) if best is None else ((best,), tuple(i for i in shown if i != best))
        kind: Any = "bad" if best is None else "favourite"
        vote = votes.Vote(require_field(data, "id", str), task.id, annotator, kind, tiers, shown)
        store.add_task(task)
        return {"new": store.vote(vote), "votes": store.count(annotator)}

    def unrate(data: dict[str, Any]) -> dict[str, Any]:
        annotator = checked_text(require_field(data, "annotator", str), "annotator").strip()
        store.undo(annotator, require_field(data, "id", str), require_field(data, "vote", str))
        return {"votes": store.count(annotator)}

    async def rate_in_thread(data: dict[str, Any]) -> Any:
        return await run_in_threadpool(rate, data)

    async def unrate_in_thread(data: dict[str, Any]) -> Any:
        return await run_in_threadpool(unrate, data)

    calls = {"models": describe, "rollout": rollout, "rate": rate_in_thread, "unrate": unrate_in_thread}
    return server.application("chat", calls, serve, token, (Route("/api/say", say, methods=["POST"]),))


def parse_turns(data: dict[str, Any]) -> list[Turn]:
    """(prompt, answer) of each turn; the last turn has no answer yet."""
    found = []
    for turn in require_field(data, "turns", list):
        if not isinstance(turn, dict):
            raise RequestRefused(400, "turns must be objects")
        found.append(
            (checked_text(require_field(turn, "prompt", str), "a prompt"), str(require_field(turn, "answer", str, "")))
        )
    if not found:
        raise RequestRefused(400, "there are no turns; send at least a prompt")
    return found


def format_dialogue(conversation: list[Turn]) -> str:
    """The conversation as one prompt (`data.formats.join_turns`), without an answer to its last turn."""
    turns = [
        {"role": role, "content": text}
        for turn in conversation
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    prompt = join_turns(turns[:-1])
    if prompt is None:
        raise RequestRefused(400, 'a turn holds "Human:" after a blank line, or the like, so the vote can\'t be kept')
    return prompt


def stream_answer(
    seat: ChatModel, ids: list[int], how: SamplingConfig, seed: int, gone: threading.Event
) -> Iterator[str]:
    """Sample one answer and yield its lines of JSON; stops early when the reader is gone."""
    try:
        with seat.lock:
            started = time.monotonic()
            answer: list[int] = []
            for token, text in seat.speaker.generate(ids, how, jax.random.key(seed)):
                if gone.is_set():
                    return
                answer.append(token)
                if text:
                    yield json.dumps({"text": text}) + "\n"
            seconds = time.monotonic() - started
            ended = len(answer) < seat.speaker.answer_budget(ids, how.new_tokens)
            if ended:
                answer.append(seat.speaker.stop)
            yield json.dumps({"done": answer_report(seat, ids, answer, how, ended, seconds, seed)}) + "\n"
    except UserError as error:
        yield json.dumps({"error": str(error)}) + "\n"
    except Exception as error:  # shown on the page: nothing else sees this thread's errors
        traceback.print_exc()
        yield json.dumps({"error": f"this answer failed ({type(error).__name__})"}) + "\n"


def answer_report(
    seat: ChatModel, ids: list[int], answer: list[int], how: SamplingConfig, ended: bool, seconds: float, seed: int
) -> dict[str, Any]:
    """Everything the page shows about an answer, token by token."""
    seen = seat.inspector.look(ids, answer, how.temperature)
    tokens = seat.speaker.tok.show_each(answer)

    def listed(x: np.ndarray | None) -> list[float] | None:
        return None if x is None else [round(float(v), 5) for v in x]

    return {
        "tokens": tokens,
        "p": listed(np.exp(seen.logp)),
        "logp": listed(seen.logp),
        "entropy": listed(seen.entropy),
        "kl": listed(seen.kl),
        "log_ratio": None if seen.ref_logp is None else listed(seen.logp - seen.ref_logp),
        "value": listed(seen.value),
        "score": seen.score,
        "ended": ended,
        "seconds": seconds,
        "how": {**dataclasses.asdict(how), "seed": seed},
    }
