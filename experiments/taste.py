"""Bend a real chat model to your taste: pick favourites, and see whether a reward fitted to them knows what you like.

    python -m experiments.taste                         `make taste`: in the terminal, about 5 minutes
    python -m experiments.taste --web                   the same on a page in the browser
    python -m experiments.taste --annotator short       unattended: a program that likes short (or cheerful) answers

SmolLM2-135M-Instruct, frozen, gives four answers to each prompt and you pick the best. A linear reward on its hidden
states is fitted to your picks, by the softmax likelihood of a reward model. Then, on new prompts, you compare the
best of 8 answers by that reward with a single answer, without knowing which is which. Votes are saved at once: the
same command resumes, and `experiments.reward` and `experiments.dpo` can train on them.
"""

import contextlib
import dataclasses
import functools
import shlex
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np

from jaxgpt import losses
from jaxgpt.config import Count, Positive, Range, Seed, check_settings, round_up
from jaxgpt.data import pipelines, votes
from jaxgpt.data.comparisons import LEFT_OUT, Preference, choices_of, tokenize_preferences
from jaxgpt.data.questions import questions
from jaxgpt.data.templates import answer_text, prompt_ids
from jaxgpt.data.training_data import RowCounts
from jaxgpt.errors import UserError
from jaxgpt.models import sharding
from jaxgpt.rlhf import intervals, linear_reward, rollout
from jaxgpt.rlhf.annotator import SimulatedAnnotator
from jaxgpt.rlhf.linear_reward import LinearReward
from jaxgpt.rlhf.reward import HeldoutMetrics, heldout_metrics
from jaxgpt.runs import ask
from jaxgpt.runs.cli import cli
from jaxgpt.runs.endings import Stopped
from jaxgpt.runs.saved_model import check_language_model, load_language_model
from jaxgpt.structs import Batch
from jaxgpt.web import label, server

