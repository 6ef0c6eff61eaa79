"""The planner: its counts for compiled and traced programs, against programs with known collectives and products; and,
where the TPU compiler is installed, the experiments' steps compiled for slices."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig
from tpu import compiling, estimates, hardware, hlo, plan, roofline
from tpu.settings import PRESETS, Settings

TPU_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed (make EXTRAS=tpu set-up)"
)


# ---- collectives ----


def text_of(f, mesh, *arguments):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arguments]
    return jax.jit(f).lower(*shapes).compile().as_text()


def test_collectives_of_compiled_programs():
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
    whole = NamedSharding(mesh, P())

    def gather(x):
        return jax.lax.with_sharding_constraint(2 * x, whole)

    (one,), unknown = hlo.collectives(text_of(gather, mesh, ((16, 6), P("data"))), 8)
    assert not unknown and (one.kind, one.size, one.group, one.times) == ("all-gather", 16 * 6 * 4, 4, 1)
    assert one.sent == 16 * 6 * 4 * 3 / 4

    def reduce(x, w):
        return jax.lax.with_sharding_constraint(x @ w, whole)

    mesh = sharding.make_mesh(MeshConfig(data=8))
    whole = NamedSharding(mesh, P())
    (one,), _ = hlo.collectives(text_of(reduce, mesh, ((6, 16), P(None, "data")), ((16, 10), P("data"))), 8)
    assert (one.kind, one.size, one.group) == ("all-reduce", 6 * 10 * 4, 8)
    assert one.sent == 2 * one.size * 7 / 8


def test_what_loops_send_counts_as_often_as_they_run():
    mesh = sharding.make_mesh(MeshConfig(data=8))

    def loop(x, w):
        def one(x, _):
            partial = jax.lax.with_sharding_constraint(jnp.tanh(x) @ w, NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(partial, NamedSharding(mesh, P(None, "data"))), None

        return jax.lax.scan(one, x, None, length=5)[0]

    found, unknown = hlo.collectives(text_of(loop, mesh, ((4, 16), P(None, "data")), ((16, 16), P("data"))), 8)
    assert not unknown and [(one.kind, one.times) for one in found] == [("all-reduce", 5)]

    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: loop(x, w), x)

    found, unknown = hlo.collectives(text_of(until, mesh, ((4, 16), P(None, "data")), ((16, 16), P("data"))), 8)
    assert unknown, "its length is not known when it is compiled"


def test_collectives_are_read_from_the_text_of_a_tpus_program():
    text = """\
HloModule jit_step, is_scheduled=true

%piece.1 (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
}

%piece.2 (p.1: bf16[2,8]) -> bf16[8,8] {
  %p.1 = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
}

