"""Compare two models blind, and see which of their answers you really prefer.

    python -m experiments.blind                                        `make blind`: SFT against PPO of `make assistant`
    python -m experiments.blind --models runs/a/sft runs/a/dpo         any two models

You see twelve held-out prompts with two answers each, in random order; then your own win rate beside the simulated
annotator's. Votes are saved at once, and the same command resumes.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxgpt.config import Count, Positive, Seed, check_settings
from jaxgpt.data import sources, votes
from jaxgpt.data.templates import answer_text, prompt_ids
from jaxgpt.data.training_data import RowCounts
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root, read_json
from jaxgpt.models import sharding
from jaxgpt.rlhf import intervals, rollout
from jaxgpt.rlhf.annotator import SimulatedAnnotator
from jaxgpt.runs import ask
from jaxgpt.runs.cli import cli
from jaxgpt.runs.endings import Stopped
from jaxgpt.runs.run import run_fingerprint
from jaxgpt.runs.saved_model import check_language_model, load_language_model


@dataclasses.dataclass(frozen=True)
class Settings:
    """A few seconds on 2 CPU cores, and two minutes of reading."""

    run: Path = Path("runs/assistant/blind")
    models: tuple[Path, Path] = (Path("runs/assistant/sft"), Path("runs/assistant/ppo"))  # wins are the second's
    data: str = "movie_reviews"  # data set with the held-out prompts
    pairs: Count = 12
    annotator: Literal["you", "cheerful", "short"] = "you"  # the last two are programs
    new_tokens: Count = 40
    temperature: Positive = 0.7
    seed: Seed = 0
    cache: Path = cache_root() / "data"

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS: dict[str, Settings] = {}


def answer(place: Path, prompts: list[str], settings: Settings, mesh: jax.sharding.Mesh) -> list[votes.Answer]:
    """The answers of the model saved in `place`, one per prompt."""
    params, config, tok, _ = load_language_model(place)
    found = rollout.sample_answers(
        sharding.replicate(params, mesh),
        config,
        [prompt_ids(tok, prompt) for prompt in prompts],
        jax.random.key(settings.seed),
        functools.partial(answer_text, tok),
        mesh,
        new_tokens=settings.new_tokens,
        stop=tok.template.end,
        batch=len(prompts),
        temperature=settings.temperature,
    )
    origin = {"model": str(place), "checkpoint": run_fingerprint(place)[:16]}
    pairs = zip(found.texts, found.ended, strict=True)
    return [votes.Answer(text.strip(), bool(ended), origin) for text, ended in pairs]


def make_pairs(settings: Settings, store: votes.Store) -> list[votes.Task]:
    """The pairs in the store; an empty store is filled first."""
    if not store.tasks():
        mesh, rng = sharding.data_mesh(), np.random.default_rng(settings.seed)
        texts = [prompt.text for prompt in sources.prompts(settings.data, "test", settings.cache)]
        prompts = [str(text) for text in rng.permutation(sorted(set(texts)))[: settings.pairs]]
        for prompt, *both in zip(
            prompts, *(answer(place, prompts, settings, mesh) for place in settings.models), strict=True
        ):
            store.add_task(votes.Task(prompt, tuple(both)))
    tasks = list(store.tasks().values())
    compared = {(str(one.origin.get("model")), one.origin.get("checkpoint")) for task in tasks for one in task.answers}
    if compared != {(str(place), run_fingerprint(place)[:16]) for place in settings.models}:
        names = " and ".join(sorted({name for name, _ in compared}))
        raise UserError(f"{store.path} compares other models or older checkpoints ({names}); choose another --run")
    return tasks


def index_of(task: votes.Task, model: Path) -> int:
    """Which of the pair is this model's."""
    return [str(one.origin.get("model")) for one in task.answers].index(str(model))


def main(settings: Settings) -> dict[str, Any]:
    for place in settings.models:
        run_fingerprint(place)  # fail now if a model is missing
        check_language_model(place)
    store = votes.Store(settings.run / "votes.sqlite")
    tasks, rng = make_pairs(settings, store), np.random.default_rng([settings.seed, store.count()])
    names = [place.name for place in settings.models]
    if settings.annotator == "you":
        print(f"Which do you prefer? You aren't told which is {names[0]} and which {names[1]}. {ask.KEYS}.")
    program = None if settings.annotator == "you" else SimulatedAnnotator(wish=settings.annotator)
    who = settings.annotator if program is None else program.name
    try:
        while left := [task for task in tasks if not store.has_voted(task.id, who)]:
            if program is None:
                ask.ask(store, who, left[0], f"[{len(tasks) - len(left) + 1}/{len(tasks)}]", rng)
            else:
                gold = program.gold([one.text for one in left[0].answers])
                store.vote(votes.of_scores(f"{left[0].id}-{settings.annotator}", left[0].id, who, gold))
    except (KeyboardInterrupt, EOFError, Stopped):
        print(f"\nstopped; {store.count()} picks are in {store.path}, and the same command resumes")
        return {"picks": store.count()}
    picks = {vote.task: (store.task(vote.task), vote) for vote in store.votes(who)}
    shares = [votes.share_of(task, vote, index_of(task, settings.models[1])) for task, vote in picks.values()]
    counted = [part for part in shares if part is not None]
    if not counted:
        raise UserError("every pair was skipped; pick at least one to compare")
    wins, left_out = sum(counted), len(shares) - len(counted)
    print("\n" + intervals.in_words(f"{who} preferred {names[1]} to {names[0]}", wins, len(counted)))
    print(f"{RowCounts(len(shares), {'skipped or all bad': left_out} if left_out else {})}; a tie counts half")
    report = settings.run.parent / "report/done.json"
    if report.exists() and names == ["sft", "ppo"]:
        results = read_json(report)["results"]
        rate = results["policies"]["PPO"]["win_rate_gold"]["mean"]
        print(f"the simulated annotator (VADER) prefers ppo on {rate:.0%} of {results['prompts']} prompts")
    return {"wins": wins, "count": len(counted), "left_out": left_out}


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
