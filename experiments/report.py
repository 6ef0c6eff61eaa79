"""Stage 7: compare what the stages achieve on held-out prompts, with 95 % intervals over prompts.

    python -m experiments.report --stages runs/mine --run runs/mine/report

The base model, the finetuned one, best-of-n by the reward model, DPO and PPO answer the same prompts. The simulated
annotator (gold reward), the reward model, and a judge fitted on human labels that no stage trained on rate the answers.
Writes report.html, PNG figures and report.json, and prints the table.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Count, ModelConfig, Positive, Range, Seed, check_settings
from jaxgpt.data import pipelines, sources
from jaxgpt.data.openings import Prompt
from jaxgpt.data.templates import answer_text, example_ids, prompt_ids
from jaxgpt.data.tokenizer import Row, Tokenizer
from jaxgpt.data.training_data import LoadedData, RowCounts, count_trained_on, load_windows
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root
from jaxgpt.models import sharding
from jaxgpt.rlhf import rollout
from jaxgpt.rlhf.annotator import gold_scores
from jaxgpt.rlhf.intervals import best_of_n_kl_bound, distinct_2
from jaxgpt.rlhf.judge import Judge, fit_judge
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.runs.cli import cli
from jaxgpt.runs.process import broadcast_from_first
from jaxgpt.runs.report import PolicyResults, read_stages, write_report
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_model
from jaxgpt.structs import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 50 s."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("stages",)  # their contents matter, not their paths

    run: Path = Path("runs/assistant/report")
    stages: Path = Path("runs/assistant")  # the folder that holds pretrain, sft, reward, ppo, dpo
    data: str = "movie_reviews"
    pretraining_data: str = "movie_reviews"
    prompts: Annotated[int, Range(2)] = 500  # held out: no training prompt has the same opening
    new_tokens: Count = 40
    temperature: Positive = 0.7  # of all policies, as in training
    best_of: Annotated[int, Range(2)] = 4
    unfinished_score: Annotated[float, Range()] = -1.0  # replaces the score of an answer that never ended; as in ppo
    eval_batches: Count = 3  # batches of held-out text, `batch` windows each
    batch: Count = 256
    seed: Seed = 6
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(prompts=12, new_tokens=12, best_of=2, eval_batches=1, batch=16),
    "gpu": Settings(batch=1024, best_of=16),
}


@dataclasses.dataclass
class Evaluator:
    """The models that evaluate answers, and how to sample."""

    settings: Settings
    config: ModelConfig
    tok: Tokenizer
    pretrained: Params
    reference: Params
    reward: Params
    judge: Judge
    mesh: Mesh  # that holds the models

    def sample(self, params: Params, ids: list[list[int]], key: Array, raw: bool = False) -> rollout.SampledAnswers:
        template = self.tok.template
        stop = template.separator if raw else template.end
        return rollout.sample_answers(
            params,
            self.config,
            ids,
            key,
            lambda tokens: answer_text(self.tok, tokens),
            self.mesh,
            new_tokens=self.settings.new_tokens,
            stop=stop,
            batch=self.settings.batch,
            temperature=self.settings.temperature,
        )

    def reward_scores(self, answers: rollout.SampledAnswers) -> np.ndarray:
        """h, or the fixed score for answers that never ended."""
        h = rollout.reward_scores(self.reward, self.config, answers.rows, self.settings.batch, self.mesh)
        return np.where(answers.ended, h, self.settings.unfinished_score)

    def log_probs(self, params: Params, rows: Batch, temperature: float) -> np.ndarray:
        """log P of each row's masked tokens, [rows]."""
        policy = transformer_policy(self.config, temperature=temperature)
        return rollout.answer_log_probs(params, policy, rows, self.settings.batch, self.mesh)

    def pretrained_nll(self, texts: list[str]) -> np.ndarray:
        """Nats per token of each text as a document, end token included, under the frozen pretrained model."""
        end = self.tok.template.separator
        ids = [[*self.tok.document_ids(text)[: self.config.block - 1], end] for text in texts]
        rows = pad_rows(self, [(row, [1] * len(row)) for row in ids], all_tokens=True)
        return -self.log_probs(self.pretrained, rows, 1.0) / rows.mask_BT.sum(1)


def pad_rows(bench: Evaluator, rows: list[Row], all_tokens: bool = False) -> Batch:
    """Rows of ids and roles as one batch on the host."""
    arrays = pipelines.padded_examples(rows, bench.config.block, len(rows), all_tokens=all_tokens)[0]
    return Batch(arrays["tokens"], arrays["mask"])


def evaluate_policy(
    bench: Evaluator,
    name: str,
    params: Params | None,
    answers: rollout.SampledAnswers,
    prompts: list[Prompt],
    **known: Any,
) -> PolicyResults:
    """All measurements of one policy's answers, one number per prompt. With `params` None, KL is not measured."""
    kl = None
    if params is not None:
        temperature = bench.settings.temperature
        kl = bench.log_probs(params, answers.rows, temperature)
        kl -= bench.log_probs(bench.reference, answers.rows, temperature)
    opens = [text.startswith(prompt.opening) for text, prompt in zip(answers.texts, prompts, strict=True)]
    return PolicyResults(
        name=name,
        texts=answers.texts,
        gold=gold_scores(answers.texts),
        judge=bench.judge.positive_probability(answers.texts),
        reward=bench.reward_scores(answers),
        kl=kl,
        length=answers.lengths.astype(float),
        ended=answers.ended.astype(float),
        opens=np.array(opens, float),
        pretrained_nll=bench.pretrained_nll(answers.texts),
        distinct_2=distinct_2(answers.texts),
        **known,
    )


