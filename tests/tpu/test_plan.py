"""The planner: its counts for compiled and traced programs, against programs with known collectives and products; and,
where the TPU compiler is installed, the experiments' steps compiled for slices."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.models import sharding
from jaxgpt.models.sharding import MeshConfig
from tpu import hlo, plan

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


def test_the_forms_in_which_a_tpus_program_says_it():
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
    settings = dataclasses.replace(plan.PRESETS["toy"], model=config, batch=8)
    built = plan.build(settings, "train", sharding.make_mesh())
    flops, exact = hlo.product_flops(built.step.trace(*built.arguments).jaxpr)
    # 6 N also counts norms and biases, which are not products, and each row's last position, which predicts nothing
    assert exact and 0.93 < flops / plan.closed_form_flops(settings, "train") <= 1.0


# ---- errors, and the choice of meshes ----


def test_the_compilers_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (670.62G) exceeds available HBM (15.75G). HLO module: jit__lambda."
    )
    assert plan.refusal(message) == (pytest.approx(670.62 * 2**30), 15.75 * 2**30)
    assert plan.refusal("something else") is None


def test_meshes_divide_everything_and_come_in_order():
    settings = plan.PRESETS["toy"]
    for step in ("train", "ppo", "decode"):
        found = plan.candidates(settings, step, 16, 16 * 2**30)
        assert found and len(set(found)) == len(found)
        for mesh in found:
            assert mesh.data * mesh.fsdp * mesh.tensor == 16
            assert settings.model.heads % mesh.tensor == 0 and settings.batch % (mesh.data * mesh.fsdp) == 0
    times = [plan.estimate_mesh(settings, "train", mesh)[1] for mesh in plan.candidates(settings, "train", 16, 1e12)]
    assert times == sorted(times)
    # a model that does not fit on one device is sharded
    large = dataclasses.replace(plan.PRESETS["gpt2-xl"], batch=256)
    assert plan.candidates(large, "train", 64, 16 * 2**30)[0].fsdp > 1
    asked = dataclasses.replace(settings, mesh=MeshConfig(data=0, fsdp=4))
    assert plan.candidates(asked, "train", 16, 1e12) == [MeshConfig(4, 4, 1)]
    with pytest.raises(UserError, match="no mesh of 7 devices"):
        plan.candidates(settings, "train", 7, 1e12)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"topology": "v5e-16"}, "v5e:4x4"), ({"topology": "v9:2x2"}, "generation"), ({"tries": 0}, "tries")],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(UserError, match=says):
        plan.Settings(**change)


def test_a_crash_of_the_compiler_is_reported(tmp_path, monkeypatch):
    cases = (("kill -SEGV $$", "crashed"), ("exec sleep 9", "within 0.2 s"), ("echo boom >&2; exit 3", "boom"))
    for text, says in cases:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{text}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        patience = 0.2 if "sleep" in text else 60
        assert says in plan.run_in_child({}, patience)["failed"]


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="EXTRAS=tpu"):
        plan.main(plan.PRESETS["toy"])


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
    config, parts = plan.PRESETS["toy"].model, mesh[1] * mesh[2]
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
    assert steps["train"]["meshes"][0]["kernels"] == ["splash_mha"]
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
