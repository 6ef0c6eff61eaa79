"""The task of a study's policies, and how their answers are measured."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import ModelConfig
from jaxgpt.data import sources
from jaxgpt.data.templates import answer_text, prompt_ids
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.training_data import count_trained_on
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.models import sharding
from jaxgpt.rlhf import rollout
from jaxgpt.rlhf.annotator import gold_scores
from jaxgpt.rlhf.judge import fit_judge
from jaxgpt.rlhf.policies import Policy
from jaxgpt.rlhf.ppo import PPOConfig, policy_of
from jaxgpt.runs.saved_model import load_language_model, load_model
from jaxgpt.structs import Array, Batch, Params

Ids = list[int]
TextMeasure = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """A starting model and the prompts it answers. `gold` is the true reward, which the preferences come from; `judge`
    is an independent classifier that no stage learns from. Both get `text(ids, mask)` of an answer's row. UserError if
    a prompt is both trained and measured on."""

    config: ModelConfig
    tok: Tokenizer
    start: Params  # what every run starts from, and the reference of its KL
    prompts: list[Ids]  # to train on
    heldout: list[Ids]  # to measure on
    gold: TextMeasure
    judge: TextMeasure
    text: Callable[[np.ndarray, np.ndarray], str]
    stop: int
    algorithm: PPOConfig  # its new_tokens, temperature and unfinished_score apply to every method
    mesh: Mesh

    def __post_init__(self) -> None:
        if shared := count_trained_on(map(tuple, self.heldout), map(tuple, self.prompts)):
            raise UserError(f"{shared} of {len(self.heldout)} held-out prompts are also trained on; hold out others")

    @property
    def policy(self) -> Policy:
        """The model as every method trains and samples it."""
        return policy_of(self.config, self.algorithm, self.stop)

    @property
    def prompt_tokens(self) -> int:
        """The length of the longest prompt, to which all are padded."""
        return max(map(len, self.prompts + self.heldout))

    def texts(self, rows: Batch) -> list[str]:
        """The texts of rows [..., T] on the host, in order."""
        tokens, mask = np.asarray(rows.tokens_BT), np.asarray(rows.mask_BT)
        T = tokens.shape[-1]
        return [self.text(ids, own) for ids, own in zip(tokens.reshape(-1, T), mask.reshape(-1, T), strict=True)]

    def replace_unfinished(self, score: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """The scores, but `unfinished_score` (if set) where an answer never ended."""
        fixed = self.algorithm.unfinished_score
        return score if fixed is None else np.where(ended, score, fixed)


def distinct_prompts(prompts: Iterable[Sequence[int]], count: int, known: Iterable[Sequence[int]] = ()) -> list[Ids]:
    """The first `count` distinct prompts that are not `known`. UserError if there are fewer."""
    seen = set(map(tuple, known))
    found = list(dict.fromkeys(one for one in map(tuple, prompts) if one not in seen))
    if len(found) < count:
        raise UserError(f"there are only {len(found):,} new prompts, not {count:,}; ask for fewer")
    return [list(ids) for ids in found[:count]]


def make_reviews_task(model_folder: Path, cache: Path, heldout: int, algorithm: PPOConfig) -> Task:
    """The pipeline's own task: one-line reviews whose sentiment by VADER is the gold reward; the judge is fitted on
    human labels. `model_folder`: a finetuned model."""
    start, config, tok, _ = load_language_model(model_folder)
    mesh = sharding.data_mesh()
    judge = fit_judge(
        sources.labelled_reviews(sources.EMBEDDED, "train", cache),
        sources.labelled_reviews(sources.EMBEDDED, "test", cache),
    )
    ids = {
        split: [prompt_ids(tok, prompt.text) for prompt in sources.prompts(sources.EMBEDDED, split, cache)]
        for split in ("train", "test")
    }
    if len(ids["test"]) < heldout:
        raise UserError(f"there are only {len(ids['test'])} held-out prompts, not {heldout}; lower --prompts")
    return Task(
        config,
        tok,
        sharding.replicate(start, mesh),
        ids["train"],
        ids["test"][:heldout],
        gold_scores,
        judge.positive_probability,
        lambda ids, mask: answer_text(tok, ids[mask]),
        tok.template.end,
        algorithm,
        mesh,
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One policy's answers to the held-out prompts: each measure's value per prompt (or [N, n] for n answers each)."""

    texts: list[str]
    gold: np.ndarray
    judge: np.ndarray
    logp: np.ndarray  # log pi of the answer, nats
    kl: np.ndarray  # log pi - log rho
    length: np.ndarray  # tokens
    ended: np.ndarray
    proxy: np.ndarray  # the learned reward model's h; NaN without one

    def to_json(self, texts: int = 6) -> dict[str, Any]:
        """All numbers, and the first few texts."""
        numbers = {name: np.asarray(x, float).round(6).tolist() for name, x in vars(self).items() if name != "texts"}
        return {**numbers, "texts": self.texts[:texts]}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Evaluation":
        """The inverse of `to_json`, except for the texts that it dropped."""
        return Evaluation(
            record["texts"], **{name: np.array(x, float) for name, x in record.items() if name != "texts"}
        )


