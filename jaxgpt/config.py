"""What a model is made of: one frozen dataclass, and named presets."""

import dataclasses
from collections.abc import Mapping

from jaxgpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer: of GPT-2's type by default; other settings make a GPT (2018) or a Llama, see PRESETS."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0  # so many keys and values, each for heads / kv_heads queries; 0: one a head
    block: int = 96  # longest sequence, in tokens
    vocab: int = 2048  # rows of the embedding; a multiple of 128 is fastest
    mlp_width: int = 0  # hidden units of the MLP; 0: 4 x width
    mlp: str = "gelu"  # or "swiglu": down(silu(gate x) * up x)
    norm: str = "layer"  # or "rms": no mean, no bias
    norm_at: str = "input"  # of each sub-layer, or "output": of its sum with what went in (Radford 2018)
    positions: str = "learned"  # or "rotary"
    rope_theta: float = 10_000.0  # rotary: wavelengths from 2 pi to 2 pi theta tokens
    rope_factor: float = 1.0  # rotary: wavelengths beyond rope_block are stretched so (Llama 3.1 and later)
    rope_block: int = 8192  # rotary: the block before it was stretched
    biases: bool = True  # of dense layers
    tied: bool = True  # the head is the embedding
    dropout: float = 0.0  # only where a PRNG key is passed: never while sampling or scoring
    norm_epsilon: float = 1e-5
    dtype: str = "float32"  # of activations and matrix products; parameters stay float32
    gradients: str = "auto"  # of the layers: written by hand where that is faster, or "plain": all JAX's own
    remat: str = (
        "none"  # what the backward pass computes again: nothing, all but "dots" (products of weights), or "full"
    )
    scan: bool = False  # one compiled layer for all: compiles sooner, runs slower on a CPU

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "block", "vocab", "rope_block"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("kv_heads", "mlp_width"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it can't be negative")
        for large, small in (("width", "heads"), ("heads", "kv_heads")):
            if getattr(self, small) and getattr(self, large) % getattr(self, small):
                raise UserError(
                    f"model.{large} {getattr(self, large)} is not a multiple of model.{small} {getattr(self, small)}; "
                    "change one of them"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout is {self.dropout}; it must be in [0, 1)")
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(f"heads of {self.head_dim} numbers can't be rotated in pairs; choose an even width / heads")
        if not (self.rope_theta > 1.0 and self.rope_factor >= 1.0):
            raise UserError(f"model.rope_theta {self.rope_theta} and rope_factor {self.rope_factor} must be above 1")
        choices = {
            "mlp": ("gelu", "swiglu"),
            "norm": ("layer", "rms"),
            "norm_at": ("input", "output"),
            "positions": ("learned", "rotary"),
            "dtype": ("float32", "bfloat16"),
            "gradients": ("auto", "plain"),
            "remat": ("none", "dots", "full"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def mlp_units(self) -> int:
        return self.mlp_width or 4 * self.width

    @property
    def parameters(self) -> int:
        """How many weights, without the positions', which only add."""
        D, F, GK = self.width, self.mlp_units, self.groups * self.head_dim
        gates = 2 if self.mlp == "swiglu" else 1
        norm = 2 * D if self.norm == "layer" else D
        layer = D * (D + 2 * GK) + D * D + (gates + 1) * D * F + 2 * norm
        if self.biases:
            layer += (D + 2 * GK) + D + gates * F + D
        tables = self.vocab * D * (1 if self.tied else 2)
        return self.layers * layer + tables + (norm if self.norm_at == "input" else 0)

    @property
    def flops_a_token(self) -> int:
        """Of forward and backward over a whole block: 6 N + 12 layers width block (the forward pass is a third). An
        embedding that is not the head too is only looked up."""
        products = self.parameters - (0 if self.tied else self.vocab * self.width)
        return 6 * products + 12 * self.layers * self.width * self.block


_LLAMA = ModelConfig(mlp="swiglu", norm="rms", positions="rotary", biases=False)

PRESETS: Mapping[str, ModelConfig] = {
    "toy": ModelConfig(layers=2, width=32, heads=2, block=96, vocab=512),
    "tiny": ModelConfig(layers=4, width=128, heads=4, block=96, vocab=4096),
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
    """The smallest multiple of `multiple` that is at least n (vocabularies are padded so)."""
    return -(-n // multiple) * multiple
