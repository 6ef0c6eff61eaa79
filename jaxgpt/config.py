"""What a model is made of: one frozen dataclass, and named presets."""

import dataclasses
from collections.abc import Mapping


class UserError(ValueError):
    """A mistake in settings, data or files: one line that says what is wrong, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A GPT-2 type transformer: learned positions, pre-norm, GELU, tied embedding and head."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    block: int = 96  # longest sequence, in tokens
    vocab: int = 2048  # rows of the embedding; a multiple of 128 is fastest
    mlp_ratio: int = 4
    dropout: float = 0.0  # only where a PRNG key is passed: never while sampling or scoring
    norm_epsilon: float = 1e-5
    dtype: str = "float32"  # of activations and matrix products; parameters stay float32
    gradients: str = "auto"  # of the layers: written by hand where that is faster, or "plain": all JAX's own
    remat: str = (
        "none"  # what the backward pass computes again: nothing, all but "dots" (products of weights), or "full"
    )
    scan: bool = False  # one compiled layer for all: compiles sooner, runs slower on a CPU

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "block", "vocab", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise UserError(
                f"model.width {self.width} is not a multiple of model.heads {self.heads}; change one of them"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout is {self.dropout}; it must be in [0, 1)")
        choices = {"dtype": ("float32", "bfloat16"), "gradients": ("auto", "plain"), "remat": ("none", "dots", "full")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """How many weights, without the positions', which only add."""
        D, F = self.width, self.width * self.mlp_ratio
        layer = 3 * D * D + 3 * D + D * D + D + 2 * D * F + F + D + 4 * D
        return self.layers * layer + self.vocab * D + 2 * D

    @property
    def flops_a_token(self) -> int:
        """Of forward and backward over a whole block: 6 N + 12 layers width block (the forward pass is a third)."""
        return 6 * self.parameters + 12 * self.layers * self.width * self.block


PRESETS: Mapping[str, ModelConfig] = {
    "toy": ModelConfig(layers=2, width=32, heads=2, block=96, vocab=512),
    "tiny": ModelConfig(layers=4, width=128, heads=4, block=96, vocab=4096),
    "small": ModelConfig(layers=6, width=384, heads=6, block=256, vocab=4096),
    "gpt2": ModelConfig(layers=12, width=768, heads=12, block=1024, vocab=50304),
    "gpt2-medium": ModelConfig(layers=24, width=1024, heads=16, block=1024, vocab=50304),
    "gpt2-large": ModelConfig(layers=36, width=1280, heads=20, block=1024, vocab=50304),
    "gpt2-xl": ModelConfig(layers=48, width=1600, heads=25, block=1024, vocab=50304),
}


def round_up(n: int, multiple: int = 128) -> int:
    """The smallest multiple of `multiple` that is at least n (vocabularies are padded so)."""
    return -(-n // multiple) * multiple