def sample_task_answers(
    task: Task, params: Params, ids: Sequence[Ids], key: Array, batch: int = 250
) -> rollout.SampledAnswers:
    """Sample one answer of a policy to each prompt."""
    found = rollout.sample_answers(
        params,
        task.config,
        ids,
        key,
        lambda tokens: "",
        task.mesh,
        stop=task.stop,
        width=task.prompt_tokens,
        new_tokens=task.algorithm.new_tokens,
        temperature=task.algorithm.temperature,
        batch=min(batch, len(ids)),
    )
    return dataclasses.replace(found, texts=task.texts(found.rows))


def answer_examples(answers: rollout.SampledAnswers) -> list[tuple[list[int], list[int]]]:
    """Each answer with its prompt, in the form that rewards and policies learn from: ids, and 1 on the answer's."""
    tokens, mask = np.asarray(answers.rows.tokens_BT), np.asarray(answers.rows.mask_BT)
    ends = [int(np.flatnonzero(row)[-1]) + 1 for row in mask]
    return [
        (ids[:end].tolist(), own[:end].astype(int).tolist()) for ids, own, end in zip(tokens, mask, ends, strict=True)
    ]


def log_probs(task: Task, params: Params, rows: Batch, batch: int = 250) -> np.ndarray:
    """log P(y | x) of each row at the task's temperature, [rows]."""
    return rollout.answer_log_probs(params, task.policy, rows, batch, task.mesh)


def reward_scores(task: Task, params: Params, config: ModelConfig, rows: Batch, batch: int = 250) -> np.ndarray:
    """h(x, y) of each row, [rows]; the reward model may differ in size from the policy."""
    return rollout.reward_scores(params, config, rows, batch, task.mesh)


RewardModel = tuple[Params, ModelConfig]  # a reward model, which may differ in size from the policy


def evaluate_answers(
    task: Task, params: Params, answers: rollout.SampledAnswers, proxy: RewardModel | None = None, each: int = 1
) -> Evaluation:
    """Measure a policy's answers to the held-out prompts; `each` > 1 answers per prompt get a last axis."""
    logp = log_probs(task, params, answers.rows)
    start_logp = logp if params is task.start else log_probs(task, task.start, answers.rows)
    h = np.full(len(logp), np.nan)
    if proxy is not None:
        h = task.replace_unfinished(reward_scores(task, *proxy, answers.rows), answers.ended)
    numbers = {
        "gold": task.gold(answers.texts),
        "judge": task.judge(answers.texts),
        "proxy": h,
        "logp": logp,
        "kl": logp - start_logp,
        "length": answers.lengths.astype(float),
        "ended": answers.ended.astype(float),
    }
    if each > 1:
        numbers = {name: x.reshape(-1, each) for name, x in numbers.items()}
    return Evaluation(answers.texts, **numbers)


def evaluate_policy(
    task: Task, params: Params, key: Array, proxy: RewardModel | None = None, each: int = 1
) -> Evaluation:
    """Sample answers and measure them (`evaluate_answers`)."""
    ids = [row for row in task.heldout for _ in range(each)]
    return evaluate_answers(task, params, sample_task_answers(task, params, ids, key), proxy, each)


