"""A web page where people pick the best of several answers, and a database of their votes.

    python -m experiments.label                                       `make label`: our SFT model, or SmolLM2, answers
    python -m experiments.label --models runs/a/sft runs/a/ppo        both answer; annotators aren't told which is which
    python -m experiments.label --answers theirs.jsonl                from a file: {"prompt", "answers"} on each line
    python -m experiments.label --retrain 50                          train a reward model every 50 votes, and ask about
                                                                      the prompts it is least sure of
    python -m experiments.label --serve.host 0.0.0.0                  for others on this network, at a secret address

Answers are generated ahead of time in the background. Each vote is on disk before the next prompt appears, so the same
command resumes however the last one ended. To train on the votes: `python -m experiments.reward --preferences
votes.sqlite:train --heldout votes.sqlite:heldout` (dpo takes the same flags), or `make assistant LABELS=votes.sqlite`.
experiments/votes.py converts and counts votes.
"""

import dataclasses
import functools
import re
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from jaxgpt.config import Count, CountOrZero, Positive, Range, Seed, check_settings, round_up
from jaxgpt.data import formats, pipelines, sources, votes
from jaxgpt.data.comparisons import Preference, tokenize_preferences
from jaxgpt.data.jsonl import read_rows
from jaxgpt.data.questions import questions
from jaxgpt.data.templates import answer_text, prompt_ids
from jaxgpt.data.training_data import RowCounts
from jaxgpt.files import cache_root
from jaxgpt.models import sharding
from jaxgpt.rlhf import reward, rollout
from jaxgpt.rlhf.intervals import check_finite
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import run_fingerprint
from jaxgpt.runs.saved_model import check_language_model, load_language_model, load_model
from jaxgpt.structs import Preferences
from jaxgpt.training.step import jit_on
from jaxgpt.web import label, server
from jaxgpt.web.label import LabelConfig

PROMPTS_PER_ROUND = 4  # prompts answered together, and at most so many kept
TOO_LONG = "too long for the models together with an answer"
OVERSAMPLE = 3  # with a reward model, this many prompts are answered for each one kept


@dataclasses.dataclass(frozen=True)
class Settings:
    """Runs on any machine: 2 CPU cores answer faster than a person reads."""

    votes: Path = Path("runs/label/votes.sqlite")
    models: tuple[Path, ...] = ()  # share the answers; none: runs/assistant/sft if it exists, otherwise smollm2-135m
    prompts: str = ""  # movie_reviews, questions, or files as in the other stages; '': what suits the first model
    answers: Path | None = None  # file of prompts with answers, shown before generated ones
    candidates: Annotated[int, Range(2, 9)] = 4  # answers per prompt
    prefetch: Count = 12  # prompts kept ready with answers
    new_tokens: Count = 48
    temperature: Positive = 0.7
    retrain: CountOrZero = 0  # train a reward model after this many new votes; 0: never
    assignment: LabelConfig = LabelConfig()
    serve: server.ServeConfig = server.ServeConfig()
    seed: Seed = 0
    cache: Path = cache_root() / "data"

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS: dict[str, Settings] = {}


class Model:
    """A language model that answers prompts, on the devices."""

    def __init__(self, place: Path, mesh: jax.sharding.Mesh) -> None:
        params, self.config, self.tok, _ = load_language_model(place)
        self.place, self.fingerprint = place, run_fingerprint(place)[:16]
        self.params = sharding.replicate(params, mesh)


