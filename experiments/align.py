"""Align a pretrained model to a measurable wish: SmolLM2 learns to be brief, by PPO and by DPO.

    python -m experiments.align                          2 CPU cores, offline once the model's wheel is downloaded
    python -m experiments.align --preset gpu --run runs/align-gpu

The model answers questions about everyday things in one sentence. A simulated annotator (word count plus noise) picks
the shortest of four answers; the reward model, PPO and DPO train low-rank adapters on those choices alone. Results are
measured on held-out questions, about different things and worded differently: how many words, how often fewer than the
starting model's, and whether an answer still names what it was asked about, which nobody asked for. Each stage is an
experiment of this folder with other settings: a finished stage is not rerun, an interrupted one resumes.

`--labels runs/taste/you.sqlite` learns from people's votes on this model's answers, such as those of `make taste`.
`--annotator.wish cheerful` asks for cheerful answers instead (VADER's sentiment), which is harder to learn from so few
labels.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import experiments.dpo
import experiments.ppo
import experiments.preferences
import experiments.reward
from experiments.stages import chain_stages, chat_command, check_preference_files, name_preference_files
from jaxgpt.config import Count, CountOrZero, Positive, Seed, check_settings
from jaxgpt.data.jsonl import read_rows, write_rows
from jaxgpt.data.questions import mentions_subject
from jaxgpt.data.questions import questions as questions_about_things
from jaxgpt.data.templates import answer_text, prompt_ids
from jaxgpt.data.training_data import LoadedData, RowCounts, count_trained_on
from jaxgpt.models import sharding
from jaxgpt.rlhf import rollout
from jaxgpt.rlhf.annotator import SimulatedAnnotator
from jaxgpt.rlhf.intervals import TOO_FEW, Interval, distinct_2, interval, share, too_wide, wins
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: 55 minutes and 5.3 GB; 20 words shrink to 8 with PPO, 2 with DPO (docs/pretrained.md)."""

    run: Path = Path("runs/align")
    model: Path = Path("smollm2-135m")  # or a Hugging Face folder, a .gguf file, a run
    lora: CountOrZero = 8  # rank of the adapters
    temperature: Positive = 0.7  # of the policy, in every stage that samples or trains it
    new_tokens: Count = 48  # longest answer, in tokens
    annotator: SimulatedAnnotator = SimulatedAnnotator(wish="short")
    preferences: experiments.preferences.Settings = experiments.preferences.Settings(
        prompts=160, heldout=40, batch=80, unfinished_score=None
    )
    reward: experiments.reward.Settings = experiments.reward.Settings(
        batch=8, microbatches=4, learning_rate=1e-3, warmup=4, first_spread=0.1, reference_samples=64, log_every=5
    )
    ppo: experiments.ppo.Settings = experiments.ppo.Settings(
        iterations=16,
        batch=32,
        ppo=PPOConfig(epochs=1, minibatches=4),
        learning_rate=3e-4,
        beta=0.1,
        target_kl=8.0,
        horizon=1000.0,
        sample_every=8,
    )
    dpo: experiments.dpo.Settings = experiments.dpo.Settings(batch=8, microbatches=4, learning_rate=1e-3, log_every=5)
    labels: Path | None = None  # a database of people's votes, used instead of the annotator's preferences
    answers: Count = 2  # per held-out question and model
    seed: Seed = 0
    fresh: bool = False  # run every stage again

    def __post_init__(self) -> None:
        check_settings(self)


SHARES = ("better_than_before", "names_the_thing", "ended")  # measures that are fractions of answers
_TINY = Settings()
PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        lora=2,
        new_tokens=8,
        answers=1,
        preferences=dataclasses.replace(_TINY.preferences, prompts=16, heldout=8, candidates=2, batch=8),
        reward=dataclasses.replace(_TINY.reward, batch=8, microbatches=1, reference_samples=8),
        ppo=dataclasses.replace(_TINY.ppo, iterations=2, batch=8, ppo=PPOConfig(epochs=1, minibatches=1)),
        dpo=dataclasses.replace(_TINY.dpo, batch=8, microbatches=1),
    ),
    "gpu": Settings(
        lora=16,
        preferences=dataclasses.replace(_TINY.preferences, prompts=2000, heldout=300, batch=512),
        reward=dataclasses.replace(_TINY.reward, batch=32, limit=2000),
        ppo=dataclasses.replace(_TINY.ppo, iterations=100, batch=256, ppo=PPOConfig(epochs=2, minibatches=2)),
        dpo=dataclasses.replace(_TINY.dpo, batch=32, limit=2000),
        answers=8,
    ),
}
STAGES: dict[str, Any] = {
    "preferences": experiments.preferences,
    "reward": experiments.reward,
    "ppo": experiments.ppo,
    "dpo": experiments.dpo,
}


def stage_settings(settings: Settings) -> list[tuple[Any, Any]]:
    """(stage, settings) pairs in order; each stage's folder below `run` feeds the next."""
    root, questions = settings.run, str(settings.run / "questions.jsonl")
    files = name_preference_files(root, settings.labels)
    sampling: dict[str, Any] = {"temperature": settings.temperature, "new_tokens": settings.new_tokens}
    changes: dict[str, dict[str, Any]] = {
        "preferences": {"model": settings.model, "data": questions, "annotator": settings.annotator, **sampling},
        "reward": {"model": settings.model, "lora": settings.lora, **files},
        "ppo": {
            "model": settings.model,
            "lora": settings.lora,
            "data": questions,
            "reward": root / "reward",
            "ppo": dataclasses.replace(settings.ppo.ppo, **sampling),
        },
        "dpo": {"model": settings.model, "lora": settings.lora, "temperature": settings.temperature, **files},
    }
    return chain_stages(settings, STAGES, changes)


