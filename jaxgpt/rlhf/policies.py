"""The interface through which PPO, DPO and policy gradients use a language model: functions of its parameters.

    policy = transformer_policy(config, new_tokens=40, stop=end, temperature=0.7)     our own transformer
    policy = from_functions(hidden, unembed, width=768, new_tokens=40, stop=end)      any other: Linen, NNX, Equinox

Every function takes the parameters as an argument: a nested dict of arrays (`nnx.to_pure_dict` makes one from an NNX
state).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import decoding, losses
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import engine, sampling
from jaxgpt.models import transformer
from jaxgpt.structs import Answers, Array, Batch, Experience, Params, Prompts


class Outputs(NamedTuple):
    """What PPO needs from a policy and its critic, all [B, T] float32."""

    logp_BT: Array
    value_BT: Array  # of the state before token t
    entropy_BT: Array  # of the distribution that token t was drawn from


@dataclasses.dataclass(frozen=True)
class Policy:
    """See the module's docstring. Temperature is part of the policy: sampling, training and the reference policy all
    use it."""

    hidden: Callable[[Params, Array], Array]  # (params, tokens_BT) -> h_BTD
    predict: Callable[[Params, Array, Array], tuple[Array, Array]]  # (params, h_BWD, tokens_BW) -> logp_BW, entropy_BW
    generate: Callable[[Params, Array, Array, Array], Answers]  # (params, prompt_BP, length_B, key)
    width: int  # D, the size of a hidden state
    new_tokens: int | None  # maximum length of an answer; None: the whole row
    temperature: float = 1.0

    def collect(self, params: Params, prompts: Prompts, key: Array) -> Experience:
        """Sample one answer per prompt from the full distribution (top-k or top-p would bias PPO's ratio)."""
        answers = self.generate(params, prompts.tokens_BP, prompts.length_B, key)
        rows, logp_BT = decoding.join_prompt_and_answer(prompts.tokens_BP, prompts.length_B, answers)
        return Experience(rows, logp_BT, answers)

    def logp(self, params: Params, rows: Batch) -> Array:
        """log P(token t | tokens before t), [B, T]. Outside the window of `new_tokens` that starts the answer it is 0,
        and NaN for tokens of the answer (see `transformer.target_window`)."""
        window = transformer.target_window(rows.mask_BT, self.new_tokens)
        h_BWD = window.take(self.hidden(params, rows.tokens_BT))
        return window.put(self.predict(params, h_BWD, window.targets(rows.tokens_BT))[0])

    def answer_logp(self, params: Params, rows: Batch) -> Array:
        """log P(y | x) in nats, [B]: the sum over the masked tokens."""
        return jnp.where(rows.mask_BT, self.logp(params, rows), 0.0).sum(axis=1)

    def outputs(self, params: Params, value_head: Params, rows: Batch) -> Outputs:
        """Log-probabilities, entropies, and the values of a critic that reads the same hidden states.

        PPO's old log-probabilities and its loss both come from here: at the same shapes, the first ratio is exactly 1.
        Outside the window of `logp` all are as there."""
        window = transformer.target_window(rows.mask_BT, self.new_tokens)
        h_BWD = window.take(self.hidden(params, rows.tokens_BT))
        logp_BW, entropy_BW = self.predict(params, h_BWD, window.targets(rows.tokens_BT))
        value_BW = transformer.apply_scalar_head(value_head, h_BWD)
        return Outputs(window.put(logp_BW), window.put(value_BW), window.put(entropy_BW))


@functools.lru_cache(maxsize=64)  # equal arguments give the same object, so programs that use it are compiled once
def transformer_policy(
    config: ModelConfig,
    *,
    new_tokens: int | None = None,
    stop: int = -1,
    temperature: float = 1.0,
    slots: int | None = None,
) -> Policy:
    """`models.transformer` as a policy. Without `new_tokens` it gives log-probabilities but can't sample. With `slots`
    it samples that many answers at a time, in a loop that can't be vmapped: the same answers (see `decoding.engine`),
    sooner where their lengths differ."""
    cool = functools.partial(sampling.temperature, t=temperature)

    def generate(params: Params, prompt_BP: Array, length_B: Array, key: Array) -> Answers:
        if new_tokens is None:
            raise ValueError("a policy needs new_tokens to sample")
        if slots is not None:
            one = engine.Engine(config, slots, prompt_BP.shape[1], new_tokens, stop, filter_logits=cool)
            return engine.drain(one, params, Prompts(prompt_BP, length_B), key).answers
        return decoding.generate(
            params, config, prompt_BP, length_B, key, new_tokens=new_tokens, stop=stop, filter_logits=cool
        )

    return Policy(
        hidden=lambda params, tokens_BT: transformer.hidden(params, config, tokens_BT),
        predict=lambda params, h_BWD, tokens_BW: transformer.predict(params, config, h_BWD, tokens_BW, temperature),
        generate=generate,
        width=config.width,
        new_tokens=new_tokens,
        temperature=temperature,
    )


def from_functions(
    hidden: Callable[[Params, Array], Array],
    unembed: Callable[[Params, Array], Array],
    *,
    width: int,
    new_tokens: int,
    stop: int | Sequence[int],
    temperature: float = 1.0,
    pad: int = 0,
) -> Policy:
    """Any causal model as a policy: hidden(params, tokens_BT) -> h_BTD, unembed(params, h [..., D]) -> logits [..., V].

    It samples without a cache, one pass over the whole row per token: this works for every model, but is slow for a
    large one. Where that matters, build a `Policy` with its own `generate`. `pad` fills answers after their end."""
    stops = jnp.atleast_1d(jnp.asarray(stop, jnp.int32))

    def compute_logits(params: Params, h: Array) -> Array:
        # The barrier makes sampling and training round alike, so that PPO's first ratio is exactly 1.
        return jax.lax.optimization_barrier(unembed(params, h).astype(jnp.float32) / temperature)

    def predict(params: Params, h_BWD: Array, tokens_BW: Array) -> tuple[Array, Array]:
        logits_BWV = compute_logits(params, h_BWD)
        return losses.log_prob(logits_BWV, tokens_BW), losses.entropy(logits_BWV)

    def generate(params: Params, prompt_BP: Array, length_B: Array, key: Array) -> Answers:
        rows_B = jnp.arange(len(length_B))

        def step(carry: tuple[Array, Array], x: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
            (tokens_BT, ended_B), (t, key_B) = carry, x
            h_BD = hidden(params, tokens_BT)[rows_B, length_B + t - 1]
            logits_BV = compute_logits(params, h_BD)
            token_B = jnp.where(ended_B, pad, sampling.categorical(key_B, logits_BV))
            logp_B = jnp.where(ended_B, 0.0, losses.log_prob(logits_BV, token_B))
            ended_now_B = ended_B | (token_B[:, None] == stops).any(axis=1)
            return (tokens_BT.at[rows_B, length_B + t].set(token_B), ended_now_B), (token_B, logp_B, ended_B)

        start = jnp.pad(prompt_BP, ((0, 0), (0, new_tokens))), jnp.zeros(len(length_B), bool)
        key_B = sampling.answer_keys(key, jnp.arange(len(length_B)))
        t_A = jnp.arange(new_tokens)
        steps = t_A, jax.vmap(sampling.token_keys, in_axes=(None, 0))(key_B, t_A)
        (_, ended_B), (token_AB, logp_AB, ended_before_AB) = jax.lax.scan(step, start, steps)
        return Answers(token_AB.T, logp_AB.T, (~ended_before_AB).sum(0).astype(jnp.int32), ended_B)

    return Policy(hidden, predict, generate, width, new_tokens, temperature)
