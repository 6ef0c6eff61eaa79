"""Stage 3: C candidate answers per prompt, and which one is preferred.

    python -m experiments.preferences --model runs/mine/sft --run runs/mine/preferences

The answers are sampled from the current model; --experts 1 replaces one of them with a human-written one. A *simulated
annotator* picks the favourite: a softmax choice over VADER's sentiment, noisy as people are. An answer that was cut off
before its end gets the same fixed low score as in PPO; without that, DPO drifts to answers that never end. The files it
writes (train.jsonl, heldout.jsonl: prompt, answers, choice) could just as well hold people's choices, and stages 4 and
6 read such files from anywhere.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from jaxgpt.config import Count, ModelConfig, Positive, Range, Seed, check_settings
from jaxgpt.data import sources
from jaxgpt.data.comparisons import Preference, write_preferences
from jaxgpt.data.templates import answer_text, prompt_ids
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.training_data import LoadedData, RowCounts, count_trained_on
from jaxgpt.files import cache_root
from jaxgpt.models import sharding
from jaxgpt.rlhf import rollout
from jaxgpt.rlhf.annotator import SimulatedAnnotator
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model
from jaxgpt.structs import Array, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about half a minute; the annotator's noise limits accuracy to 74 to 75 %."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("model",)  # their contents matter, not their paths

    run: Path = Path("runs/assistant/preferences")
    model: Path = Path("runs/assistant/sft")
    data: str = "movie_reviews"
    prompts: Annotated[int, Range(1, 10**7)] = 2200  # for training; repeated if there are fewer
    heldout: Annotated[int, Range(1, 10**7)] = 300  # prompts whose openings no training prompt has
    candidates: Annotated[int, Range(2, 1000)] = 4  # C answers per prompt
    experts: Annotated[int, Range(0, 1)] = 0  # how many of them are human-written: 0 or 1
    new_tokens: Count = 40
    temperature: Positive = 0.7  # part of the policy: use the same in ppo, dpo and report
    annotator: SimulatedAnnotator = SimulatedAnnotator()
    unfinished_score: Annotated[float | None, Range()] = -1.0  # gold score of a cut-off answer; None: its text's score
    batch: Count = 256
    seed: Seed = 2
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(prompts=24, heldout=12, new_tokens=12, batch=16),
    "gpu": Settings(prompts=20_000, heldout=2000, batch=1024),
}


def sample_candidates(
    settings: Settings,
    params: Params,
    config: ModelConfig,
    tok: Tokenizer,
    prompts: list[tuple[str, str]],
    key: Array,
    mesh: jax.sharding.Mesh,
    bar: Any,
) -> tuple[list[list[str]], np.ndarray]:
    """Sample candidates for each (prompt, expert answer): their texts, and which ended by themselves."""
    count = settings.candidates - settings.experts
    ids = [prompt_ids(tok, prompt) for prompt, _ in prompts for _ in range(count)]
    sampled = rollout.sample_answers(
        params,
        config,
        ids,
        key,
        lambda tokens: answer_text(tok, tokens),
        mesh,
        new_tokens=settings.new_tokens,
        stop=tok.template.end,
        batch=settings.batch,
        temperature=settings.temperature,
        label=bar.update,
    )
    texts = [[sampled.texts[i * count + c] for c in range(count)] for i in range(len(prompts))]
    ended = sampled.ended.reshape(-1, count)
    for row, (_, expert) in zip(texts, prompts, strict=True):
        row += [expert] * settings.experts
    return texts, np.concatenate([ended, np.ones((len(prompts), settings.experts), bool)], axis=1)


def main(settings: Settings) -> dict[str, Any]:
    inputs = {"model": run_fingerprint(settings.model), **sources.fingerprint(settings.data)}
    with Run(settings.run, settings, stage="preferences", inputs=inputs) as run:
        if run.finished:
            return run.results
        params, config, tok, _ = load_language_model(settings.model)
        mesh = sharding.data_mesh()
        params = sharding.replicate(params, mesh)
        rng = np.random.default_rng(settings.seed)
        results: dict[str, Any] = {"annotator": settings.annotator.name, "candidates": settings.candidates}
        held_out: sources.Split = "valid" if settings.data == sources.EMBEDDED else "test"
        counts: dict[str, RowCounts] = {}
        asked: dict[str, list[str]] = {}
        parts: tuple[tuple[str, str, sources.Split, int], ...]
        parts = (("train", "prompts", "train", settings.prompts), ("heldout", "heldout", held_out, settings.heldout))
        for n, (name, option, split, count) in enumerate(parts):
            prompts, found = choose_prompts(settings, split, count, rng)
            asked[name] = [prompt for prompt, _ in prompts]
            counts[option] = found.without(f"beyond --{option} {count}", found.used - count)
            repeated = f", then repeated to make {count:,}" if count > found.used else ""
            run.say(f"preferences: {'prompts' if name == 'train' else 'held out'}: {counts[option]}{repeated}")
            with run.progress(count * (settings.candidates - settings.experts), f"answers ({name})") as bar:
                key = jax.random.fold_in(jax.random.key(settings.seed), n)
                texts, ended = sample_candidates(settings, params, config, tok, prompts, key, mesh, bar)
            annotator = {"annotator": settings.annotator.name, "temperature": settings.annotator.temperature}
            gold_BC = settings.annotator.gold([text for row in texts for text in row]).reshape(count, -1)
            judged_BC = (
                gold_BC if settings.unfinished_score is None else np.where(ended, gold_BC, settings.unfinished_score)
            )
            choices = settings.annotator.choose(judged_BC, rng)
            preferences = (
                Preference(prompt, tuple(row), int(choice), tuple(map(bool, end)), {**annotator, "gold": gold.tolist()})
                for (prompt, _), row, end, choice, gold in zip(prompts, texts, ended, choices, judged_BC, strict=True)
            )
            if jax.process_index() == 0:
                write_preferences(settings.run / f"{name}.jsonl", preferences)
            results[name] = {
                "preferences": count,
                "gold_mean": float(gold_BC.mean()),
                "gold_std": float(gold_BC.std()),
                "ended": float(ended.mean()),
                "equal_answers": sum(len(set(row)) == 1 for row in texts),
                "annotator_ceiling": settings.annotator.ceiling(judged_BC),
            }
        train = results["train"]
        run.say(
            f"preferences: {settings.prompts} x {settings.candidates} answers; labels by the {settings.annotator.name}"
            f"; gold {train['gold_mean']:.3f} (sd {train['gold_std']:.3f}), {train['ended']:.0%} ended by themselves, "
            f"best possible accuracy {results['heldout']['annotator_ceiling']:.1%}"
        )
        data = LoadedData(counts, count_trained_on(asked["heldout"], asked["train"]))
        data.warn(run.say, "preferences")
        run.finish({**results, **data.record()})
        return run.results


def choose_prompts(
    settings: Settings, split: sources.Split, count: int, rng: np.random.Generator
) -> tuple[list[tuple[str, str]], RowCounts]:
    """`count` (prompt, expert answer) pairs in random order, and the counts of all available ones. Prompts repeat only
    if there are too few."""
    prompts = sources.prompts(settings.data, split, settings.cache)
    left_out = prompts.left_out
    found = [(prompt.text, "") for prompt in prompts]
    if settings.experts:
        unseen = {prompt.text for prompt in prompts}
        pairs = sources.examples(settings.data, split, settings.cache)
        found = [pair for pair in pairs if pair[0] in unseen]
        left_out = pairs.left_out + Counter({"whose opening is in an earlier split": len(pairs) - len(found)})
    order = np.concatenate([rng.permutation(len(found)) for _ in range(-(-count // len(found)))])
    return [found[i] for i in order[:count]], RowCounts.of(found, left_out)


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
