"""Sums as a task with a verifiable reward: the right answer to "37+85" is any number of dots, then "122"."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data import pipelines
from jaxgpt.data.templates import answer_text, example_ids, prompt_ids
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.models import sharding
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.structs import Batch, Params
from jaxgpt.study.task import Task

CHARACTERS = "0123456789+.="


def is_correct_sum(text: str) -> bool:
    """Whether "37+85=...122" is right: any number of dots, then the sum, and nothing else."""
    question, _, answer = text.partition("=")
    a, _, b = question.partition("+")
    return answer.lstrip(".") == str(int(a) + int(b))


def correctness_rewards(texts: Sequence[str]) -> np.ndarray:
    """1 for each right text, otherwise 0."""
    return np.array([is_correct_sum(text) for text in texts], float)


def split_sums(largest: int, heldout: int, seed: int) -> tuple[list[str], list[str]]:
    """Sums of two numbers up to `largest` as shuffled prompts: those to train on, and `heldout` others. A pair of
    numbers is held out whatever their order: one of its two sums is measured on, and its mirror is in neither part."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation([(a, b) for a in range(largest + 1) for b in range(a + 1)])
    train = rng.permutation(sorted({f"{x}+{y}" for a, b in pairs[heldout:] for x, y in ((a, b), (b, a))}))
    return train.tolist(), [f"{a}+{b}" for a, b in rng.permuted(pairs[:heldout], axis=1)]


def make_sums_task(
    config: ModelConfig, start: Params, tok: Tokenizer, prompts: tuple[list[str], list[str]], algorithm: PPOConfig
) -> Task:
    """The task of a model that was trained on demonstrations; `prompts` are from `split`."""
    train, heldout = ([prompt_ids(tok, prompt) for prompt in part] for part in prompts)

    def text(ids: np.ndarray, mask: np.ndarray) -> str:
        first = int(np.argmax(mask))
        prompt = tok.decode([i for i in ids[:first] if not tok.is_special(int(i))])
        return f"{prompt}={answer_text(tok, ids[mask])}"

    mesh = sharding.data_mesh()
    return Task(
        config,
        tok,
        sharding.replicate(start, mesh),
        train,
        heldout,
        correctness_rewards,
        correctness_rewards,
        text,
        tok.template.end,
        algorithm,
        mesh,
    )


def demonstration_batches(prompts: list[str], tok: Tokenizer, dots: int, batch: int, seed: int) -> Iterator[Batch]:
    """Endless batches of right answers, each after 0 to `dots` dots, to randomly drawn prompts."""
    rng = np.random.default_rng(seed)
    most = max(prompts, key=len)
    longest = len(prompt_ids(tok, most)) + dots + len(most) // 2 + 2  # a sum has at most one more digit; and the end
    while True:
        rows = []
        for prompt in rng.choice(prompts, batch):
            a, b = map(int, prompt.split("+"))
            rows.append(example_ids(tok, str(prompt), "." * int(rng.integers(dots + 1)) + str(a + b)))
        yield Batch.of(pipelines.padded_examples(rows, longest, batch)[0])
