"""The programs that a GPU would run, by their structure: lowered for CUDA here, and compiled by `make gpu-gate`.

Lowering needs neither a GPU nor its compiler; what cuDNN's version would be asked for is answered here."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxgpt import decoding
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.training.step import jit_on, sharded_shapes
from tpu import compiling
from tpu.settings import PRESETS

MODEL = ModelConfig(
    layers=2, width=64, heads=2, block=40, vocab=512, dtype="bfloat16", platform="gpu", logits_bytes=4 * 8 * 512 * 10
)
SETTINGS = dataclasses.replace(
    PRESETS["toy"], model=MODEL, batch=8, prompts=8, prompt_tokens=13, ppo=PPOConfig(new_tokens=24, epochs=2)
)


@pytest.fixture(scope="module", autouse=True)
def cudnn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
        yield


def lower(step, *arguments, **static):
    return step.trace(*arguments, **static).lower(lowering_platforms=("cuda",))


@functools.cache
def program(step: str) -> tuple[str, int]:
    """The StableHLO of a step of the experiments, and how many arrays its state has."""
    built = compiling.build(SETTINGS, step, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    text = lower(built.step, *built.arguments, **built.static).as_text()
    return text, len(jax.tree.leaves(built.arguments[0]))


@functools.cache
def decoder(filter_name: str) -> str:
    """The StableHLO of `generate` with a filter."""
    filters = {
        "none": lambda x: x,
        "top-k": lambda x: sampling.top_k(x / 0.8, 50),
        "top-p": lambda x: sampling.top_p(x / 0.8, 0.9),
    }
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = sharded_shapes(mesh, lambda: transformer.init(jax.random.key(0), MODEL))
    step = jit_on(mesh, decoding.generate, static_argnums=1, static_argnames=decoding.STATIC_ARGNAMES)
    tokens, lengths = jnp.zeros((8, 13), jnp.int32), jnp.ones(8, jnp.int32)
    settings = {"new_tokens": 24, "stop": 5, "filter_logits": filters[filter_name]}
    return lower(step, params, MODEL, tokens, lengths, jax.random.key(0), **settings).as_text()


def products(text: str) -> list[str]:
    """The operands and results of every matrix product."""
    return re.findall(r"stablehlo\.dot_general .*: (\(.*)", text)


def test_every_product_of_training_dpo_and_decoding_has_bfloat16_operands():
    for text in (program("train")[0], program("dpo")[0], decoder("none"), decoder("top-p")):
        found = products(text)
        assert len(found) > 10
        assert [one for one in found if one.split(" -> ")[0].count("bf16>") != 2] == []


def test_only_scalar_heads_multiply_float32_in_ppo():
    """They are products with a vector [D]: the reward model's score and the critic's values."""
    found = [one for one in products(program("ppo")[0]) if one.split(" -> ")[0].count("bf16>") != 2]
    assert found and all("<64xf32>" in one or "64xf32>) -> tensor<64xf32>" in one for one in found), found


@pytest.mark.parametrize("step", ["train", "dpo", "ppo"])
def test_every_layer_uses_cudnn_whatever_the_length_of_a_row(step):
    """Rows of 40 tokens, and of 13 + 24: an odd number."""
    text, _ = program(step)
    assert "exponential" in text, "the head's softmax"
    forward, backward = (len(re.findall(rf"@__cudnn\$fmhaSoftmax{kind}\b", text)) for kind in ("", "Backward"))
    assert backward >= MODEL.layers and forward >= backward and forward % MODEL.layers == 0
    # no softmax over the [T, T] matrix of a row is left, except over what the cache holds
    width = {"train": 40, "dpo": 37, "ppo": 37}[step]
    assert not re.search(rf"stablehlo\.(exponential|divide) .*x{width}x{width}x", text)


@pytest.mark.parametrize("step", ["train", "dpo", "ppo"])
def test_the_state_is_donated_and_nothing_waits_for_the_host(step):
    text, leaves = program(step)
    entry = next(line for line in text.splitlines() if "func.func public @main" in line)
    assert entry.count("jax.buffer_donor") + entry.count("tf.aliasing_output") >= leaves
    assert not re.search(r"callback|infeed|outfeed|stablehlo\.(send|recv)", text)


def test_the_head_makes_no_zeros_of_a_tiles_size():
    """A gather's gradient would scatter into zeros [rows, tile, vocabulary]."""
    text, _ = program("train")
    assert "x512xf32>" in text
    for shape in re.findall(r"scatter.*?-> tensor<([^>]*)>", text, re.DOTALL):
        assert not re.search(r"x512xf32$", shape), shape


@pytest.mark.parametrize("name", ["top-k", "top-p"])
def test_a_threshold_is_found_in_8_passes_without_a_sort(name):
    text = decoder(name)
    assert not re.search(r"stablehlo\.sort|top_?k\(", text, re.IGNORECASE)
    assert re.search(r"stablehlo\.reduce\(.*?across dimensions", text) and "dense<8> : tensor<i32>" in text


def test_the_decode_loop_converts_no_weight():
    """What the loop reads has its dtype before it: no convert from float32 of a matrix or a bias inside."""
    text = decoder("none")
    loop = text[text.index("stablehlo.while") :]
    assert not re.findall(r"convert .*\(tensor<(?:64|128|192|256|512|64x\d+|\d+x64)xf32>\) -> tensor<[^>]*bf16>", loop)
