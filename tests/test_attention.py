"""Attention by kernels is the formula's: splash interpreted on a CPU, and which kernel is taken where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import attention, layers, sharding
from jaxgpt.sharding import MeshConfig

B, T, H, K = 4, 256, 4, 16
SEGMENTS = jnp.where(jnp.arange(T) < 100, 1, 2) * jnp.ones((B, 1), jnp.int32)


def inputs(T=T, K=K, dtype=jnp.float32):
    return tuple(jax.random.normal(key, (B, T, H, K), dtype) for key in jax.random.split(jax.random.key(0), 3))


def outcome(attend, segments, mesh=None):
    """Output, and gradients of a random projection of it."""
    weights = jax.random.normal(jax.random.key(1), (B, T, H, K))

    def loss(*qkv):
        out = attend(*qkv, segments)
        return (out * weights).sum(), out

    both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    if mesh is None:
        return jax.jit(both)(*inputs())
    return jax.jit(sharding.within(mesh, both))(*sharding.place_whole(inputs(), mesh))


def splash(*args):
    return attention.splash(*args, interpret=True)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize("shape", [None, (2, 2, 2), (8, 1, 1)], ids=str)  # four rows don't divide among eight
def test_splash_is_the_formula_on_any_mesh(shape, segments):
    mesh = None if shape is None else sharding.make_mesh(MeshConfig(*shape))
    expected, found = outcome(attention.attend, segments), outcome(splash, segments, mesh)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_a_row_length_without_tiles_is_left_to_the_formula():
    q, k, v = inputs(T=100)
    np.testing.assert_array_equal(attention.splash(q, k, v, None), attention.attend(q, k, v, None))


@pytest.mark.parametrize(
    ("kind", "used"),
    [
        ({}, "xla"),  # float32
        ({"dtype": jnp.bfloat16}, "cudnn"),
        ({"dtype": jnp.bfloat16, "K": 12}, "xla"),
        ({"dtype": jnp.bfloat16, "K": 136}, "xla"),
        ({"dtype": jnp.bfloat16, "T": 255}, "xla"),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", ["7.5", "9.0"])
def test_cudnn_is_asked_only_for_what_it_can_do(kind, used, capability, monkeypatch):
    asked = []
    gpu = type("Gpu", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "local_devices", lambda backend: [gpu])
    monkeypatch.setattr(attention, "attend", lambda *args: asked.append(args[-1]))
    attention.cudnn(*inputs(**kind), None)
    assert asked == ["xla" if capability == "7.5" else used]


@pytest.mark.parametrize(
    ("platform", "attend"), [("gpu", attention.cudnn), ("tpu", attention.splash), ("other", attention.attend)]
)
def test_each_platform_has_its_kernel(platform, attend, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    assert layers.choose("auto").attend is attend
    assert layers.choose("plain") is layers.PLAIN