%body (s: (f32[4], u32[], u32[])) -> (f32[4], u32[], u32[]) {
  %s = (f32[4]{0:T(128)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %x = f32[4]{0:T(128)} get-tuple-element(%s), index=0
  %i = u32[]{:T(128)} get-tuple-element(%s), index=1
  %by = u32[]{:T(128)} get-tuple-element(%s), index=2
  %collective-permute-start = (f32[4]{0:T(128)}, f32[4]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done = f32[4]{0:T(128)} collective-permute-done(%collective-permute-start)
  %next = u32[]{:T(128)} add(%i, %by), metadata={op_name="add"}
  ROOT %t = (f32[4]{0:T(128)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%collective-permute-done, %next, %by)
}

%condition (s.1: (f32[4], u32[], u32[])) -> pred[] {
  %s.1 = (f32[4]{0:T(128)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%s.1), index=1
  %limit = u32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT, metadata={op_name="lt"}
}

ENTRY %main.1 (a: bf16[2,8], b: f32[4]) -> f32[4] {
  %a = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[4]{0:T(128)} parameter(1)
  %f.1 = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%piece.1
  %f.2 = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%piece.2
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2)
  %start = (f32[4]{0:T(128)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%b, %one, %two)
  %while.1 = (f32[4]{0:T(128)}, u32[]{:T(128)}, u32[]{:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %r = f32[4]{0:T(128)} get-tuple-element(%while.1), index=0
}
"""  # noqa: E501
    found, unknown = hlo.collectives(text, 8)
    assert not unknown
    by_kind = {one.kind: one for one in found}
    assert len(found) == 2  # the two pieces of the all-gather share a channel
    assert (by_kind["all-gather"].size, by_kind["all-gather"].group) == (128, 4)
    assert (by_kind["collective-permute"].size, by_kind["collective-permute"].times) == (16, 4)  # 1, 3, 5, 7
    assert by_kind["collective-permute"].sent == 16 * 4


def test_an_all_reduce_whose_result_is_cut_into_shards_sends_what_a_reduce_scatter_sends():
    text = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,8], i: u32[]) -> f32[8,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = u32[] parameter(1)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %cut = f32[8,8]{1,0} dynamic-slice(%all-reduce.1, %i, %i), dynamic_slice_sizes={8,8}
}

ENTRY %main (x: f32[64,8], n: u32[]) -> f32[8,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %n = u32[] parameter(1)
  ROOT %r = f32[8,8]{1,0} fusion(%x, %n), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,), _ = hlo.collectives(text, 8)
    assert (one.kind, one.size, one.sent) == ("reduce-scatter", 8 * 8 * 4, 7 * 8 * 8 * 4)


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", [0, 2]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", [0, 1, 2, 3]),
        ("mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
    ],
)
def test_the_devices_of_a_group_are_read(groups, first):
    assert hlo.first_group(f"%x), channel_id=1, replica_groups={groups}, dimensions={{0}}", 8) == first


def test_the_devices_of_a_slice_combine_their_shares_before_anything_leaves_it():
    """8 devices in 2 slices: an all-reduce crosses with an eighth of ring traffic on a quarter of the array."""
    one = hlo.Collective("all-reduce", 800.0, group=8, times=3, parts=2)
    assert one.sent == 3 * 2 * 7 / 8 * 800 and one.across == 3 * 2 * 1 / 2 * (800 / 4)
    assert dataclasses.replace(one, parts=1).across == 0
    gathered = dataclasses.replace(one, kind="all-gather", times=1)
    assert gathered.across == 1 / 2 * 200


# ---- what parts of a program cost ----


def test_the_cost_of_a_compiled_program_is_that_of_its_products_and_arrays():
    """Products in a loop, on a CPU: the FLOPs are exact, and at least the arrays in and out are moved."""

    def f(x, w):
        with jax.named_scope("mlp"):
            x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        with jax.named_scope("head"):
            return x @ w[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (5, 128, 128))]
    found = roofline.costs(hlo.Program(jax.jit(f).lower(*shapes).compile().as_text()))
    one = 2 * 64 * 128 * 128
    assert sum(x.flops * x.times for x in found) == 6 * one
    rows = {row.name: row for row in roofline.by_scope(found, hardware.CHIPS["v5e"], launch=0.0)}
    assert rows["mlp"].flops == 5 * one and rows["head"].flops == one
    least = 4 * 5 * (128 * 128 + 2 * 64 * 128)
    assert least <= rows["mlp"].bytes < 4 * least


def test_products_lookups_and_updates_of_a_gpus_program_are_counted():
    """cuBLAS and cuDNN by their shapes, a lookup by what it reads, an update in place by what it writes."""
    text = """\
%lookup (p.1: f32[1000,8], i.1: s32[4]) -> f32[4,8] {
  %p.1 = f32[1000,8]{1,0} parameter(0)
  %i.1 = s32[4]{0} parameter(1)
  ROOT %g = f32[4,8]{1,0} gather(%p.1, %i.1), offset_dims={1}
}

%update (c: bf16[100,8], u: bf16[1,8], j: s32[]) -> bf16[100,8] {
  %c = bf16[100,8]{1,0} parameter(0)
  %u = bf16[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %d = bf16[100,8]{1,0} dynamic-update-slice(%c, %u, %j, %j)
}

ENTRY %main (t: f32[1000,8], i: s32[4], a: bf16[16,32], b: bf16[32,64], q: bf16[2,10,4,8], cache: bf16[100,8], new: bf16[1,8], at: s32[]) -> f32[4,8] {
  %t = f32[1000,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %a = bf16[16,32]{1,0} parameter(2)
  %b = bf16[32,64]{1,0} parameter(3)
  %q = bf16[2,10,4,8]{3,2,1,0} parameter(4)
  %cache = bf16[100,8]{1,0} parameter(5)
  %new = bf16[1,8]{1,0} parameter(6)
  %at = s32[] parameter(7)
  %gemm = (bf16[16,64]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %mixed = (bf16[2,4,10,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %written = bf16[100,8]{1,0} fusion(%cache, %new, %at), kind=kLoop, calls=%update
  ROOT %r = f32[4,8]{1,0} fusion(%t, %i), kind=kLoop, calls=%lookup
}
"""  # noqa: E501
    found = {cost.name: cost for cost in roofline.costs(hlo.Program(text))}
    assert found["gemm"].flops == 2 * 16 * 64 * 32 and found["gemm"].bytes == 2 * (16 * 32 + 32 * 64 + 16 * 64)
    assert found["mixed"].flops == 4 * 2 * 4 * 10 * 10 * 8
    assert found["r"].bytes == 4 * 4 + 2 * 4 * 4 * 8  # the indices, and 4 rows read and written
    assert found["written"].bytes == 4 + 2 * (2 * 8)  # the index, and one row read and written


def test_arrays_that_a_tpu_keeps_on_the_chip_move_nothing():
    assert hlo.memory_bytes("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == [0]
    assert hlo.memory_bytes("(f32[4]{0:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, s32[3])") == [16, 0, 12]


def test_a_loop_that_stacks_its_results_writes_one_slice_at_a_time():
    text = """\
%stack (a: f32[9,64], b: f32[9,64], n: s32[], x: f32[64]) -> (f32[9,64], f32[9,64]) {
  %a = f32[9,64]{1,0} parameter(0)
  %b = f32[9,64]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %x = f32[64]{0} parameter(3)
  %row = f32[1,64]{1,0} bitcast(%x)
  %one = f32[9,64]{1,0} dynamic-update-slice(%a, %row, %n, %n)
  %two = f32[9,64]{1,0} dynamic-update-slice(%b, %row, %n, %n)
  ROOT %both = (f32[9,64]{1,0}, f32[9,64]{1,0}) tuple(%one, %two)
}

ENTRY %main (a.1: f32[9,64], b.1: f32[9,64], n.1: s32[], x.1: f32[64]) -> (f32[9,64], f32[9,64]) {
  %a.1 = f32[9,64]{1,0} parameter(0)
  %b.1 = f32[9,64]{1,0} parameter(1)
  %n.1 = s32[] parameter(2)
  %x.1 = f32[64]{0} parameter(3)
  ROOT %r = (f32[9,64]{1,0}, f32[9,64]{1,0}) fusion(%a.1, %b.1, %n.1, %x.1), kind=kLoop, calls=%stack
}
"""
    (one,) = roofline.costs(hlo.Program(text))
    assert one.bytes == 4 + 64 * 4 + 2 * 64 * 4  # the index, the row, and the row written twice


def test_what_a_gpu_fuses_with_a_loops_stacks_is_counted_by_the_slice():
    """An update that runs beside others, and a product that reads a layer's weights where they lie."""
    text = """\
%stack (a: f32[9,64], n: s32[], x: f32[1,64]) -> f32[9,64] {
  %a = f32[9,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = f32[1,64]{1,0} parameter(2)
  ROOT %one = f32[9,64]{1,0} dynamic-update-slice(%a, %x, %n, %n)
}

%product (w: bf16[9,32,64], n.1: s32[], y: bf16[16,32]) -> (bf16[16,64], s8[33554432]) {
  %w = bf16[9,32,64]{2,1,0} parameter(0)
  %n.1 = s32[] parameter(1)
  %y = bf16[16,32]{1,0} parameter(2)
  %layer = bf16[1,32,64]{2,1,0} dynamic-slice(%w, %n.1, %n.1, %n.1), dynamic_slice_sizes={1,32,64}
  %weights = bf16[32,64]{1,0} bitcast(%layer)
  ROOT %gemm = (bf16[16,64]{1,0}, s8[33554432]{0}) custom-call(%y, %weights), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}

ENTRY %main (a.1: f32[9,64], n.2: s32[], x.1: f32[1,64], w.1: bf16[9,32,64], y.1: bf16[16,32]) -> f32[9,64] {
  %a.1 = f32[9,64]{1,0} parameter(0)
  %n.2 = s32[] parameter(1)
  %x.1 = f32[1,64]{1,0} parameter(2)
  %w.1 = bf16[9,32,64]{2,1,0} parameter(3)
  %y.1 = bf16[16,32]{1,0} parameter(4)
  %fusion-start = ((f32[9,64]{1,0}, s32[], f32[1,64]{1,0}), f32[9,64]{1,0}, u32[]) fusion-start(%a.1, %n.2, %x.1), kind=kLoop, calls=%stack
  %multiplied = (bf16[16,64]{1,0}, s8[33554432]{0}) fusion(%w.1, %n.2, %y.1), kind=kCustom, calls=%product
  ROOT %fusion-done = f32[9,64]{1,0} fusion-done(%fusion-start)
}
"""  # noqa: E501
    found = {cost.name: cost for cost in roofline.costs(hlo.Program(text))}
    assert found.keys() == {"fusion-start", "multiplied"}
    assert found["fusion-start"].bytes == 4 + 2 * 64 * 4  # the index, the row read and written
    assert found["multiplied"].bytes == 4 + 2 * (16 * 32 + 32 * 64 + 16 * 64)
    assert found["multiplied"].flops == 2 * 16 * 32 * 64


def test_weights_that_a_tpus_fusion_only_reshapes_are_read_by_the_product():
    text = """\
%reshape (p: bf16[64,32]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %same = bf16[64,32]{1,0} bitcast(%p)
  ROOT %b = bf16[64,32]{1,0} bitcast(%same)
}

%layer (x: bf16[16,64], w: bf16[64,32]) -> bf16[16,32] {
  %x = bf16[16,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} parameter(1)
  %weights = bf16[64,32]{1,0} fusion(%w), kind=kLoop, calls=%reshape
  ROOT %y = bf16[16,32]{1,0} convolution(%x, %weights), dim_labels=bf_io->bf
}

ENTRY %main (x.1: bf16[16,64], w.1: bf16[64,32]) -> bf16[16,32] {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  %w.1 = bf16[64,32]{1,0} parameter(1)
  ROOT %r = bf16[16,32]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%layer
}
"""
    (one,) = roofline.costs(hlo.Program(text))
    assert one.bytes == 2 * (16 * 64 + 64 * 32 + 16 * 32)


def test_a_collective_that_runs_beside_a_fusion_is_the_networks_time():
    """A TPU's compiler hands the arrays of a collective on its way through fusions that it overlaps with."""
    text = """\
%overlapped (x: bf16[16,64], w: bf16[64,32], part: bf16[50,48], whole: bf16[50,96]) -> (bf16[16,32], bf16[50,96], bf16[50,96]) {
  %x = bf16[16,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} parameter(1)
  %part = bf16[50,48]{1,0} parameter(2)
  %whole = bf16[50,96]{1,0} parameter(3)
  %all-gather = bf16[50,96]{1,0} all-gather(%part), channel_id=13, replica_groups=[1,2]<=[2], dimensions={1}
  %y = bf16[16,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (bf16[16,32]{1,0}, bf16[50,96]{1,0}, bf16[50,96]{1,0}) tuple(%y, %whole, %all-gather)
}

ENTRY %main (x.1: bf16[16,64], w.1: bf16[64,32], part.1: bf16[50,48], whole.1: bf16[50,96]) -> (bf16[16,32], bf16[50,96], bf16[50,96]) {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  %w.1 = bf16[64,32]{1,0} parameter(1)
  %part.1 = bf16[50,48]{1,0} parameter(2)
  %whole.1 = bf16[50,96]{1,0} parameter(3)
  ROOT %r = (bf16[16,32]{1,0}, bf16[50,96]{1,0}, bf16[50,96]{1,0}) fusion(%x.1, %w.1, %part.1, %whole.1), kind=kOutput, calls=%overlapped
}
"""  # noqa: E501
    (one,) = roofline.costs(hlo.Program(text))
    assert one.bytes == 2 * (16 * 64 + 64 * 32 + 16 * 32)


@pytest.mark.parametrize(
    ("shapes", "window", "flops"),
    [  # how a TPU's compiler writes products of activations [16, 512, 128] and weights [128, 384], and one of two heads
        ("[8192,128]{1,0} [128,384]{1,0} [8192,384]{1,0}", "dim_labels=bf_io->bf", 2 * 8192 * 128 * 384),
        (
            "[128,384,1]{0,1,2} [16,512,128]{1,2,0} [16,512,384]{1,2,0}",
            "window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=fb0_0oi->0fb",
            2 * 8192 * 128 * 384,
        ),
        (
            "[16,128,512]{2,1,0} [16,512,384]{2,1,0} [384,128,1]{2,1,0}",
            "window={size=16}, dim_labels=0bf_0io->fb0",
            2 * 8192 * 128 * 384,
        ),
        (
            "[2,16,64]{2,1,0} [2,64,32]{2,1,0} [2,16,32]{2,1,0}",
            "window={size=2 stride=1 pad=1_1 lhs_dilate=2 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            2 * 2 * 16 * 64 * 32,
        ),
    ],
)
def test_a_tpus_products_multiply_no_padding(shapes, window, flops):
    left, right, out = shapes.split()
    text = f"""\
ENTRY %main (x: bf16{left}, w: bf16{right}) -> bf16{out} {{
  %x = bf16{left} parameter(0)
  %w = bf16{right} parameter(1)
  ROOT %y = bf16{out} convolution(%x, %w), {window}
}}
"""
    (one,) = roofline.costs(hlo.Program(text))
    assert one.flops == flops


# ---- FLOPs ----


def test_products_are_counted_through_loops_gradients_and_recomputation():
    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    one = 2 * 8 * 16 * 16

    def layers(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0].sum()

    def count(f):
        return hlo.product_flops(jax.make_jaxpr(f)(x, w))

    assert count(layers) == (3 * one, True)
    assert count(jax.grad(layers, (0, 1))) == (9 * one, True)
    again = jax.grad(lambda x, w: jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x).sum(), (0, 1))
    assert count(again)[0] in (7 * one, 8 * one)  # the last product need not be computed again
    assert count(lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x)) == (one, False)
    assert count(lambda x, w: jax.lax.cond(x[0, 0] < 1, lambda: x @ w, lambda: x)) == (one, True)


@pytest.mark.parametrize("scan", [False, True])
def test_a_training_step_multiplies_what_the_closed_form_says(scan):
    config = ModelConfig(layers=2, width=64, heads=4, block=32, vocab=256, scan=scan)
    settings = dataclasses.replace(PRESETS["toy"], model=config, batch=8)
    built = compiling.build(settings, "train", sharding.make_mesh())
    flops, exact = hlo.product_flops(built.step.trace(*built.arguments).jaxpr)
    # 6 N also counts norms and biases, which are not products, and each row's last position, which predicts nothing
    assert exact and 0.93 < flops / estimates.closed_form_flops(settings, "train") <= 1.0


# ---- the vocabulary head's tiles ----


@pytest.mark.parametrize(("step", "positions"), [("train", 40), ("ppo", 24)])
@pytest.mark.parametrize("most", [1, 4, 7, 100])  # positions in a tile
def test_the_heads_tiles_are_those_of_the_program(step, positions, most):
    config = ModelConfig(
        layers=1, width=16, heads=2, block=41, vocab=64, platform="tpu", logits_bytes=4 * 6 * 64 * most
    )
    ppo = dataclasses.replace(PRESETS["toy"].ppo, new_tokens=24)
    settings = dataclasses.replace(PRESETS["toy"], model=config, batch=6, prompts=6, ppo=ppo)
    tiles = estimates.head_tiles(settings, step, MeshConfig(1), config.logits_bytes)
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    hidden = jax.ShapeDtypeStruct((6, positions, 16), jnp.float32)
    tokens = jax.ShapeDtypeStruct((6, positions), jnp.int32)
    text = str(jax.make_jaxpr(lambda p, h, t: transformer.predict(p, config, h, t))(params, hidden, tokens))
    assert {int(n) for n in re.findall(r"\blength=(\d+)", text)} == {tiles.count}
    assert f"f32[1,6,{tiles.length},64]" in text and tiles.bytes == 4 * 6 * 64 * tiles.length
    assert estimates.head_tiles(settings, step, MeshConfig(1), tiles.bytes) == tiles  # the setting that gives them


def test_the_proposed_tiles_are_the_smallest_that_cost_little_and_fit():
    """Against all lengths of a tile, for steps with little and much memory left, short and long."""
    settings = dataclasses.replace(PRESETS["gpt2"], topology="h100:1", batch=32)
    mesh, capacity = MeshConfig(1), 60 * 2**30
    now = estimates.head_tiles(settings, "train", mesh, settings.model.logits_bytes)
    position = now.bytes // now.length
    every = {estimates.head_tiles(settings, "train", mesh, position * n) for n in range(now.length, 1024)}
    counts = set()
    for left in (0, 5 * now.bytes, 12 * now.bytes, capacity / 2):  # bytes
        for seconds in (1e-6, 0.05, 0.5, 10.0):
            memory = {"temporary": 0.95 * capacity - left}
            parts = [{"name": "mlp", "seconds": seconds, "bytes": 0}]
            found = {"memory": memory, "parts": parts, "flops": 1.0, "collectives": {}}
            best = estimates.propose_tiles(settings, "train", mesh, found, capacity)
            fit = {tiles for tiles in every if estimates.TILES_ALIVE * (tiles.bytes - now.bytes) <= left} | {now}
            least = min(tiles.seconds for tiles in fit)
            assert best in fit and best.seconds <= least + 0.01 * seconds
            assert not [x for x in fit if x.bytes < best.bytes and x.seconds <= least + 0.01 * seconds]
            counts.add(best.count)
    assert {1, now.count} < counts  # no tiles where it pays, the present ones where it does not, and some between


# ---- errors, and the choice of meshes ----


def test_the_compilers_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (670.62G) exceeds available HBM (15.75G). HLO module: jit__lambda."
    )
    assert compiling.refusal(message) == (pytest.approx(670.62 * 2**30), 15.75 * 2**30)
    assert compiling.refusal("something else") is None


def test_meshes_divide_everything_and_come_in_order():
    settings = PRESETS["toy"]
    for step in ("train", "dpo", "ppo", "decode"):
        found = estimates.candidates(settings, step, 16, 16 * 2**30)
        assert found and len(set(found)) == len(found)
        for mesh in found:
            assert mesh.data * mesh.fsdp * mesh.tensor == 16
            assert settings.model.heads % mesh.tensor == 0 and settings.batch % (mesh.data * mesh.fsdp) == 0
    times = [
        estimates.estimate_mesh(settings, "train", mesh)[1]
        for mesh in estimates.candidates(settings, "train", 16, 1e12)
    ]
    assert times == sorted(times)
    # a model that does not fit on one device is sharded
    large = dataclasses.replace(PRESETS["gpt2-xl"], batch=256)
    assert estimates.candidates(large, "train", 64, 16 * 2**30)[0].fsdp > 1
    asked = dataclasses.replace(settings, mesh=MeshConfig(data=0, fsdp=4))
    assert estimates.candidates(asked, "train", 16, 1e12) == [MeshConfig(4, 4, 1)]
    with pytest.raises(UserError, match="no mesh of 7 devices"):
        estimates.candidates(settings, "train", 7, 1e12)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"topology": "v5e-16"}, "v5e:4x4"), ({"topology": "v9:2x2"}, "generation"), ({"tries": 0}, "tries")],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(UserError, match=says):
        Settings(**change)


@pytest.mark.parametrize(
    "name", ["v5e:3x5", "v5e:4x4x4", "v5e:32x32", "v5p:3x3x3", "v5p:4x4", "v4:32x32x32", "v6e:4x12"]
)
def test_slices_that_cannot_be_had_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"there is no slice {name}; {name.split(':')[0]} has 1x1|2x2x1"):
        hardware.parse(name)


@pytest.mark.parametrize("name", ["h100:9", "h100:8x0", "h100:2x2x2", "2*h100:8", "h100:0"])
def test_machines_of_gpus_that_do_not_exist_are_refused_by_name(name):
    with pytest.raises(UserError, match="there is no machine"):
        hardware.parse(name)


def test_topologies_are_read():
    named = {"v5e:16x16": 256, "v5p:2x2x1": 4, "v5p:8x8x12": 768, "tpu7x:4x4x4": 128, "2*v6e:8x16": 256, "h100:8x4": 32}
    assert {name: hardware.parse(name).count for name in named} == named
    assert [hardware.parse(name).parts for name in ("v5e:4x4", "2*v5e:4x4", "h100:8", "h100:8x4")] == [1, 2, 1, 4]


def test_a_crash_of_the_compiler_is_reported(tmp_path, monkeypatch):
    cases = (("kill -SEGV $$", "crashed"), ("exec sleep 9", "within 0.2 s"), ("echo boom >&2; exit 3", "boom"))
    for text, says in cases:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{text}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        patience = 0.2 if "sleep" in text else 60
        assert says in compiling.run_in_child({}, patience)["failed"]


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="EXTRAS=tpu"):
        plan.main(PRESETS["toy"])


# ---- with the real compiler ----


@TPU_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh"), [("v5e:4x4", (2, 4, 2)), ("v5p:2x2x2", (1, 4, 2)), ("v6e:2x4", (8, 1, 1))]
)
def test_the_experiments_steps_compile_for_a_slice(topology, mesh, tmp_path):
    file = tmp_path / "plan.json"
    words = [f"--mesh.{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    command = [sys.executable, "-m", "tpu.plan", "--topology", topology, "--preset", "toy", *words, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads(file.read_text())["steps"]
    config, parts = PRESETS["toy"].model, mesh[1] * mesh[2]
    for name, step in steps.items():
        (found,) = step["meshes"]
        assert found["fits"] and found["flops_exact"] and not found["unknown_loops"], (name, found)
        memory = found["memory"]
        weights = 4 * (config.parameters + config.block * config.width * (config.positions == "learned"))
        assert weights / parts <= memory["parameters"] <= 1.2 * weights / parts + 1e5  # biases: replicated
        assert memory["temporary"] > 0 and found["collectives"]
        if name != "decode":
            assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.02)
            assert found["aliased"] >= 0.95 * (memory["parameters"] + memory["optimizer"])  # the state is donated
    (train,) = steps["train"]["meshes"]
    assert train["attention"] == ["splash"]
    if mesh[1] > 1:  # weights are gathered, activations are not: one group's would be larger than any weight
        gathered, table = train["collectives"]["all-gather"], 2 * config.vocab * config.width
        assert gathered["largest"] <= table / mesh[2] < 2 * 64 / mesh[0] * config.block * config.width
        # Every matrix's gradient is added up in parts, some in a ring beside the product that makes it.
        kinds = ("reduce-scatter", "collective-permute")
        scattered = sum(train["collectives"].get(kind, {"sent": 0})["sent"] for kind in kinds)
        assert scattered >= 0.95 * 2 * config.parameters * (mesh[1] - 1) / parts
    assert "estimate" in done.stdout and "best" not in done.stdout.split("decode")[0]


@TPU_COMPILER
@pytest.mark.slow
def test_what_does_not_fit_is_said_with_its_size(tmp_path):
    command = [sys.executable, "-m", "tpu.plan", "--topology", "v5e:2x2", "--preset", "toy", "--steps", "train"]
    done = subprocess.run([*command, "--batch", "65536"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "does not fit: needs" in done.stdout and "none of these fits" in done.stdout


@TPU_COMPILER
@pytest.mark.slow
def test_a_slice_that_does_not_exist_is_refused():
    command = [sys.executable, "-m", "tpu.plan", "--topology", "v5e:3x3", "--preset", "toy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no slice v5e:3x3" in done.stderr
