"""What `tpu.plan` is asked for."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, ModelConfig, check_settings
from jaxgpt.errors import UserError
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.rlhf.ppo import PPOConfig
from tpu import hardware

Step = Literal["train", "dpo", "ppo", "decode"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is computed in each step."""

    model: ModelConfig = dataclasses.replace(MODELS["gpt2"], dtype="bfloat16", scan=True)
    batch: Count = 256  # rows of model.block tokens per training step
    microbatches: Count = 1
    pairs: Count = 64  # of answers per DPO step
    prompts: Count = 512  # per PPO iteration, and for decoding
    prompt_tokens: Count = 64
    ppo: PPOConfig = PPOConfig(new_tokens=64, temperature=0.7, epochs=4)
    mesh: MeshConfig = MeshConfig()  # tpu.plan tries several, unless this one is set


@dataclasses.dataclass(frozen=True)
class Settings(Sizes):
    """Takes a minute or two per step for a model of GPT-2's size on two cores."""

    topology: str = "v5e:4x4"  # v5p:8x8x8, 2*v6e:16x16 (two slices), h100:8, h100:8x4 (4 hosts of 8)
    steps: tuple[Step, ...] = ("train", "ppo", "decode")  # or dpo
    tries: Count = 3  # meshes to compile for each step, best estimates first
    patience: Count = 900  # time limit for one compilation, in seconds
    json: Path | None = None  # also write the results to this file

    def __post_init__(self) -> None:
        check_settings(self)
        hardware.parse(self.topology)
        if self.json and self.json.is_dir():
            raise UserError(f"json is {self.json}, a folder; give a file")
        if not self.steps:
            raise UserError("steps is empty, so there is nothing to compile; name at least one step")

    @property
    def machine(self) -> hardware.Topology:
        return hardware.parse(self.topology)


PRESETS = {
    "gpt2": Settings(),
    "gpt2-xl": Settings(model=dataclasses.replace(MODELS["gpt2-xl"], dtype="bfloat16", scan=True, remat="full")),
    "toy": Settings(
        model=dataclasses.replace(MODELS["tiny"], dtype="bfloat16", block=128, heads=2, scan=True),
        batch=64,
        pairs=32,
        prompts=64,
        prompt_tokens=32,
        ppo=PPOConfig(new_tokens=32, epochs=2),
        tries=1,
    ),
}
