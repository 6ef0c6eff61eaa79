"""Attention kernels agree with the formula: splash interpreted on a CPU, and which kernel is used where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models import attention, layers, sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from tests.helpers import TINY

B, T, H, K = 4, 128, 2, 8
SEGMENTS = np.tile(np.where(np.arange(T) < 50, 1, 2), (B, 1))


def outcome(attend, segments, mesh=None):
    """The output, and gradients of a random projection of it."""
    weights, *inputs = np.random.default_rng(0).standard_normal((4, B, T, H, K), np.float32)

    def loss(*qkv):
        out = attend(*qkv, segments)
        return (out * weights).sum(), out

    both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    if mesh is None:
        return jax.jit(both)(*inputs)
    return jax.jit(sharding.within(mesh, both))(*sharding.place_whole(tuple(inputs), mesh))


def splash(*args):
    return attention.splash(*args, interpret=True)


@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        (None, None),
        ((2, 2, 2), SEGMENTS),
        pytest.param(None, SEGMENTS, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), None, marks=pytest.mark.slow),
        ((8, 1, 1), SEGMENTS),  # four rows don't divide among eight devices
    ],
    ids=["one device", "2x2x2, segments", "one device, segments", "2x2x2", "8x1x1, segments"],
)
def test_splash_is_the_formula_on_any_mesh(shape, segments):
    mesh = None if shape is None else sharding.make_mesh(MeshConfig(*shape))
    expected, found = outcome(attention.attend, segments), outcome(splash, segments, mesh)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_splash_takes_rows_of_any_length():
    """They are padded to tiles of 128; nothing sees the padding."""
    tokens = 100
    rows = (x[:, :tokens] for x in np.random.default_rng(1).standard_normal((4, B, T, H, K), np.float32))
    weights, *inputs = rows
    segments = SEGMENTS[:, :tokens]

    def slopes(attend):
        return jax.jit(jax.grad(lambda *qkv: (attend(*qkv, segments) * weights).sum(), (0, 1, 2)))(*inputs)

    for x, y in zip(slopes(attention.attend), slopes(splash), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def shapes(T=T, K=K, dtype=jnp.bfloat16):
    return [jnp.zeros((B, T, H, K), dtype)] * 3


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ({"dtype": jnp.float32}, None),
        ({}, 8.0),
        ({"K": 12}, None),
        ({"K": 128}, 8.0),
        ({"K": 136}, 9.0),
        ({"K": 264}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [7.5, 8.0, 9.0])
def test_cudnn_is_asked_only_for_what_it_can_do(kind, needed, capability, monkeypatch):
    """`needed`: the compute capability from which cuDNN has this kind."""
    asked = []
    monkeypatch.setattr(sharding, "target_device", lambda: type("Gpu", (), {"compute_capability": str(capability)}))
    monkeypatch.setattr(attention, "attend", lambda *args: asked.append(args) or args[0])
    found = attention.cudnn(*shapes(T=37, **kind), None)
    assert found.shape[1] == 37
    uses_cudnn = needed is not None and capability >= needed
    assert asked[0][-1] == ("cudnn" if uses_cudnn else "xla")
    assert asked[0][0].shape[1] == (38 if uses_cudnn else 37)  # cuDNN wants an even number of tokens


@pytest.mark.parametrize(
    ("platform", "attend"), [("gpu", attention.cudnn), ("tpu", attention.splash), ("other", attention.attend)]
)
def test_each_platform_has_its_kernel(platform, attend, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    assert transformer.select_layers(TINY).attend is attend
    plain = dataclasses.replace(TINY, gradients="plain")
    assert transformer.select_layers(plain) is layers.plain_layers(platform)
    if platform != "other":  # said in the config, it needs no device
        monkeypatch.undo()
        assert transformer.select_layers(dataclasses.replace(TINY, platform=platform)).attend is attend