ROUND = 4  # prompts whose answers are sampled in one batch
BEST, SINGLE = "best of several", "single sample"
LEARN, BLIND = "learn", "blind"  # what a task is for


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 5 minutes, most of it your own reading."""

    run: Path = Path("runs/taste")
    model: Path = Path("smollm2-135m")
    annotator: Literal["you", "short", "cheerful"] = "you"  # the last two are programs
    web: bool = False  # ask on a page instead of in the terminal
    prompts: Annotated[int, Range(2)] = 24  # to learn your taste from
    candidates: Annotated[int, Range(2, 9)] = 4  # answers per prompt
    best_of: Annotated[int, Range(2)] = 8
    blind: Count = 10  # new prompts to compare on
    new_tokens: Annotated[int, Range(4)] = 32
    temperature: Positive = 1.0
    ridge: Positive = 0.03
    serve: server.ServeConfig = server.ServeConfig()
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def votes_file(self) -> Path:
        """One file per annotator, so that a program's picks don't mix with yours."""
        return self.run / f"{self.annotator}.sqlite"


PRESETS: dict[str, Settings] = {}


class AnswerGenerator:
    """Generates answers in a background thread while a person reads, and keeps the features of every answer."""

    def __init__(self, settings: Settings, store: votes.Store) -> None:
        self.settings, self.store, self.mesh = settings, store, sharding.data_mesh()
        params, self.config, self.tok, _ = load_language_model(settings.model)
        self.params = sharding.replicate(params, self.mesh)
        self.features: dict[str, np.ndarray] = {}  # task id -> [answers, F]
        self.reward: LinearReward | None = None  # set by `main`; the thread needs it for the blind tasks
        self.changed, self.error = threading.Condition(), ""
        self.complete: set[str] = set()  # parts (LEARN, BLIND) whose tasks are all in the store
        rng = np.random.default_rng(settings.seed)
        self.learn = [str(text) for text in rng.permutation(questions())[: settings.prompts]]
        self.new = [str(text) for text in rng.permutation(questions(held_out=True))[: settings.blind]]
        self.key = jax.random.key(settings.seed)

    def start(self) -> None:
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        try:
            for task in self.store.tasks().values():  # of an earlier session
                self.keep_features(task, self.measure(task.prompt, [answer.text for answer in task.answers]))
            done = self.store.prompts()
            left = [text for text in self.learn if text not in done]
            for at in range(0, len(left), ROUND):
                chosen = left[at : at + ROUND]
                for prompt, texts in zip(chosen, self.sample(chosen, self.settings.candidates), strict=True):
                    self.add(prompt, texts, LEARN, [""] * len(texts))
            self.mark_complete(LEARN)
            new = [prompt for prompt in self.new if prompt not in done]
            pool = {prompt: self.sample([prompt], self.settings.best_of + 1)[0] for prompt in new}
            found = {prompt: self.measure(prompt, texts) for prompt, texts in pool.items()}
            with self.changed:
                self.changed.wait_for(lambda: self.reward is not None)
            for prompt, texts in pool.items():
                assert self.reward is not None
                best = 1 + int(self.reward.score(found[prompt][1:]).argmax())
                self.add(prompt, [texts[best], texts[0]], BLIND, [BEST, SINGLE])
            self.mark_complete(BLIND)
        except Exception as error:
            self.error = f"no more answers will be generated ({error})"
            raise
        finally:
            with self.changed:
                self.changed.notify_all()

    def sample(self, prompts: list[str], each: int) -> list[list[str]]:
        """`each` answers per prompt, as one list per prompt."""
        self.key, key = jax.random.split(self.key)
        ids = [prompt_ids(self.tok, prompt) for prompt in prompts for _ in range(each)]
        width = round_up(max(map(len, ids)), 32)
        found = rollout.sample_answers(
            self.params,
            self.config,
            ids,
            key,
            functools.partial(answer_text, self.tok),
            self.mesh,
            new_tokens=self.settings.new_tokens,
            stop=self.tok.template.end,
            batch=ROUND * self.settings.candidates,
            temperature=self.settings.temperature,
            width=width,
        )
        texts = [text.strip() for text in found.texts]
        return [texts[n * each : (n + 1) * each] for n in range(len(prompts))]

    def measure(self, prompt: str, texts: list[str]) -> np.ndarray:
        """The features of answers, [answers, F]."""
        preference = Preference(prompt, tuple(texts), 0, (True,) * len(texts))
        rows = tokenize_preferences(self.tok, [preference])[0].rows
        length = round_up(max(len(ids) for ids, _ in rows), 64)
        arrays = pipelines.padded_examples(rows, length, len(rows))[0]
        batch = Batch(arrays["tokens"], arrays["mask"])
        return linear_reward.features(self.params, self.config, batch, len(rows), self.mesh)

    def add(self, prompt: str, texts: list[str], part: str, by: list[str]) -> None:
        origin = [{"taste": part, "by": name, "model": str(self.settings.model)} for name in by]
        task = votes.Task(prompt, tuple(votes.Answer(text, True, own) for text, own in zip(texts, origin, strict=True)))
        if part == LEARN and len(set(texts)) < 2:
            return
        self.keep_features(task, self.measure(prompt, texts))
        self.store.add_task(task)

    def mark_complete(self, part: str) -> None:
        with self.changed:
            self.complete.add(part)
            self.changed.notify_all()

    def keep_features(self, task: votes.Task, feature_CF: np.ndarray) -> None:
        with self.changed:
            self.features[task.id] = feature_CF
            self.changed.notify_all()

    def features_of(self, task: votes.Task) -> np.ndarray:
        """The features of a task's answers, [answers, F]; of one that a person changed on the page they are new."""
        if task.id not in self.features:
            self.keep_features(task, self.measure(task.prompt, [answer.text for answer in task.answers]))
        return self.features[task.id]


