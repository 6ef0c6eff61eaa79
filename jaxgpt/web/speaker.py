"""A model that answers, on the terminal and on the page alike.

    speaker = Speaker(Path("runs/assistant/ppo"))
    tokens = speaker.prompt("A film")
    for piece in speaker.generate(tokens, SamplingConfig(temperature=0.7), jax.random.key(0)):
        print(piece.text, end="")

`TokenInspector` measures each token by its own probabilities, a reference, a critic and a reward model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import decoding, losses
from jaxgpt.config import Count, CountOrZero, Fraction, ModelConfig, Range, check_settings
from jaxgpt.data.templates import Turn, prompt_ids, without_opening
from jaxgpt.decoding import sampling
from jaxgpt.errors import UserError
from jaxgpt.losses import kl
from jaxgpt.models import transformer
from jaxgpt.rlhf import reward, rollout
from jaxgpt.rlhf.intervals import check_finite
from jaxgpt.runs.saved_model import load_language_model, load_model
from jaxgpt.structs import Array, Batch, Params

MIN_PROMPT_WIDTH = 32  # prompts are padded to this or the next power of two: few shapes, so few compilations


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How an answer is sampled."""

    temperature: Annotated[float, Range(0, below=100)] = 0.7  # 0: always the most probable token
    top_k: CountOrZero = 0  # 0: off
    top_p: Fraction = 0.95  # 0: only the most probable token
    new_tokens: Count = 256  # maximum length of an answer

    def __post_init__(self) -> None:
        check_settings(self)

    def sampler_and_filter(self) -> tuple[decoding.Sampler, sampling.Filter]:
        """The sampler and filter for `decoding.stream`. A new top-k compiles again; a new temperature or top-p
        doesn't."""
        if self.temperature == 0:
            return sampling.greedy, _identity
        return sampling.categorical, jax.tree_util.Partial(_make_filter(self.top_k), t=self.temperature, p=self.top_p)


def _identity(logits: Array) -> Array:
    return logits


@functools.lru_cache(maxsize=64)
def _make_filter(top_k: int) -> Callable[..., Array]:
    def shape(logits: Array, t: Array, p: Array) -> Array:
        logits = sampling.temperature(logits, t)
        return sampling.top_p(sampling.top_k(logits, top_k) if top_k else logits, p)

    return shape


class StreamedToken(NamedTuple):
    """A sampled token, and the text that it completes: '' in the middle of a character."""

    token: int
    text: str