def sample_base_answers(bench: Evaluator, prompts: list[Prompt], key: Array) -> rollout.SampledAnswers:
    """The pretrained model knows no tags: it continues the opening words (or the prompt) as raw text. Its text is then
    appended to the prompt as an answer, so that reward and length are comparable with the others'."""
    starts = [prompt.opening or prompt.text for prompt in prompts]
    begun = [bench.tok.document_ids(start) for start in starts]
    sampled = bench.sample(bench.pretrained, begun, key, raw=True)
    texts = [start + text for start, text in zip(starts, sampled.texts, strict=True)]
    pairs = [example_ids(bench.tok, prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
    limit = bench.config.block
    return rollout.SampledAnswers(
        texts, pad_rows(bench, [(ids[:limit], roles[:limit]) for ids, roles in pairs]), sampled.ended
    )


def best_of_n(bench: Evaluator, ids: list[list[int]], key: Array) -> dict[int, rollout.SampledAnswers]:
    """For n = 2, 4, … best_of: of n answers by the finetuned model, the one the reward model scores highest."""
    n = bench.settings.best_of
    pool = bench.sample(bench.reference, [row for row in ids for _ in range(n)], key)
    scores = bench.reward_scores(pool).reshape(-1, n)
    sizes = sorted({2**k for k in range(1, n.bit_length())} | {n})
    return {size: _take(pool, np.arange(len(ids)) * n + scores[:, :size].argmax(1)) for size in sizes if size <= n}


def _take(answers: rollout.SampledAnswers, index: np.ndarray) -> rollout.SampledAnswers:
    rows = jax.tree.map(lambda x: np.asarray(x)[index], answers.rows)
    return rollout.SampledAnswers([answers.texts[i] for i in index], rows, answers.ended[index])


def heldout_prompts(settings: Settings) -> tuple[list[Prompt], RowCounts]:
    """The first `prompts` held-out prompts, and what was left out. Raises UserError if there are too few."""
    prompts = sources.prompts(settings.data, "test", settings.cache)
    if len(prompts) < settings.prompts:
        raise UserError(
            f"{settings.data} has {len(prompts)} held-out prompts; set --prompts (of report) to at most that"
        )
    counts = RowCounts.of(prompts, prompts.left_out)
    return prompts[: settings.prompts], counts.without(
        f"beyond --prompts {settings.prompts}", len(prompts) - settings.prompts
    )


def main(settings: Settings) -> dict[str, Any]:
    names = ("pretrain", "sft", "reward", "dpo", "ppo")
    inputs = {name: run_fingerprint(settings.stages / name, name) for name in names}
    with Run(settings.run, settings, stage="report", inputs=inputs) as run:
        if run.finished:
            return run.results
        stages, mesh = read_stages(settings.stages), sharding.data_mesh()
        loaded = {name: load_model(settings.stages / name) for name in names}
        config, tok = loaded["sft"].config, loaded["sft"].tokenizer
        params = {name: sharding.replicate(one.params, mesh) for name, one in loaded.items()}
        prompts, counts = heldout_prompts(settings)
        judge = fit_judge(
            sources.labelled_reviews(sources.EMBEDDED, "train", settings.cache),
            sources.labelled_reviews(sources.EMBEDDED, "test", settings.cache),
        )
        run.say(
            f"report: held-out prompts: {counts} · judge fitted on human labels: right about {judge} held-out reviews"
        )
        bench = Evaluator(settings, config, tok, params["pretrain"], params["sft"], params["reward"], judge, mesh)
        ids = [prompt_ids(tok, prompt.text) for prompt in prompts]
        size = config.block, settings.batch, settings.eval_batches
        windows, _ = load_windows(settings.pretraining_data, tok, settings.cache, *size)
        text_nats = {
            name: rollout.heldout_nats(params[name], config, windows, mesh)
            for name in ("pretrain", "sft", "dpo", "ppo")
        }
        keys = iter(jax.random.split(jax.random.key(settings.seed), 5))
        with run.progress(5, "answers") as bar:
            answers = sample_base_answers(bench, prompts, next(keys))
            policies = [evaluate_policy(bench, "base", None, answers, prompts, text_nats=text_nats["pretrain"])]
            bar.update()
            answers = bench.sample(bench.reference, ids, next(keys))
            policies.append(
                evaluate_policy(bench, "SFT", bench.reference, answers, prompts, text_nats=text_nats["sft"])
            )
            bar.update()
            for n, answers in best_of_n(bench, ids, next(keys)).items():
                bound = best_of_n_kl_bound(n)
                known = {"text_nats": text_nats["sft"], "kl_bound": bound}
                policies.append(evaluate_policy(bench, f"best of {n}", None, answers, prompts, **known))
            bar.update()
            for name in ("dpo", "ppo"):
                answers = bench.sample(params[name], ids, next(keys))
                policies.append(
                    evaluate_policy(bench, name.upper(), params[name], answers, prompts, text_nats=text_nats[name])
                )
                bar.update()
        results: dict[str, Any] = {}
        if jax.process_index() == 0:
            results = write_report(run.folder, stages, prompts, policies, judge, run.console)
            trained = [prompt.text for prompt in sources.prompts(settings.data, "train", settings.cache)]
            data = LoadedData({"heldout": counts}, count_trained_on([prompt.text for prompt in prompts], trained))
            data.warn(run.say, "report")
            results |= data.record()
        results = broadcast_from_first(results)
        run.say(f"report: {settings.run / 'report.html'}")
        run.finish(results)
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
