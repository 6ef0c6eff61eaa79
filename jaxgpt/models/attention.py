"""Causal attention: the formula, and kernels that never store the [B, H, T, T] attention matrix.

NVIDIA GPUs use cuDNN's flash attention, TPUs splash attention (after Dao et al. 2022). Both support only reverse-mode
gradients, and fall back to the formula for inputs they can't handle. Keys and values may have fewer heads than queries:
each is then shared by a group of adjacent query heads (Ainslie et al. 2023).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import UserError
from jaxgpt.models import sharding
from jaxgpt.structs import Array

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

Tree = TypeVar("Tree")
Implementation = Literal["xla", "cudnn"]
SPLASH_TILES = (512, 256, 128)  # tile sizes along queries and keys; the largest that divides T is used


def attend(
    q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, segments_BT: Array | None, implementation: Implementation = "xla"
) -> Array:
    """softmax(q k^T / sqrt(K)) v over each token and those before it, [B, T, H, K], within its own segment."""
    same = None if segments_BT is None else segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, mask=same, is_causal=True, implementation=implementation
    )


def repeat_for_heads(x_BTGK: Array, heads: int) -> Array:
    """Repeat keys or values for each query head that shares them, [B, T, H, K]."""
    return jnp.repeat(x_BTGK, heads // x_BTGK.shape[2], axis=2) if x_BTGK.shape[2] < heads else x_BTGK


def cudnn(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, segments_BT: Array | None) -> Array:
    """cuDNN's flash attention: half precision, an Ampere GPU or newer, K a multiple of 8 up to 128 (from Hopper on, up
    to 256). Rows are padded to an even number of tokens, which it needs for the gradient of packed rows."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    # Without a GPU to ask (`ModelConfig.platform` says "gpu"), an Ampere is assumed.
    capability = float(getattr(sharding.target_device(), "compute_capability", "8.0"))
    suits = q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and K % 8 == 0 and (256 if capability >= 9.0 else 128) >= K
    if not suits or capability < 8.0:
        return attend(q_BTHK, k_BTHK, v_BTHK, segments_BT, "xla")
    padded = pad_rows(reverse_mode_only((q_BTHK, k_BTHK, v_BTHK)), T + T % 2)
    return attend(*padded, pad_rows(segments_BT, T + T % 2), "cudnn")[:, :T]


def pad_rows(tree: Tree, tokens: int) -> Tree:
    """Arrays [B, T, ...] with zeros up to `tokens` tokens: causal attention hides what comes last from all others, and
    segment 0 is padding."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, tokens - x.shape[1])] + [(0, 0)] * (x.ndim - 2)), tree)


def splash(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, segments_BT: Array | None, interpret: bool = False) -> Array:
    """Splash attention, a Pallas kernel that skips tiles above the diagonal. Rows are padded to a multiple of its
    smallest tile, 128 tokens. XLA can't partition a kernel by itself, so each device runs it on its own rows and heads.
    `interpret` runs it without a TPU, slowly."""
    _, tokens, H, _ = q_BTHK.shape
    T = -(-tokens // SPLASH_TILES[-1]) * SPLASH_TILES[-1]
    tile = next(tile for tile in SPLASH_TILES if T % tile == 0)
    q_BTHK, k_BTHK, v_BTHK, segments_BT = pad_rows((q_BTHK, k_BTHK, v_BTHK, segments_BT), T)
    q_BTHK, k_BTHK, v_BTHK = reverse_mode_only((q_BTHK, k_BTHK, v_BTHK))
    k_BTHK, v_BTHK = (repeat_for_heads(x, H) for x in (k_BTHK, v_BTHK))
    mesh = jax.sharding.get_abstract_mesh()
    heads = "tensor" if H % mesh.shape.get("tensor", 1) == 0 and "tensor" in mesh.shape else None
    local_heads = H // mesh.shape[heads] if heads else H
    rows = tuple(name for name in sharding.ROW_AXES if name in mesh.shape)
    if q_BTHK.shape[0] % int(np.prod([mesh.shape[name] for name in rows], dtype=int)):
        rows = ()

    def local(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, segments_BT: Array | None) -> Array:
        one_row = _splash_kernel(T, local_heads, tile, interpret)
        q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BTHK, v_BTHK))
        segments = None if segments_BT is None else _segment_ids(segments_BT)
        return jax.vmap(one_row)(q, k, v, segments).swapaxes(1, 2)

    if not mesh.empty and mesh.size > 1:
        spec = P(rows or None, None, heads, None)
        in_specs = (spec, spec, spec, None if segments_BT is None else P(rows or None, None))
        local = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return local(q_BTHK, k_BTHK, v_BTHK, segments_BT)[:, :tokens]


def _splash_kernel(T: int, heads: int, tile: int, interpret: bool) -> Callable[..., Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    sizes = kernels.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
    mask = kernels.MultiHeadMask([kernels.CausalMask((T, T))] * heads)
    return kernels.make_splash_mha(mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _segment_ids(segments_BT: Array) -> "SegmentIds":
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    return kernels.SegmentIds(q=segments_BT, kv=segments_BT)


def reverse_mode_only(tree: Tree) -> Tree:
    """The same arrays, which can't be differentiated in forward mode.

    For inputs of a function whose gradient is not JAX's own: forward mode fails there anyway, possibly only while
    compiling, and this error names the setting that allows it. Raises UserError.
    """

    def mark(x: object) -> object:
        return _mark.bind(x) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(mark, tree)


def _refuse(*_: object, **__: object) -> NoReturn:
    raise UserError(
        "this model's gradients have no forward mode (jvp, jacfwd, hessian); "
        'use ModelConfig(gradients="plain"), or --model.gradients plain'
    )


# Both are the identity. In reverse mode `_tangent` is only transposed; forward mode has to compute it, and refuses.
_mark, _tangent = Primitive("reverse_mode_only"), Primitive("reverse_mode_only_tangent")
for _identity in (_mark, _tangent):
    _identity.def_abstract_eval(lambda x: x)
_mark.def_impl(lambda x: x)
batching.defvectorized(_mark)
mlir.register_lowering(_mark, lambda _, x: [x])
ad.primitive_jvps[_mark] = lambda primals, tangents: (_mark.bind(*primals), _tangent.bind(*tangents))
_tangent.def_impl(_refuse)
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)
ad.deflinear2(_tangent, lambda cotangent, tangent: [cotangent])