class Speaker:
    """A model with its weights in decoding's form. `raw`: it continues a text instead of answering prompts."""

    def __init__(self, place: Path, *, int8: bool = False, raw: bool = False) -> None:
        loaded = load_language_model(place)
        self.place, self.config, self.tok, self.params = place, loaded.config, loaded.tokenizer, loaded.params
        self.raw = raw or bool(loaded.extra.get("raw", False))
        prepared = jax.jit(decoding.prepare, static_argnums=1)(loaded.params, loaded.config)
        self._weights = jax.jit(decoding.quantise_int8)(prepared) if int8 else prepared

    @property
    def is_multi_turn(self) -> bool:
        """Whether it was trained on conversations of several turns."""
        return bool(self.tok.template.turn) and not self.raw

    @property
    def stop(self) -> int:
        """The token that ends an answer."""
        return int(self.tok.template.separator if self.raw else self.tok.template.end)

    def prompt(self, text: str, history: Sequence[Turn] = (), new_tokens: int = 0) -> list[int]:
        """The ids that an answer is sampled after. `history`: earlier turns as they were sampled, for a model that
        learnt conversations; the oldest are left out where `new_tokens` more would not fit."""
        if self.raw:
            return self.tok.document_ids(text)
        turns = history if self.is_multi_turn else ()
        history = [(earlier, without_opening(self.tok, answer)) for earlier, answer in turns]
        ids = prompt_ids(self.tok, text, history)
        while history and len(ids) + min(new_tokens, self.config.block // 2) > self.config.block:
            history = history[1:]
            ids = prompt_ids(self.tok, text, history)
        return ids

    def answer_budget(self, ids: Sequence[int], new_tokens: int) -> int:
        """How many tokens may follow. UserError if the prompt is too long for the model."""
        room = min(new_tokens, self.config.block // 2)
        if len(ids) + room > self.config.block:
            raise UserError(
                f"this prompt has {len(ids)} tokens but only {self.config.block - room} fit; write a shorter one"
            )
        return room

    def generate(self, ids: Sequence[int], how: SamplingConfig, key: Array) -> Iterator[StreamedToken]:
        """Sample an answer, yielding its tokens as they come: those of one character together."""
        room = self.answer_budget(ids, how.new_tokens)
        width = min(max(MIN_PROMPT_WIDTH, 1 << (len(ids) - 1).bit_length()), self.config.block - room)
        tokens, length = rollout.pad_prompts([ids], width)
        sample, filter_logits = how.sampler_and_filter()
        stream = decoding.stream(
            self._weights,
            self.config,
            jnp.asarray(tokens),
            jnp.asarray(length),
            key,
            new_tokens=room,
            stop=self.stop,
            sample=sample,
            filter_logits=filter_logits,
        )
        yield from map(StreamedToken._make, self.tok.token_texts(stream))


class TokenFigures(NamedTuple):
    """Measures of an answer's tokens, [A] each; None where there is no reference, critic or reward model."""

    logp: np.ndarray  # of the token, under the model at the sampling temperature (before top-k and top-p)
    entropy: np.ndarray  # nats
    ref_logp: np.ndarray | None
    kl: np.ndarray | None  # exact sum_v pi_v log(pi_v / rho_v), of the distribution that the token was sampled from
    value: np.ndarray | None  # the critic's, before the token
    score: float | None  # the reward model's, of the whole answer


class TokenInspector:
    """A speaker and what it is compared with. A reward model with another tokenizer is left out."""

    def __init__(
        self,
        speaker: Speaker,
        reference: Params | None = None,
        critic: Path | None = None,
        reward_model: Path | None = None,
    ) -> None:
        self.speaker, self.reference = speaker, reference
        self.critic = load_model(critic).params["value_head"] if critic else None
        self.reward_model: tuple[Params, ModelConfig] | None = None
        if reward_model:
            loaded = load_model(reward_model)
            if loaded.tokenizer.fingerprint == speaker.tok.fingerprint:
                self.reward_model = loaded.params, loaded.config

    def look(self, ids: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> TokenFigures:
        """Measure an answer. `ids`: the prompt; `answer`: its tokens, including the end token if it was sampled."""
        config = self.speaker.config
        length = len(ids) + len(answer)
        width = min(max(2 * MIN_PROMPT_WIDTH, 1 << (length - 1).bit_length()), config.block)
        tokens, _ = rollout.pad_prompts([[*ids, *answer]], width)
        mask = (np.arange(width) >= len(ids)) & (np.arange(width) < length)
        rows = Batch(jnp.asarray(tokens), jnp.asarray(mask[None]))
        window = min(max(MIN_PROMPT_WIDTH, 1 << (len(answer) - 1).bit_length()), width)
        found = _look(
            self.speaker.params, self.reference, self.critic, config, rows, window, jnp.float32(temperature or 1.0)
        )
        score = None if self.reward_model is None else float(_score(*self.reward_model, rows)[0])
        figures = [None if x is None else np.asarray(x)[0][mask] for x in found]
        for x in [*figures, score]:
            check_finite(np.asarray(0.0 if x is None else x), "figures of an answer")
        logp, entropy, *rest = figures
        assert logp is not None and entropy is not None
        ref_logp, kl, value = rest
        return TokenFigures(logp, entropy, ref_logp, kl, value, score)


@functools.partial(jax.jit, static_argnums=(3, 5))
def _look(
    params: Params,
    reference: Params | None,
    critic: Params | None,
    config: ModelConfig,
    rows: Batch,
    window: int,
    temperature: Array,
) -> tuple[Array | None, ...]:
    """(logp, entropy, ref_logp, kl, value), each [B, T] and 0 outside the answer, or None."""
    before = transformer.target_window(rows.mask_BT, window)
    targets_BW = before.targets(rows.tokens_BT)

    def logits_of(params: Params) -> tuple[Array, Array]:
        h_BWD = before.take(transformer.hidden(params, config, rows.tokens_BT))
        return transformer.unembed(params, h_BWD) / temperature, h_BWD

    logits_BWV, h_BWD = logits_of(params)
    logp_BT = before.put(losses.log_prob(logits_BWV, targets_BW))
    entropy_BT = before.put(losses.entropy(logits_BWV))
    value_BT = None if critic is None else before.put(transformer.apply_scalar_head(critic, h_BWD))
    if reference is None:
        return logp_BT, entropy_BT, None, None, value_BT
    ref_logits_BWV, _ = logits_of(reference)
    ref_logp_BT = before.put(losses.log_prob(ref_logits_BWV, targets_BW))
    return logp_BT, entropy_BT, ref_logp_BT, before.put(kl.exact(logits_BWV, ref_logits_BWV)), value_BT


_score = jax.jit(reward.score, static_argnums=1)