class VoteCollector:
    """Where picks come from: a person in the terminal or on the page, or a program."""

    def __init__(self, settings: Settings, store: votes.Store, generator: AnswerGenerator) -> None:
        self.settings, self.store, self.generator = settings, store, generator
        self.rng = np.random.default_rng([settings.seed, store.count()])
        self.program = None if settings.annotator == "you" else SimulatedAnnotator(wish=settings.annotator)

    def tasks(self, part: str) -> list[votes.Task]:
        """Of this part, those included to which a person added an answer on the page."""
        all_ = self.store.tasks().values()
        return [task for task in all_ if any(answer.origin.get("taste") == part for answer in task.answers)]

    def picks(self, part: str) -> dict[str, votes.Vote]:
        """Task id -> the latest vote on it that was not taken back, for the tasks of this part; skips included."""
        known = {task.id for task in self.tasks(part)}
        return {vote.task: vote for vote in self.store.votes() if vote.task in known}

    def collect(self, part: str, total: int) -> None:
        """Ask until `total` tasks of this part have a vote, or no more will come."""
        while (done := len(self.picks(part))) < total:
            voted = self.picks(part)
            left = [task for task in self.tasks(part) if task.id not in voted]
            if not left:
                with self.generator.changed:
                    if self.generator.error:
                        raise UserError(self.generator.error)
                    if part in self.generator.complete and len(self.tasks(part)) == len(voted):
                        return  # fewer than `total`: prompts whose answers were all the same are left out
                    self.generator.changed.wait(timeout=0.5)
            elif self.settings.web:
                time.sleep(0.3)  # the page collects the votes
            elif self.program is not None:
                gold = self.program.gold([answer.text for answer in left[0].answers])
                name = f"{left[0].id}-{self.settings.annotator}"
                self.store.vote(votes.of_scores(name, left[0].id, self.program.name, gold))
            else:
                ask.ask(self.store, "you", left[0], f"[{done + 1}/{total}]", self.rng)


def learn(collector: VoteCollector, ridge: float) -> tuple[LinearReward, HeldoutMetrics, RowCounts]:
    """(reward fitted to all picks and ties, how well others like it predict the picks in cross-validation, votes)."""
    every = collector.picks(LEARN)
    left_out = Counter(LEFT_OUT[vote.kind] for vote in every.values() if vote.kind in LEFT_OUT)
    found = [(task, vote) for task, vote in every.items() if vote.kind not in LEFT_OUT]
    if sum(vote.kind != "tie" for _, vote in found) < 2:
        raise UserError(f"{RowCounts(len(every), left_out)}: too few for a reward; pick more answers, skip fewer")
    most = max(len(vote.shown) for _, vote in found)
    rows = [(n, among, best) for n, (_, vote) in enumerate(found) for among, best in choices_of(vote.tiers)]
    features = [collector.generator.features_of(collector.store.task(task)) for task, _ in found]
    feature_BCF = np.stack([np.pad(features[n], ((0, most - len(features[n])), (0, 0))) for n, _, _ in rows])
    present_BC = np.array([np.isin(np.arange(most), among) for _, among, _ in rows])
    choice_B = np.array([losses.TIE if best is None else best for _, _, best in rows])
    vote_B, score_BC = np.array([n for n, _, _ in rows]), np.zeros(present_BC.shape)
    for part in np.array_split(np.arange(len(found)), min(6, len(found))):
        own_B = np.isin(vote_B, part)
        reward = linear_reward.fit(feature_BCF[~own_B], choice_B[~own_B], present_BC[~own_B], ridge)
        score_BC[own_B] = reward.score(feature_BCF[own_B])
    measured = heldout_metrics(score_BC, choice_B, present_BC, [found[n][0] for n in vote_B])
    return linear_reward.fit(feature_BCF, choice_B, present_BC, ridge), measured, RowCounts(len(every), left_out)


def outcome(collector: VoteCollector) -> dict[str, Any]:
    """The blind comparison: wins of best-of-n (`votes.share_of`: a tie or two equal texts count half), each side's
    texts and mean words per answer."""
    sides: dict[str, list[str]] = {BEST: [], SINGLE: []}
    wins, count, votes_ = 0.0, 0, collector.picks(BLIND)
    for task in collector.tasks(BLIND):
        by = [str(answer.origin.get("by")) for answer in task.answers]
        for name, answer in zip(by, task.answers, strict=True):
            sides.setdefault(name, []).append(answer.text)
        vote = votes_.get(task.id)
        if vote is None or not {BEST, SINGLE}.issuperset(by):
            continue
        share = votes.share_of(task, vote, by.index(BEST))
        count += share is not None
        wins += share or 0.0
    words = {name: float(np.mean([len(text.split()) for text in texts])) for name, texts in sides.items() if texts}
    return {"wins": wins, "count": count, "words": words, "texts": sides}


