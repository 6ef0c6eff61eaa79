"""GPT-2's training step, DPO, PPO and decoding, compiled for an H100: `make VENV=.venv-gpu EXTRAS=cuda gpu-gate`.

About 10 minutes on two cores. Structure is asserted; estimates are printed by `tpu.plan`, never asserted."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tpu import estimates
from tpu.settings import PRESETS, Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="the GPU compiler is not installed (make VENV=.venv-gpu EXTRAS=cuda set-up)",
    ),
]
TRAIN = ("--steps", "train", "--batch", "32", "--model.block", "1024", "--model.no-scan")
DPO = ("--steps", "dpo", "--ppo.new-tokens", "41")
PPO = ("--steps", "ppo", "--prompts", "512", "--ppo.new-tokens", "40", "--ppo.epochs", "1")
DECODE = ("--steps", "decode", "--prompts", "512")


@functools.cache
def plan(*words: str, topology: str = "h100:1") -> dict[str, Any]:
    """What `tpu.plan` finds for the best mesh."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "tpu.plan", "--topology", topology, *words, "--json", str(file)]
        done = subprocess.run([*command, "--tries", "1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (step,) = json.loads(file.read_text())["steps"].values()
    (found,) = step["meshes"]
    assert found["fits"], done.stdout
    return found


@pytest.mark.parametrize("words", [TRAIN, DPO, PPO, DECODE], ids=["train", "dpo", "ppo", "decode"])
def test_products_have_bfloat16_operands_and_attention_is_cudnns(words):
    found = plan(*words)
    scalar_heads = [name for name in found["float32_products"] if "...d,d->..." in name]
    assert found["float32_products"] == scalar_heads
    assert found["attention"] == ["cuDNN"]


def test_the_flops_of_a_training_step_are_those_of_the_closed_form():
    """With the head's logits, which the backward pass computes a second time."""
    found = plan(*TRAIN)
    model = PRESETS["gpt2"].model
    settings = Settings(batch=32, model=dataclasses.replace(model, block=1024))
    closed = estimates.closed_form_flops(settings, "train") + 2 * 32 * 1024 * model.vocab * model.width
    counted = sum(part["flops"] for part in found["parts"])
    assert abs(counted / closed - 1) < 0.02 and abs(found["flops"] / closed - 1) < 0.02


@pytest.mark.parametrize("words", [TRAIN, DPO, PPO], ids=["train", "dpo", "ppo"])
def test_the_state_is_updated_in_place(words):
    memory = plan(*words)["memory"]
    assert plan(*words)["aliased"] >= 0.99 * (memory["parameters"] + memory["optimizer"] + memory.get("frozen", 0))


def test_decoding_copies_no_cache_and_sorts_nothing():
    found = plan(*DECODE)
    assert found["sorts"] == 0 and found["copied_in_loops"] < 2**20
    assert found["kernels_per_token"] < 200  # 231 before biases were converted outside the loop


def test_eight_gpus_share_the_parameters():
    found = plan("--preset", "toy", "--steps", "train", "--mesh.fsdp", "8", topology="h100:8")
    assert {"all-gather", "reduce-scatter"} <= set(found["collectives"])


def test_logits_of_a_single_tile_are_computed_once():
    """As the planner's proposal of tiles assumes: of the head's four products, one is then left out."""
    tiled, whole = (
        sum(
            part["flops"]
            for part in plan("--preset", "toy", "--steps", "train", *words)["parts"]
            if "head" in part["name"]
        )
        for words in (("--model.logits-bytes", str(2**22)), ("--model.logits-bytes", str(2**36)))
    )
    assert abs(tiled / whole - 4 / 3) < 0.02