class AnswerGenerator:
    """Keeps `prefetch` prompts with answers ready in the store; `run` is meant for its own thread."""

    def __init__(self, settings: Settings, store: votes.Store) -> None:
        self.settings, self.store = settings, store
        self.models: list[Model] = []
        self.state = "loading"  # shown on the page
        self.trained_at = store.count()  # number of votes when the last reward model was trained
        self.rng = np.random.default_rng([settings.seed, len(store.tasks())])  # different after a restart
        self.uncertainty: Any = None  # (prompt, answers) -> how unsure the reward model is, 0 to 1
        self.mesh = sharding.data_mesh()
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            self.models = [Model(place, self.mesh) for place in places(self.settings)]
            known = self.store.prompts()
            prompts = load_prompts(self.settings, self.models[0].place)
            fitting = [text for text in prompts if self.fits(text)]
            print(f"prompts: {RowCounts(len(prompts)).without(TOO_LONG, len(prompts) - len(fitting))}", flush=True)
            self.remaining = [text for text in fitting if text not in known]
            self.rng.shuffle(self.remaining)
            if self.settings.retrain:
                self.resume()
            while not self.stop.is_set():
                if self.settings.retrain and self.store.count() - self.trained_at >= self.settings.retrain:
                    self.retrain()
                if self.store.count_unvoted() < self.settings.prefetch and self.remaining:
                    self.state = f"{self.store.count_unvoted()} of {self.settings.prefetch} prompts have answers"
                    self.add_tasks()
                else:
                    self.state = ""
                    self.stop.wait(0.3)
        except Exception as error:  # the page shows the message and keeps serving the prompts that are ready
            traceback.print_exc()
            self.state = f"no more answers will be generated ({error})"

    def fits(self, prompt: str) -> bool:
        """Whether the prompt and an answer fit into every model's block."""
        room = self.settings.new_tokens
        return all(len(prompt_ids(model.tok, prompt)) + room <= model.config.block for model in self.models)

    def add_tasks(self) -> None:
        """Answer a few more prompts and store them; with a reward model, only those it is least sure of."""
        count = PROMPTS_PER_ROUND * (OVERSAMPLE if self.uncertainty else 1)
        chosen, self.remaining = self.remaining[:count], self.remaining[count:]
        tasks = [self.make_task(prompt, answers) for prompt, answers in zip(chosen, self.answer(chosen), strict=True)]
        most_doubtful = sorted((task for task in tasks if task), key=lambda task: -task.doubt)
        for task in most_doubtful[:PROMPTS_PER_ROUND]:
            self.store.add_task(task)

    def answer(self, chosen: list[str]) -> list[list[votes.Answer]]:
        """Sample `candidates` answers to each prompt, divided as evenly as possible among the models."""
        settings = self.settings
        answers: list[list[votes.Answer]] = [[] for _ in chosen]
        for m, model in enumerate(self.models):
            per_prompt = len(range(m, settings.candidates, len(self.models)))
            if not per_prompt:
                continue
            ids = [prompt_ids(model.tok, prompt) for prompt in chosen for _ in range(per_prompt)]
            width = min(round_up(max(map(len, ids)), 32), model.config.block - settings.new_tokens)
            seed = int(self.rng.integers(2**31))
            sampled = rollout.sample_answers(
                model.params,
                model.config,
                ids,
                jax.random.key(seed),
                functools.partial(answer_text, model.tok),
                self.mesh,
                new_tokens=settings.new_tokens,
                stop=model.tok.template.end,
                batch=PROMPTS_PER_ROUND * per_prompt,
                temperature=settings.temperature,
                width=max(width, *map(len, ids)),
            )
            origin = {
                "model": str(model.place),
                "checkpoint": model.fingerprint,
                "temperature": settings.temperature,
                "new_tokens": settings.new_tokens,
                "seed": seed,
            }
            for row, (text, ended) in enumerate(zip(sampled.texts, sampled.ended, strict=True)):
                answers[row // per_prompt].append(votes.Answer(text.strip(), bool(ended), {**origin, "row": row}))
        return answers

    def make_task(self, prompt: str, answers: list[votes.Answer]) -> votes.Task | None:
        """A task with these answers in random order, without duplicates; None if fewer than two are left."""
        different = list({answer.text: answer for answer in answers if answer.text}.values())
        self.rng.shuffle(different)
        if len(different) < 2:
            return None
        return votes.Task(prompt, tuple(different), self.uncertainty(prompt, different) if self.uncertainty else 0.0)

    def resume(self) -> None:
        """Load the newest reward model of an earlier session."""
        if found := reward_runs(self.settings.votes):
            self.trained_at = max(found)
            self.uncertainty = make_uncertainty(found[self.trained_at], self.settings, self.mesh)

    def retrain(self) -> None:
        """Train a new reward model on all votes. The old one stays until then, or if there are too few votes."""
        self.trained_at, file = self.store.count(), self.settings.votes
        run = file.with_name(f"{file.stem}-reward-{self.trained_at}")
        self.state = f"training a reward model on {self.trained_at} votes"
        command = [
            "-m",
            "experiments.reward",
            "--model",
            str(self.models[0].place),
            "--preferences",
            f"{file}:train",
            "--heldout",
            f"{file}:heldout",
            "--run",
            str(run),
            "--epochs",
            "3",
            "--batch",
            "8",
            "--lora",
            "8",
            "--microbatches",
            "4" if jax.device_count() == 1 else "1",
            "--fresh",
        ]
        process = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        said = (process.stdout if process.returncode == 0 else process.stderr).strip().splitlines() or ["no message"]
        print(f"after {self.trained_at} votes: {said[-1]}", flush=True)
        if process.returncode == 0:
            self.uncertainty = make_uncertainty(run, self.settings, self.mesh)


def reward_runs(file: Path) -> dict[int, Path]:
    """The finished reward models trained from this database, by the number of votes each was trained on."""
    name = re.compile(re.escape(file.stem) + r"-reward-(\d+)")
    runs = [done.parent for done in file.parent.glob("*/done.json")]
    return {int(found[1]): run for run in runs if (found := name.fullmatch(run.name))}


def make_uncertainty(run: Path, settings: Settings, mesh: jax.sharding.Mesh) -> Any:
    """A function (prompt, answers) -> entropy of the reward model's choice as a fraction of the maximum: 0 to 1."""
    params, config, tok, _ = load_model(run)
    params = sharding.replicate(params, mesh)
    program = jit_on(mesh, lambda params, batch: reward.candidate_scores(params, config, batch))

    def uncertainty(prompt: str, answers: list[votes.Answer]) -> float:
        preference = Preference(prompt, tuple(a.text for a in answers), 0, tuple(a.ended for a in answers))
        ranking = tokenize_preferences(tok, [preference])
        longest = max(len(ids) for ids, _ in ranking[0].rows)
        if longest > config.block:
            return 0.0
        arrays = next(iter(pipelines.preference_eval(ranking, min(config.block, -(-longest // 64) * 64), 1)))
        h = np.asarray(program(params, sharding.place_whole(Preferences.of(arrays), mesh)), np.float64)[0]
        check_finite(h, "scores of the reward model")
        p = np.exp(h - np.logaddexp.reduce(h))
        return float(-(p * np.log(np.maximum(p, 1e-30))).sum() / np.log(len(answers)))

    return uncertainty


def places(settings: Settings) -> tuple[Path, ...]:
    """Where the models that answer are."""
    own = Path("runs/assistant/sft")
    return settings.models or ((own,) if (own / "done.json").exists() else (Path("smollm2-135m"),))


def load_prompts(settings: Settings, model: Path) -> list[str]:
    """The prompts to answer; by default openings of reviews for a model trained here, and questions for any other."""
    source = settings.prompts or (sources.EMBEDDED if (model / "done.json").exists() else "questions")
    if source == "questions":
        return questions()
    return [prompt.text for prompt in sources.prompts(source, "train", settings.cache)]


def tasks_from_file(path: Path) -> list[votes.Task]:
    """Tasks from {"prompt", "answers"} on each line, or from any preference format, whose choices are ignored."""
    rows = list(read_rows(path))
    if rows and all({"prompt", "answers"} <= row.keys() for _, row in rows):
        texts = [(row["prompt"], row["answers"]) for _, row in rows]
    else:
        verdicts, left_out = formats.read(path)
        texts = [(one.prompt, one.answers) for one in verdicts]
        if left_out:
            print(f"{path}: {RowCounts(len(verdicts) + left_out.total(), left_out)}")
    return [
        votes.Task(prompt, tuple(votes.Answer(text, origin={"model": str(path), "row": i}) for text in answers))
        for i, (prompt, answers) in enumerate(texts)
    ]


def main(settings: Settings) -> dict[str, Any]:
    from_file = tasks_from_file(settings.answers) if settings.answers else []
    for place in places(settings):
        run_fingerprint(place)  # UserError now if a model is missing
        check_language_model(place)
    bound = server.Server(settings.serve, token := settings.serve.required_token())
    store = votes.Store(settings.votes)
    new = sum(store.add_task(task) for task in from_file)
    generator = AnswerGenerator(settings, store)
    if not from_file or settings.models:
        threading.Thread(target=generator.run, daemon=True).start()
    else:
        generator.state = ""
    print(f"votes: {settings.votes} ({store.count()} so far{f', {new} new prompts' if from_file else ''})")
    print(f"label at {bound.address} (Ctrl-C to stop; every vote is saved at once)", flush=True)
    server.open_page(bound.address)
    bound.run(label.application(store, settings.assignment, settings.serve, token, lambda: generator.state))
    generator.stop.set()
    found = {"votes": store.count(), "agreement": votes.agreement(store.votes(), tasks=store.tasks())}
    print(
        f"\n{found['votes']} votes in {settings.votes}"
        + (f"; annotators agree on {found['agreement']}" if found["agreement"] else "")
    )
    return found


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