def main(settings: Settings) -> dict[str, Any]:
    started = time.monotonic()
    check_language_model(settings.model)  # before a database is created
    store = votes.Store(settings.votes_file)
    others = {str(one.origin.get("model", settings.model)) for task in store.tasks().values() for one in task.answers}
    if others - {str(settings.model)}:
        raise UserError(f"{store.path} holds answers of {' and '.join(sorted(others))}; choose another --run")
    print(f"loading {settings.model} …", flush=True)
    generator = AnswerGenerator(settings, store)
    generator.start()
    collector = VoteCollector(settings, store, generator)
    if settings.web:
        bound = server.Server(settings.serve, token := settings.serve.required_token())
        state = ["answers are being made"]
        app = label.application(store, label.LabelConfig(0.0, 0.0), settings.serve, token, lambda: state[0])
        threading.Thread(target=bound.run, args=(app,), daemon=True).start()
        print(
            f"pick at {bound.address}: {settings.prompts} prompts, then {settings.blind} blind comparisons", flush=True
        )
        server.open_page(bound.address)
    elif settings.annotator == "you":
        print(f"\nWhich answer do you like best? {settings.prompts} prompts; {ask.KEYS}.")
    try:
        collector.collect(LEARN, settings.prompts)
        reward, measured, counts = learn(collector, settings.ridge)
        print(
            f"\nA linear reward was fitted to your picks: {counts}. In cross-validation it predicts {measured}. "
            f"Now {settings.blind} new prompts, blind: the best of {settings.best_of} answers by this reward against a "
            "single answer."
        )
        with generator.changed:
            generator.reward = reward
            generator.changed.notify_all()
        collector.collect(BLIND, settings.blind)
    except (KeyboardInterrupt, EOFError, Stopped):
        print(f"\nstopped; {store.count()} picks are in {store.path}, and the same command resumes")
        return {"picks": store.count()}
    found = outcome(collector)
    who = "you preferred it" if settings.annotator == "you" else f"the {settings.annotator} program preferred it"
    print("\n" + report(settings, found, who))
    print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes")
    if settings.web:
        state[0] = ""  # then the page says that all is done
        print("the page stays open until you press Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt, Stopped):
            threading.Event().wait()
    return {"predicted": measured._asdict(), "picks": counts.used, **found}


def report(settings: Settings, found: dict[str, Any], who: str) -> str:
    """The result, what was done in the terms of the lecture notes, and what to do next."""
    file = settings.votes_file
    single, best = (found["words"].get(name, 0.0) for name in (SINGLE, BEST))
    lines = [
        f"best of {settings.best_of} by your reward: {intervals.in_words(who, found['wins'], found['count'])}",
        f"words per answer: {single:.1f} for a single sample, {best:.1f} for the best of {settings.best_of}",
    ]
    if settings.annotator == "cheerful":
        mood = {name: SimulatedAnnotator().gold(texts).mean() for name, texts in found["texts"].items()}
        lines.append(f"VADER sentiment: {mood[SINGLE]:.2f} single sample, {mood[BEST]:.2f} best of {settings.best_of}")
    lines += [
        "",
        "What you did: candidate answers, preferences, a reward model (the softmax over its scores), and best-of-n.",
        "The next steps in the notes train the model itself, by PPO or DPO. With these votes:",
    ]
    align = ".venv/bin/python -m experiments.align"
    given, folder = (shlex.quote(str(path)) for path in (file, settings.run / "align"))
    steps = {
        f'make label ARGS="--votes {given}"': "pick more, on a page",
        f"make assistant LABELS={given}": "a small model trained from scratch on your picks",
        f"{align} --labels {given} --run {folder}": "PPO and DPO on this chat model",
    }
    lines += [f"  {command:{max(map(len, steps))}}  {what}" for command, what in steps.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
