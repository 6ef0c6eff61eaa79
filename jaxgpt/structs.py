"""Names of dimensions, and groups of arrays that are passed around together.

Names carry their dimensions: `logits_BTV` has axes B, T, V.

    B  batch          T  time, in tokens      V  vocabulary       C  candidate answers of one prompt
    D  width          H  heads                K  head dimension   F  hidden units of the MLP
    G  groups of heads that share keys and values
    N  layers         S  cache slots          P  prompt tokens    A  answer tokens

Masks are aligned with the targets: `mask_BT[b, t]` means that token t of row b is predicted (from the tokens before
it). Rows are padded on the right.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import MOST_INT
from jaxgpt.errors import UserError

Array = jax.Array
Leaf = Any  # an array: JAX's, NumPy's on the host, or only its shape before compiling
Params = dict[str, Any]


def check_batch(rows: int, length: int) -> None:
    """UserError if the tokens of a batch are more than int32 counts."""
    if rows * length > MOST_INT:
        raise UserError(f"a batch of {rows} rows of {length} tokens is too large: at most {MOST_INT} tokens in all")


@struct.dataclass
class Batch:
    """Rows of tokens to train on, or to compute log-probabilities of."""

    tokens_BT: Leaf  # int32
    mask_BT: Leaf  # bool: which tokens are targets
    segments_BT: Leaf | None = None  # int32: which example of a packed row a token belongs to (0: padding)
    positions_BT: Leaf | None = None  # int32: position within that example

    @staticmethod
    def of(arrays: Mapping[str, Leaf]) -> "Batch":
        """From the dict that the data pipelines yield."""
        return Batch(arrays["tokens"], arrays["mask"], arrays.get("segments"), arrays.get("positions"))

    @staticmethod
    def shapes(rows: int, length: int, *, packed: bool = False) -> "Batch":
        """Shapes and dtypes in place of arrays, to compile for; packed rows have segments and positions. UserError for
        more than 2^31 - 1 tokens."""
        check_batch(rows, length)
        ids, mask = (jax.ShapeDtypeStruct((rows, length), kind) for kind in (jnp.int32, jnp.bool))
        return Batch(ids, mask, ids, ids) if packed else Batch(ids, mask)


@struct.dataclass
class Preferences:
    """B prompts with C candidate answers each, and which answer was chosen."""

    tokens_BCT: Leaf  # int32: prompt and answer
    mask_BCT: Leaf  # bool: the answer's tokens, including its closing tag
    choice_B: Leaf  # int32: index of the favourite, or `losses.TIE`
    present_BC: Leaf  # bool: False where a prompt has fewer than C candidates

    @staticmethod
    def of(arrays: Mapping[str, Leaf]) -> "Preferences":
        """From the dict that the data pipelines yield."""
        return Preferences(arrays["tokens"], arrays["mask"], arrays["choice"], arrays["present"])

    @staticmethod
    def shapes(prompts: int, candidates: int, length: int) -> "Preferences":
        """Shapes and dtypes instead of arrays, for ahead-of-time compilation. UserError as for `Batch.shapes`."""
        check_batch(prompts * candidates, length)
        shape = (prompts, candidates, length)
        return Preferences(
            tokens_BCT=jax.ShapeDtypeStruct(shape, jnp.int32),
            mask_BCT=jax.ShapeDtypeStruct(shape, jnp.bool),
            choice_B=jax.ShapeDtypeStruct(shape[:1], jnp.int32),
            present_BC=jax.ShapeDtypeStruct(shape[:2], jnp.bool),
        )

    @property
    def rows(self) -> "Batch":
        """All candidates as rows of one batch, [B * C, T]."""
        T = self.tokens_BCT.shape[-1]
        return Batch(self.tokens_BCT.reshape(-1, T), self.mask_BCT.reshape(-1, T))


@struct.dataclass
class KVCache:
    """Keys and values, [B, G, S, K] for each layer. Slots [0, P) hold the prompt, slot P + t the t-th new token.

    Two choices keep XLA from copying it in every step: there is one array per layer, not one for all layers; and axes B
    and G are left out if their size is 1, since a matrix product drops such axes and its shape would differ from the
    loop's.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


@struct.dataclass
class Answers:
    """What `decoding.generate` returns: A new tokens per row, padded after the stop token."""

    tokens_BA: Array  # int32
    logp_BA: Array  # float32: log-probability of each token under the sampling distribution; 0 after the end
    length_B: Array  # int32: tokens up to and including the stop token
    ended_B: Array  # bool: the stop token was sampled
    value_BA: Array | None = None  # float32: the critic's value of the state before each token; 0 after the end


@struct.dataclass
class Prompts:
    """Prompts padded on the right, and their lengths."""

    tokens_BP: Leaf  # int32
    length_B: Leaf  # int32

    @staticmethod
    def shapes(prompts: int, length: int) -> "Prompts":
        """Shapes and dtypes in place of arrays, to compile for. UserError as for `Batch.shapes`."""
        check_batch(prompts, length)
        return Prompts(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((prompts, length), (prompts,))))


@struct.dataclass
class Experience:
    """Answers of a policy before anyone has scored them."""

    rows: Batch  # prompt + answer without a gap, [B, P + A]; the mask is the answer's
    logp_BT: Array  # float32: the sampler's log-probabilities; 0 outside the answer
    answers: Answers

    @property
    def ended_B(self) -> Array:
        """Whether the answer ended with the stop token, bool."""
        return self.answers.ended_B


@struct.dataclass
class Rollout:
    """Everything a PPO update needs, as rows of prompt + answer."""

    tokens_BT: Array  # int32
    mask_BT: Array  # bool: the answer's tokens
    logp_BT: Array  # float32: the policy's before the update, computed as in training
    ref_logp_BT: Array  # float32: the frozen reference policy's
    value_BT: Array  # float32: the critic's prediction before the update
    score_B: Array  # float32: h(x, y), or the fixed score of an answer that never ended
    ended_B: Array  # bool
    sampler_logp_BT: Array  # float32: the sampler's own, a diagnostic

    @property
    def rows(self) -> Batch:
        """Tokens and mask alone."""
        return Batch(self.tokens_BT, self.mask_BT)
