"""Allowed values of settings (`Range`), and a model's configuration: one frozen dataclass with named presets."""

import dataclasses
import math
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers a setting may take: `steps: Annotated[int, Range(1)] = 100`. `check_settings` rejects any other, NaN
    and infinity included, and --help shows the range. `Range()`: any finite number. Where a range has no upper limit,
    those of the arrays apply: MOST_INT, and the numbers that float32 can hold."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return _is_finite(number) and self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{words} {bound:.10g}" for words, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(words) or "any finite number"


MOST_INT = 2**31 - 1  # JAX counts and indexes in int32
LEAST_FLOAT, MOST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # float32: what is smaller becomes 0, larger infinite

Count = Annotated[int, Range(1)]  # of something that there must be
CountOrZero = Annotated[int, Range(0)]
Counts = Annotated[tuple[int, ...], Range(1)]
Positive = Annotated[float, Range(above=0)]
Positives = Annotated[tuple[float, ...], Range(above=0)]
Nonnegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # jax.random.key drops the bits above: 2**32 would repeat seed 0


def check_settings(settings: Any) -> None:
    """For `__post_init__`: UserError if a field is outside its `Range`, if int32 or float32 can't hold it, or if it is
    not one of its `Literal`'s choices. Tuples are checked number by number, and None is always allowed. The message
    begins with the field's name; whoever reads nested settings (`runs.cli`, `runs.settings`) puts the path to them
    before it."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        hint, value = hints[field.name], getattr(settings, field.name)
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else (value,)
        if value not in choices:
            raise UserError(f"{field.name} is {value!r}; choose {' or '.join(map(str, choices))}")
        for allowed in (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Range)):
            for number in _numbers(value):
                if number not in allowed:
                    finite = "" if _is_finite(number) or str(allowed) == str(Range()) else "finite and "
                    raise UserError(f"{field.name} is {number}; it must be {finite}{allowed}")
                limits = _limits_of_arrays(number, allowed)
                if limits:
                    raise UserError(f"{field.name} is {number}; it must be {limits}")


def _limits_of_arrays(number: float, allowed: Range) -> str:
    """What a number of a range must be for the arrays, if it isn't; otherwise an empty string."""
    if isinstance(number, int):
        fits = allowed.most < math.inf or abs(number) <= MOST_INT
        return "" if fits else f"at most {MOST_INT}" if number > 0 else f"at least -{MOST_INT}"
    if number and not LEAST_FLOAT <= abs(number) <= MOST_FLOAT:
        return f"a number that float32 can hold, between {LEAST_FLOAT:.2g} and {MOST_FLOAT:.2g} in size"
    return ""


def _is_finite(number: float) -> bool:
    return abs(number) <= sys.float_info.max  # math.isfinite raises OverflowError for larger integers