def evaluate_policies(
    task: Task,
    policies: Sequence[Params],
    numbers: Sequence[int],
    seed: int,
    proxy: RewardModel | None = None,
    texts: int = 6,
) -> list[dict[str, Any]]:
    """`evaluate_policy` at every policy, as JSON; policies with the same number sample with the same random key."""
    key = jax.random.key(seed)
    found = [
        evaluate_policy(task, policy, jax.random.fold_in(key, n), proxy)
        for policy, n in zip(policies, numbers, strict=True)
    ]
    return [one.to_json(texts) for one in found]


def load_reward_model(task: Task, folder: Path) -> RewardModel:
    """The reward model of a run folder, on the task's devices."""
    params, config, _, _ = load_model(folder)
    return sharding.replicate(params, task.mesh), config


def best_of_n_weights(score_N: np.ndarray, n: int) -> np.ndarray:
    """The probability that each of N answers is the best of n drawn from them without replacement, [N]: the weights
    of an unbiased estimate of best-of-n from N >= n samples (Nakano et al. 2021, appendix I). Among equal scores the
    later one wins."""
    N = len(score_N)
    rank = np.empty(N, int)
    rank[np.argsort(score_N, kind="stable")] = np.arange(N)
    # C(rank, n - 1) / C(N, n): the other n - 1 are among those ranked below it.
    below = np.array(
        [np.prod((r - np.arange(n - 1)) / (N - 1 - np.arange(n - 1))) if r >= n - 1 else 0.0 for r in range(N)]
    )
    return (below * n / N)[rank]


def expected_best_of_n(pool: Evaluation, n: int) -> dict[str, np.ndarray]:
    """Each measure's expected value per prompt under best-of-n by the proxy reward, from a pool [prompts, N]; the KL is
    from `best_of_n_kl`."""
    weight_PN = np.stack([best_of_n_weights(score_N, n) for score_N in pool.proxy])
    names = ("gold", "judge", "proxy", "logp", "length", "ended")
    nats_P = [best_of_n_kl(logp_N, score_N, n) for logp_N, score_N in zip(pool.logp, pool.proxy, strict=True)]
    return {**{name: (weight_PN * getattr(pool, name)).sum(1) for name in names}, "kl": np.array(nats_P)}


def best_of_n_sweep(pool: Evaluation) -> dict[str, dict[str, Any]]:
    """`expected_best_of_n` for n = 2, 4, 8, ... up to the size of the pool."""
    return {
        f"n = {2**k}": {**expected_best_of_n(pool, 2**k), "texts": []}
        for k in range(1, pool.gold.shape[1].bit_length())
    }


def best_of_n_kl(logp_N: np.ndarray, score_N: np.ndarray, n: int) -> float:
    """KL of best-of-n to the policy that the N answers come from, in nats, estimated from their log-probabilities.

    With F = P(score <= s) and p = P(score = s), best-of-n gives that score the probability F^n - (F - p)^n, divided
    among its answers in proportion to their own (Beirami et al. 2024), so that over best-of-n's answers

        KL = E[ (n - 1) log F + log( (1 - (1 - p / F)^n) / (p / F) ) ]

    Where no score has much probability the second term is log n, and the KL is log n - (n - 1) / n, which is an upper
    bound. Where several of the N have a score, F and p are fractions of N, so that a policy with one answer has a KL of
    0. Elsewhere p is the answer's own probability, and log F is replaced by its mean given the rank among N.
    """
    with needs_extra("eval"):
        from scipy.special import digamma

    N, score_N = len(score_N), np.asarray(score_N)
    count_N, rank_N = (score_N[:, None] == score_N).sum(1), (score_N[:, None] >= score_N).sum(1)
    log_f = np.where(count_N > 1, np.log(rank_N / N), digamma(rank_N) - digamma(N + 1))
    log_p = np.where(count_N > 1, np.log(count_N / N), logp_N)
    share = np.clip(np.exp(log_p - log_f), 1e-300, 1 - 1e-12)
    gain = np.log(-np.expm1(n * np.log1p(-share))) - np.log(share)
    return float(best_of_n_weights(score_N, n) @ ((n - 1) * log_f + gain))
