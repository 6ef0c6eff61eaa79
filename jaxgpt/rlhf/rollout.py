"""Sample answers in batches, and compute their log-probabilities and rewards with the trainer's own functions."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import decoding
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import engine, sampling
from jaxgpt.decoding.generate import check_fits_block
from jaxgpt.errors import UserError
from jaxgpt.models import sharding, transformer
from jaxgpt.rlhf import reward
from jaxgpt.rlhf.intervals import Interval, check_finite, ratio_interval
from jaxgpt.rlhf.policies import Policy
from jaxgpt.structs import Array, Batch, Experience, Params, Prompts
from jaxgpt.training.step import jit_on, join_rows, make_row_nll, split_rows

Rows = TypeVar("Rows")  # a pytree of arrays whose first axis is rows
Result = TypeVar("Result")
QUEUE = 8  # batches that `sample_answers` queues at a time


def map_in_minibatches(f: Callable[[Rows], Result], tree: Rows, minibatches: int) -> Result:
    """Apply f to equal parts of the rows (`training.split_rows`), one part after another, and join the results."""
    return join_rows(jax.lax.map(f, split_rows(tree, minibatches)))


@dataclasses.dataclass(frozen=True)
class SampledAnswers:
    """Answers on the host, one per row: their texts, and the token rows from which rewards are computed."""

    texts: list[str]
    rows: Batch  # NumPy arrays: prompt and answer
    ended: np.ndarray  # bool [rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer, its closing tag included."""
        return np.asarray(self.rows.mask_BT).sum(1)


def pad_prompts(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as (tokens [B, length] padded on the right, lengths [B]), int32. UserError names a prompt that is
    empty or too long."""
    tokens = np.zeros((len(ids), length), np.int32)
    for i, row in enumerate(ids):
        if not 0 < len(row) <= length:
            raise UserError(
                f"prompt {i} has {len(row)} tokens and must have 1 to {length}; shorten it or raise the limit"
            )
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in ids], np.int32)


def sample_answers(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    key: Array,
    decode_text: Callable[[np.ndarray], str],
    mesh: Mesh,
    *,
    new_tokens: int,
    stop: int,
    batch: int,
    temperature: float = 1.0,
    width: int | None = None,
    label: Callable[[int], None] = lambda done: None,
) -> SampledAnswers:
    """Sample one answer to each prompt (token ids), about `batch` at a time: the next prompt takes the place of an
    answer that has ended (`decoding.engine`). Answers depend neither on `batch` nor on the mesh, where `params` must be
    placed too. After every 8 batches `label` is called with the number of new answers. Prompts are padded to `width`
    tokens, or to the longest prompt; every new width is compiled anew."""
    longest = width or max(map(len, prompts))
    check_fits_block(config, longest, new_tokens)
    shards = sharding.count_row_shards(mesh)
    batch = -(-batch // shards) * shards
    program = _compile_sampler(mesh, config, batch, longest, new_tokens, stop, temperature)
    parts = []
    for at in range(0, len(prompts), QUEUE * batch):
        chunk = prompts[at : at + QUEUE * batch]
        missing = QUEUE * batch - len(chunk)  # prompts of length 0
        padded = [np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) for x in pad_prompts(chunk, longest)]
        experience = program(params, sharding.place_whole(Prompts(*padded), mesh), key, at)
        check_finite(np.asarray(experience.logp_BT), "log-probabilities of sampled tokens")
        parts.append(_first_rows((experience.rows, experience.answers), len(chunk)))
        label(len(chunk))
    rows, answers = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    return SampledAnswers([decode_text(ids) for ids in answers.tokens_BA], rows, answers.ended_B)


@functools.lru_cache(maxsize=16)  # compile once per setting, not on every call
def _compile_sampler(
    mesh: Mesh, config: ModelConfig, slots: int, prompt_tokens: int, new_tokens: int, stop: int, temperature: float
) -> Callable[..., Experience]:
    cool = functools.partial(sampling.temperature, t=temperature)
    one = engine.Engine(config, slots, prompt_tokens, new_tokens, stop, filter_logits=cool)

    def collect(params: Params, prompts: Prompts, key: Array, first: Array) -> Experience:
        answers = engine.drain(one, params, prompts, key, first=first).answers
        rows, logp_BT = decoding.join_prompt_and_answer(prompts.tokens_BP, prompts.length_B, answers)
        return Experience(rows, logp_BT, answers)

    return jit_on(mesh, collect)


@functools.lru_cache(maxsize=16)
def _compile_answer_logp(mesh: Mesh, policy: Policy) -> Callable[[Params, Batch], Array]:
    return jit_on(mesh, policy.answer_logp)


def answer_log_probs(params: Params, policy: Policy, rows: Batch, batch: int, mesh: Mesh) -> np.ndarray:
    """log P(y | x) of each host row in nats, [rows]: `policy.answer_logp` in batches of one shape.

    Raises ValueError for an answer longer than the policy's window."""
    transformer.target_window(rows.mask_BT, policy.new_tokens)
    program = _compile_answer_logp(mesh, policy)
    found = map_in_batches(lambda part: program(params, part), rows, min(batch, len(rows.mask_BT)), mesh)
    return check_finite(np.asarray(found), "log-probabilities of answers")


@functools.lru_cache(maxsize=16)
def _compile_row_nll(mesh: Mesh, config: ModelConfig) -> Callable[[Params, Batch], tuple[Array, Array]]:
    return jit_on(mesh, make_row_nll(config))


def heldout_nats(
    params: Params, config: ModelConfig, batches: Sequence[Batch], mesh: Mesh, prompts: Sequence[Hashable] | None = None
) -> Interval:
    """Nats per masked token of host batches of one shape, with a 95 % interval over rows, or over the prompts that
    `prompts` names for every row. Rows without masked tokens are padding."""
    program = _compile_row_nll(mesh, config)
    parts = [jax.device_get(program(params, sharding.place_whole(batch, mesh))) for batch in batches]
    nats_N, count_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    check_finite(nats_N, "held-out losses")
    return ratio_interval(nats_N[count_N > 0], count_N[count_N > 0], prompts)


@functools.lru_cache(maxsize=16)
def _compile_reward(mesh: Mesh, config: ModelConfig) -> Callable[[Params, Batch], Array]:
    return jit_on(mesh, lambda params, rows: reward.score(params, config, rows))


def reward_scores(params: Params, config: ModelConfig, rows: Batch, batch: int, mesh: Mesh) -> np.ndarray:
    """h(x, y) of each host row, [rows]: `reward.score` in batches of one shape."""
    program = _compile_reward(mesh, config)
    found = map_in_batches(lambda part: program(params, part), rows, min(batch, len(rows.mask_BT)), mesh)
    return check_finite(np.asarray(found), "scores of the reward model")


def map_in_batches(f: Callable[[Rows], Result], rows: Rows, batch: int, mesh: Mesh) -> Result:
    """Apply f, made by `jit_on` for this mesh, to host rows in batches of one shape, each divided among the devices;
    the last batch is filled up by repeating the last row. Results are joined on the host."""
    count = jax.tree.leaves(rows)[0].shape[0]
    parts = []
    for at in range(0, count, batch):
        index = np.minimum(np.arange(at, at + batch), count - 1)
        out = f(sharding.place_whole(jax.tree.map(lambda x, index=index: np.asarray(x)[index], rows), mesh))
        parts.append(_first_rows(out, min(batch, count - at)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _first_rows(tree: Rows, count: int) -> Rows:
    """The first `count` rows of each leaf, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[:count], tree)