def _numbers(value: Any) -> Iterator[float]:
    """The number, those in a tuple of numbers or of tuples, or none for None."""
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    elif value is not None:
        yield value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer: like GPT-2 by default; other settings make it a GPT (2018) or a Llama, see PRESETS."""

    layers: Annotated[int, Range(1, 1000)] = 4
    width: Annotated[int, Range(1, 2**20)] = 128
    heads: Count = 4
    kv_heads: CountOrZero = 0  # key/value heads, each for heads / kv_heads query heads; 0: one per head
    block: Annotated[int, Range(1, 2**24)] = 96  # maximum sequence length, in tokens
    vocab: Annotated[int, Range(1, 2**20)] = 2048  # rows of the embedding; a multiple of 128 is fastest
    mlp_width: Annotated[int, Range(0, 2**22)] = 0  # hidden units of the MLP; 0: 4 x width
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu: down(silu(gate x) * up x)
    norm: Literal["layer", "rms"] = "layer"  # rms: no mean, no bias
    norm_at: Literal["input", "output"] = "input"  # normalise a sub-layer's input, or the residual sum (Radford 2018)
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: Annotated[float, Range(above=1)] = 10_000.0  # rotary: wavelengths run from 2 pi to 2 pi theta tokens
    rope_factor: Annotated[float, Range(1)] = 1.0  # rotary: factor to stretch wavelengths beyond rope_block (Llama 3.1)
    rope_block: Count = 8192  # rotary: the block before stretching
    biases: bool = True  # whether dense layers have biases
    tied: bool = True  # whether the head shares the embedding's weights
    dropout: Annotated[float, Range(0, below=1)] = 0.0  # training only: applied where a PRNG key is given
    norm_epsilon: Positive = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products; parameters stay float32
    gradients: Literal["auto", "plain"] = "auto"  # auto: hand-written where that is faster; plain: all by JAX
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes; dots: all but matrix products
    scan: bool = False  # compile one layer and loop over it: compiles faster, runs slower on a CPU
    logits_bytes: Annotated[int, Range(1, 10**12)] = 512 * 2**20  # per device; larger logits are computed in tiles
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # that programs are written for; auto: the mesh's devices

    def __post_init__(self) -> None:
        check_settings(self)
        for large, small in (("width", "heads"), ("heads", "kv_heads")):
            if getattr(self, small) and getattr(self, large) % getattr(self, small):
                raise UserError(
                    f"{large} {getattr(self, large)} is not a multiple of {small} {getattr(self, small)}; "
                    "change one of them"
                )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(
                f"width / heads is {self.head_dim}, but rotary positions need an even number; change one of them"
            )

    @property
    def head_dim(self) -> int:
        """Numbers per head, K."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """Number of key/value heads, G."""
        return self.kv_heads or self.heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of the MLP, F."""
        return self.mlp_width or 4 * self.width

    @property
    def parameters(self) -> int:
        """Number of weights, without learned positions, which take part in no matrix product."""
        D, F, GK = self.width, self.mlp_hidden, self.groups * self.head_dim
        gates = 2 if self.mlp == "swiglu" else 1
        norm = 2 * D if self.norm == "layer" else D
        layer = D * (D + 2 * GK) + D * D + (gates + 1) * D * F + 2 * norm
        if self.biases:
            layer += (D + 2 * GK) + D + gates * F + D
        tables = self.vocab * D * (1 if self.tied else 2)
        return self.layers * layer + tables + (norm if self.norm_at == "input" else 0)

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token, forward and backward, over a full block: 6 N + 12 layers width block (the forward pass is a
        third). An untied embedding is only looked up, and costs nothing."""
        products = self.parameters - (0 if self.tied else self.vocab * self.width)
        return 6 * products + 12 * self.layers * self.width * self.block


_LLAMA = ModelConfig(mlp="swiglu", norm="rms", positions="rotary", biases=False)

PRESETS: Mapping[str, ModelConfig] = {
    "toy": ModelConfig(layers=2, width=32, heads=2, block=96, vocab=512),
    "tiny": ModelConfig(layers=4, width=128, heads=4, block=96, vocab=4096, positions="rotary"),
    "small": ModelConfig(layers=6, width=384, heads=6, block=256, vocab=4096),
    "gpt": ModelConfig(layers=12, width=768, heads=12, block=512, vocab=40576, norm_at="output"),
    "gpt2": ModelConfig(layers=12, width=768, heads=12, block=1024, vocab=50304),
    "gpt2-medium": ModelConfig(layers=24, width=1024, heads=16, block=1024, vocab=50304),
    "gpt2-large": ModelConfig(layers=36, width=1280, heads=20, block=1024, vocab=50304),
    "gpt2-xl": ModelConfig(layers=48, width=1600, heads=25, block=1024, vocab=50304),
    "llama-tiny": dataclasses.replace(_LLAMA, layers=4, width=128, heads=4, kv_heads=2, mlp_width=384, vocab=4096),
    "smollm2-135m": dataclasses.replace(
        _LLAMA, layers=30, width=576, heads=9, kv_heads=3, mlp_width=1536, block=8192, vocab=49152, rope_theta=1e5
    ),
}


def round_up(n: int, multiple: int = 128) -> int:
    """The smallest multiple of `multiple` that is at least n (used to pad vocabularies)."""
    return -(-n // multiple) * multiple
