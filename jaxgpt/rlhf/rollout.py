"""Collecting experience: sample answers, and look at them through the trainer's own eyes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import decoding
from jaxgpt.config import ModelConfig
from jaxgpt.decoding.generate import check_room
from jaxgpt.errors import UserError
from jaxgpt.models import sharding, transformer
from jaxgpt.structs import Answers, Array, Batch, Params
from jaxgpt.training.step import jit_on, join_rows, split_rows

Rows = TypeVar("Rows")  # a pytree of arrays whose first axis is rows
Result = TypeVar("Result")


def collect(
    policy: Params,
    config: ModelConfig,
    prompt_BP: Array,
    length_B: Array,
    key: Array,
    *,
    new_tokens: int,
    stop: int,
    temperature: float = 1.0,
) -> tuple[Batch, Array, Answers]:
    """One answer to each prompt from the whole distribution at `temperature` (no top-k or top-p: they would bias the
    ratio).

    Returns rows of prompt + answer with the answer's mask, the sampler's log-probabilities on them, and the answers.
    """
    answers = decoding.generate(
        policy,
        config,
        prompt_BP,
        length_B,
        key,
        new_tokens=new_tokens,
        stop=stop,
        filter_logits=lambda logits: logits / temperature,
    )
    rows, sampler_logp_BT = decoding.join(prompt_BP, length_B, answers)
    return rows, sampler_logp_BT, answers


def policy_outputs(
    policy: Params, value_head: Params, config: ModelConfig, batch: Batch, window: int, temperature: float = 1.0
) -> tuple[Array, Array, Array]:
    """(logp_BT, value_BT, entropy_BT) of the policy and its critic, which reads the same trunk.

    value_BT[t] belongs to the state before token t, entropy_BT[t] to the distribution that token t was drawn from;
    all are 0 outside a window of `window` tokens from the answer's first on. PPO's old log-probabilities and its
    loss both come from here: at the same shapes the first ratio is exactly 1.
    """
    before = transformer.window_before(batch.mask_BT, window)
    h_BWD = before.take(transformer.hidden(policy, config, batch.tokens_BT))
    logp_BW, entropy_BW = transformer.predict(policy, config, h_BWD, before.targets(batch.tokens_BT), temperature)
    value_BW = transformer.apply_scalar_head(value_head, h_BWD)
    return before.put(logp_BW), before.put(value_BW), before.put(entropy_BW)


def in_minibatches(f: Callable[[Rows], Result], tree: Rows, minibatches: int) -> Result:
    """Apply f to equal parts of the rows (`training.split_rows`), one after another, and join the results."""
    return join_rows(jax.lax.map(f, split_rows(tree, minibatches)))


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Answers on the host, a row each: the texts, and what scoring them needs."""

    texts: list[str]
    rows: Batch  # numpy arrays
    ended: np.ndarray  # bool [rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer, its closing tag included."""
        return np.asarray(self.rows.mask_BT).sum(1)


def pad_prompts(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as (tokens [B, length] padded on the right, lengths [B]), int32. UserError names one that is too
    long."""
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
) -> Sampled:
    """One answer to each prompt (token ids), sampled in batches of one shape, their rows divided among the devices of
    the mesh, on which `params` lie; `label` hears how many are done. Prompts are padded to `width` tokens, or to the
    longest one's: each is compiled for."""
    longest = width or max(map(len, prompts))
    check_room(config, longest, new_tokens)
    program = _collector(mesh, config, new_tokens, stop, temperature)
    parts = []
    for at in range(0, len(prompts), batch):
        chunk = list(prompts[at : at + batch])
        filled = chunk + [chunk[-1]] * (batch - len(chunk))
        prompt_BP, length_B = sharding.place_whole(pad_prompts(filled, longest), mesh)
        rows, _, answers = program(params, prompt_BP, length_B, jax.random.fold_in(key, at))
        parts.append(_first((rows, answers), len(chunk)))
        label(len(chunk))
    rows, answers = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    return Sampled([decode_text(ids) for ids in answers.tokens_BA], rows, answers.ended_B)


@functools.lru_cache(maxsize=16)  # a program for each policy's shapes, not for each call
def _collector(
    mesh: Mesh, config: ModelConfig, new_tokens: int, stop: int, temperature: float
) -> Callable[..., tuple[Batch, Array, Answers]]:
    def program(params: Params, prompt_BP: Array, length_B: Array, key: Array) -> tuple[Batch, Array, Answers]:
        return collect(
            params, config, prompt_BP, length_B, key, new_tokens=new_tokens, stop=stop, temperature=temperature
        )

    return jit_on(mesh, program)


def in_batches(f: Callable[[Rows], Result], rows: Rows, batch: int, mesh: Mesh) -> Result:
    """f, made by `jit_on` for this mesh, over host rows in batches of one shape (the last one filled up with its last
    row), divided among the devices; the results are joined on the host."""
    count = jax.tree.leaves(rows)[0].shape[0]
    parts = []
    for at in range(0, count, batch):
        index = np.minimum(np.arange(at, at + batch), count - 1)
        out = f(sharding.place_whole(jax.tree.map(lambda x, index=index: np.asarray(x)[index], rows), mesh))
        parts.append(_first(out, min(batch, count - at)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _first(tree: Rows, count: int) -> Rows:
    """The first rows of each leaf, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[:count], tree)