def interval_of(measure: str, values: np.ndarray) -> Interval:
    """The mean of a measure's values [questions, answers], with its interval over questions."""
    return (share if measure in SHARES else interval)(values.mean(1))


def measure(settings: Settings) -> dict[str, Any]:
    """Sample each model's answers to the held-out questions and measure them: gold reward, words, win rate against the
    starting model, KL from it in nats, fraction naming the thing asked about, fraction that end (each with its 95 %
    interval over questions), and distinct-2."""
    places = {"before": settings.model, "ppo": settings.run / "ppo", "dpo": settings.run / "dpo"}
    questions = questions_about_things(held_out=True)
    count, key, mesh = settings.answers, jax.random.key(1000 + settings.seed), sharding.data_mesh()
    start, config, tok, _ = load_language_model(settings.model)
    policy = transformer_policy(config, new_tokens=settings.new_tokens, temperature=settings.temperature)
    reference = sharding.replicate(start, mesh)
    ids = [prompt_ids(tok, question) for question in questions for _ in range(count)]
    found: dict[str, Any] = {}
    baseline = np.zeros((0, 0))
    for name, place in places.items():
        params = reference if name == "before" else sharding.replicate(load_language_model(place).params, mesh)
        answers = rollout.sample_answers(
            params,
            config,
            ids,
            jax.random.clone(key),
            lambda tokens: answer_text(tok, tokens),
            mesh,
            new_tokens=settings.new_tokens,
            stop=tok.template.end,
            batch=min(60, len(ids)),
            temperature=settings.temperature,
        )

        def log_probs(params: Any, rows: Any = answers.rows) -> np.ndarray:
            return rollout.answer_log_probs(params, policy, rows, 30, mesh)

        gold = settings.annotator.gold(answers.texts).reshape(-1, count)
        baseline = gold if name == "before" else baseline
        named = [mentions_subject(True, answers.texts[n::count]) for n in range(count)]
        words = np.array([len(text.split()) for text in answers.texts])
        per_question = {
            "gold": gold,
            "words": words,
            "better_than_before": wins(gold, baseline),
            "kl_nats_per_sequence": log_probs(params) - log_probs(reference),
            "names_the_thing": np.array(named).T,
            "ended": answers.ended.astype(float),
        }
        found[name] = {
            **{
                measure: dataclasses.asdict(interval_of(measure, x.reshape(-1, count)))
                for measure, x in per_question.items()
            },
            "distinct_2": distinct_2(answers.texts),
            "answers": answers.texts[:: count * 5],
        }
    trained = [row["prompt"] for _, row in read_rows(settings.run / "questions.jsonl")]
    rows = LoadedData({"heldout": RowCounts(len(questions))}, count_trained_on(questions, trained))
    return {"questions": questions[::5], "models": found, **rows.record()}


def table(found: dict[str, Any]) -> Table:
    """The results of `measure` as a table for the terminal."""
    count = found["rows"]["heldout"]["used"]
    grid = Table(title=f"95 % intervals over {count} held-out questions about things that no stage has seen", box=None)
    for column in ("", "words", "better", "KL, nats", "names it", "ended", "distinct-2"):
        grid.add_column(column, no_wrap=True)
    measures = {"words": 1, "better_than_before": 2, "kl_nats_per_sequence": 1, "names_the_thing": 2}
    for name, row in found["models"].items():
        shown = {k: Interval(**row[k]) for k in measures}
        cells = [x.plus_minus(measures[k]) for k, x in shown.items()]
        grid.add_row(name, *cells, f"{row['ended']['mean']:.0%}", f"{row['distinct_2']:.2f}")
    if any(too_wide(Interval(**row["better_than_before"])) for row in found["models"].values()):
        grid.caption = f"better: {TOO_FEW}"
    return grid


def main(settings: Settings) -> dict[str, Any]:
    started = time.monotonic()
    _, config, tok, _ = load_language_model(settings.model)  # fail on a bad model before any training
    stages = stage_settings(settings)
    if settings.labels:
        check_preference_files(stages, tok, config.block)
    settings.run.mkdir(parents=True, exist_ok=True)
    questions = questions_about_things()
    if jax.process_index() == 0 and not (settings.run / "questions.jsonl").exists():
        write_rows(settings.run / "questions.jsonl", ({"prompt": question} for question in questions))
    for stage, own in stages:
        stage.main(own)
    inputs = {name: run_fingerprint(settings.run / name) for name in ("ppo", "dpo")}
    with Run(settings.run / "report", settings, stage="align", inputs=inputs, fresh=settings.fresh) as run:
        if not run.finished:
            run.finish(measure(settings))
        found = run.results
        Console().print(table(found))
        for i, question in enumerate(found["questions"][:4]):
            print(f"\n{question}")
            for name, row in found["models"].items():
                print(f"  {name:<7}{row['answers'][i]}")
        print(
            f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes; talk to it: "
            f"{chat_command(settings.run / 'ppo')}"
        )
        return found


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
