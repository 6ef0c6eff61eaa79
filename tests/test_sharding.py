"""Every mesh of eight devices gives one device's numbers, by the collectives that one would expect."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import reward as reward_stage
from jaxgpt import decode, dpo, kl, losses, model, ppo, reward, sharding, train
from jaxgpt.config import ModelConfig, UserError
from jaxgpt.ppo import PPOConfig, Prompts
from jaxgpt.sharding import MeshConfig, make_mesh
from jaxgpt.structs import Batch, Preferences
from tests.helpers import FAMILY, batch_of, params_of, prompts_of

CONFIG = ModelConfig(layers=2, width=32, heads=8, block=24, vocab=64)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (2, 1, 4), (1, 4, 2)]
FEW = [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (1, 4, 2)))]
SGD = optax.sgd(0.1)


def mesh_of(shape):
    return make_mesh(MeshConfig(*shape))


def params():
    return params_of(CONFIG, scale=2.0)


def preferences(prompts=8, candidates=3):
    tokens = batch_of(prompts * candidates, 16).tokens_BT.reshape(prompts, candidates, 16)
    mask = jnp.broadcast_to(jnp.arange(16) >= 6, tokens.shape)
    present = jnp.ones((prompts, candidates), bool).at[0, 2].set(False)
    return Preferences(tokens, mask, jnp.arange(prompts) % 2, present)


def start(trainable, frozen=None):
    return train.init_state(jax.tree.map(jnp.copy, trainable), SGD, jax.tree.map(jnp.copy, frozen or {}))


LLAMA = dataclasses.replace(FAMILY["llama3"], heads=8, kv_heads=4, block=24)
STAGES = {
    "nll": (lambda: train.make_nll(CONFIG), lambda: start(params()), lambda: batch_of(16, 20)),
    "llama": (lambda: train.make_nll(LLAMA), lambda: start(params_of(LLAMA, scale=2.0)), lambda: batch_of(16, 20)),
    "reward": (
        lambda: reward_stage.make_loss(CONFIG),
        lambda: start(
            {"model": params(), "head": reward.init(jax.random.key(1), {}, CONFIG.width)["head"]},
            {"gain": jnp.ones(()), "bias": jnp.zeros(())},
        ),
        preferences,
    ),
    "dpo": (
        lambda: dpo.make_loss(CONFIG, 0.1, window=10),
        lambda: start({"policy": params()}, {"reference": params_of(CONFIG, seed=1, scale=2.0)}),
        preferences,
    ),
}


@functools.cache
def on_one_device(stage, microbatches=1):
    make_loss, make_state, make_batch = STAGES[stage]
    step = jax.jit(train.make_train_step(make_loss(), SGD, microbatches=microbatches))
    state, metrics = make_state(), None
    for _ in range(2):
        state, metrics = step(state, make_batch(), None)
    return jax.device_get((state.trainable, metrics))


def compiled(stage, mesh, **options):
    """(jitted step, the state on the mesh, the batch on the mesh)."""
    make_loss, make_state, make_batch = STAGES[stage]
    shapes = train.shapes_on(mesh, make_state)
    step = train.jit_step(make_loss(), SGD, mesh, shapes, **options)
    return step, sharding.place_like(make_state(), shapes), sharding.place_rows(make_batch(), mesh)


def assert_same(found, expected, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max() + 1e-7)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_gives_the_step_of_one_device(shape):
    assert_step_of_one_device("nll", shape)


@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("stage", ["llama", "reward", "dpo"])
def test_every_stage_gives_the_step_of_one_device(stage, shape):
    assert_step_of_one_device(stage, shape)


def assert_step_of_one_device(stage, shape):
    step, state, batch = compiled(stage, mesh_of(shape))
    for _ in range(2):
        state, metrics = step(state, batch, None)
    assert step._cache_size() == 1
    assert_same((state.trainable, metrics), on_one_device(stage))


def test_parameters_and_moments_are_really_divided():
    tx = optax.adam(1e-3)
    shapes = train.shapes_on(mesh_of((2, 2, 2)), lambda: train.init_state(params(), tx))
    kernels = [shapes.trainable["block_0"]["up"]["kernel"], shapes.opt_state[0].mu["block_0"]["up"]["kernel"]]
    for leaf in kernels:
        assert leaf.sharding.shard_shape(leaf.shape) == (16, 64)
    table = shapes.trainable["embed"]["tokens_VD"]
    assert table.sharding.shard_shape(table.shape) == (32, 16)
    norm = shapes.trainable["final_norm"]["scale"]
    assert norm.sharding.is_fully_replicated


def test_microbatches_scanned_layers_and_remat_on_a_mesh():
    """Each part of the batch is divided too."""
    config = dataclasses.replace(CONFIG, scan=True, remat="full")
    mesh = mesh_of((2, 2, 2))
    shapes = train.shapes_on(mesh, STAGES["nll"][1])
    step = train.jit_step(train.make_nll(config), SGD, mesh, shapes, microbatches=2)
    state, batch = sharding.place_like(STAGES["nll"][1](), shapes), sharding.place_rows(batch_of(16, 20), mesh)
    for _ in range(2):
        state, metrics = step(state, batch, None)
    assert_same((state.trainable, metrics), on_one_device("nll"))


@pytest.mark.parametrize("stage", [pytest.param("nll", marks=pytest.mark.slow), "dpo"])
def test_pmap_gives_the_step_of_one_device(stage):
    make_loss, make_state, make_batch = STAGES[stage]
    step = train.pmap_step(make_loss(), SGD)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), make_state())
    batch = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), make_batch())
    for _ in range(2):
        state, metrics = step(state, batch, None)
    expected = on_one_device(stage)
    for device in (0, 7):
        assert_same(jax.tree.map(lambda x, d=device: x[d], (state.trainable, metrics)), expected)


# ---- what is compiled ----


def collectives(text):
    """[(kind, shape of a result)] of a compiled program."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(int(n) for n in shape.split(",") if n)) for shape in shapes]
    return found


@functools.cache
def step_text(shape):
    step, state, batch = compiled("nll", mesh_of(shape))
    return step.lower(state, batch, None).compile()


def test_data_parallelism_reduces_gradients_and_nothing_else():
    found = collectives(step_text((8, 1, 1)).as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    reduced = sum(int(np.prod(shape)) for _, shape in found)
    gradients = sum(x.size for x in jax.tree.leaves(params()))
    tied = params()["embed"]["tokens_VD"].size  # its two gradients may be reduced apart
    assert gradients <= reduced <= gradients + tied + 10  # and the sums that make the loss


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_no_activation_is_gathered(shape):
    """Rows have 20 tokens, a size that no weight has: what has it is an activation. Only embeddings that were looked up
    by columns, where the vocabulary is larger than a device's tokens, go to their rows: token ids, and an all-to-all
    there and back."""
    found = collectives(step_text(shape).as_text())
    gathered = [(kind, size) for kind, size in found if kind in ("all-gather", "all-to-all", "collective-permute")]
    activations = [(kind, size) for kind, size in gathered if 20 in size or 19 in size]
    rows = 16 // (shape[0] * shape[1])
    if shape[1] > 1 and rows * 20 < CONFIG.vocab:
        assert {kind for kind, size in activations if size not in ((16, 20), (16, 20, 1))} == {"all-to-all"}
        sent = sum(int(np.prod(size)) for kind, size in activations if kind == "all-to-all")
        assert sent == 2 * rows * 20 * CONFIG.width
    else:
        assert activations == []
    gathered = [size for _, size in gathered]
    weights = max(x.size for x in jax.tree.leaves(params()))
    assert all(np.prod(size) <= weights for size in gathered)
    if shape[1] > 1:
        assert gathered, "a parameter that is divided along fsdp must be put together"


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_logits_in_tiles_give_the_same_step_and_the_tables_gradient_is_summed_once(shape, monkeypatch):
    """Behind the loop over tiles: within it each device adds to its own."""
    monkeypatch.setattr(model, "WHOLE_LOGITS", 4096)
    assert_step_of_one_device("nll", shape)
    step, state, batch = compiled("nll", mesh_of(shape))
    text = step.lower(state, batch, None).compile().as_text()
    bodies = re.findall(r"body=%?([\w.-]+)", text)
    table = (CONFIG.vocab // shape[2], CONFIG.width)
    in_loops = [re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.M | re.S)[0] for body in bodies]
    assert in_loops and any(size[-2:] == table for _, size in collectives(text))
    assert [size for block in in_loops for _, size in collectives(block) if size[-2:] == table] == []


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_the_state_is_donated_where_it_lies(shape):
    step, state, batch = compiled("nll", mesh_of(shape))
    mine = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.trainable, state.opt_state)))
    assert step_text(shape).memory_analysis().alias_size_in_bytes >= mine
    step(state, batch, None)
    assert state.trainable["embed"]["tokens_VD"].is_deleted()


# ---- reinforcement learning ----


def experience():
    """A rollout with everything that an update reads."""
    rows, length = 16, 20
    batch = batch_of(rows, length)
    mask = batch.mask_BT & (jnp.arange(length) >= 6)
    draw = lambda i, *shape: 0.1 * jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    return (
        Batch(batch.tokens_BT, mask),
        jnp.where(mask, draw(1, rows, length), 0.0),
        draw(2, rows) > -0.1,
        draw(3, rows),
    )


PPO = PPOConfig(new_tokens=14, epochs=2, minibatches=2)


def learn(state, rows, sampler_logp, ended, score_B):
    found, seen = ppo.score(state, CONFIG, PPO, rows, sampler_logp, ended, score_B)
    control = kl.FixedKL(jnp.float32(0.1))
    state, _, metrics = ppo.update(state, CONFIG, PPO, SGD, found, control, jax.random.key(2))
    return state.trainable, {**seen, **metrics}


@functools.cache
def learned_alone():
    state = ppo.init(params(), CONFIG, SGD, {})
    return jax.device_get(jax.jit(learn)(state, *experience()))


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_ppo_updates_are_those_of_one_device(shape):
    mesh = mesh_of(shape)
    shapes = train.shapes_on(mesh, lambda: ppo.init(params(), CONFIG, SGD, {}))
    state = sharding.place_like(ppo.init(params(), CONFIG, SGD, {}), shapes)
    found = jax.jit(sharding.within(mesh, learn))(state, *sharding.place_rows(experience(), mesh))
    (trainable, metrics), (expected, expected_metrics) = found, learned_alone()
    assert_same(trainable, expected)
    for name in ("policy_loss", "value_loss", "kl", "score", "entropy", "ratio_max"):
        one, other = (m.value if isinstance(m, losses.Mean) else m for m in (metrics[name], expected_metrics[name]))
        assert float(one) == pytest.approx(float(other), rel=2e-5, abs=1e-6), name
    assert float(metrics["ratio_error_first"]) < 2e-6  # exactly 0 on one device; divided sums have another order


def forced(params, prompt_BP, length_B, tokens_BA):
    """The sampler's log-probabilities of given tokens, through its cache."""
    params = decode.prepare(params, CONFIG)
    cache, logits_BV = decode.prefill(params, CONFIG, prompt_BP, length_B, tokens_BA.shape[1])

    def step(carry, x):
        cache, logits_BV = carry
        t, token_B = x
        logp_B = losses.log_prob(logits_BV, token_B)
        return decode.decode_step(params, CONFIG, cache, token_B, length_B, prompt_BP.shape[1], t), logp_B

    steps = jnp.arange(tokens_BA.shape[1]), tokens_BA.T
    return jax.lax.scan(step, (cache, logits_BV), steps)[1].T


@pytest.mark.parametrize("shape", [*FEW, (1, 1, 8)], ids=str)
def test_the_divided_sampler_believes_what_one_device_does(shape):
    mesh = mesh_of(shape)
    prompts = prompts_of(16, 6)
    tokens = batch_of(16, 10, seed=4).tokens_BT
    expected = jax.jit(forced)(params(), *prompts, tokens)
    places = sharding.by_path(params(), train.model.PARTITION, mesh)
    program = jax.jit(sharding.within(mesh, forced))
    arguments = sharding.place(params(), places), *sharding.place_rows((*prompts, tokens), mesh)
    np.testing.assert_allclose(program(*arguments), expected, atol=1e-5)
    text = program.lower(*arguments).compile().as_text()
    (body,) = set(re.findall(r"body=(%[\w.\-]+)", text))
    (loop,) = re.findall(rf"^{re.escape(body)} .*?^}}", text, flags=re.M | re.S)
    assert {kind for kind, _ in collectives(loop)} <= {"all-reduce"}, "weights are put together before the loop"
    assert bool(collectives(loop)) == (shape[2] > 1)


@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_a_whole_iteration_runs_divided(shape):
    """Sampling, reward, scoring and updates in one program: finite figures, and no second trace."""
    mesh = mesh_of(shape)

    def make():
        return ppo.init(params(), CONFIG, SGD, {"reward": reward.init(jax.random.key(9), params(), CONFIG.width)})

    shapes = train.shapes_on(mesh, make)
    places = jax.tree.map(lambda x: x.sharding, shapes)
    one = functools.partial(
        ppo.ppo_iteration, config=CONFIG, ppo=PPO, tx=SGD, stop=5,
        reward_fn=lambda params, rows: reward.score(params["reward"], CONFIG, rows),
    )  # fmt: skip
    everywhere = sharding.replicated(mesh)
    program = jax.jit(sharding.within(mesh, one), donate_argnums=0, out_shardings=(places, everywhere, everywhere))
    state = sharding.place_like(make(), shapes)
    control = sharding.replicate(kl.FixedKL(jnp.float32(0.1)), mesh)
    prompts = sharding.place_rows(Prompts(*prompts_of(16, 6)), mesh)
    for i in range(2):
        state, control, metrics = program(state, control, prompts, jax.random.key(i))
        floats = train.to_floats(metrics)
        assert all(np.isfinite(value) for value in floats.values())
        assert floats["sampler_gap_max"] < 1e-5 and floats["ratio_error_first"] < 2e-6
    assert program._cache_size() == 1


# ---- what is refused ----


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), "data 3 x fsdp 1 x tensor 1 doesn't fit 8 devices"),
        ((0, 3, 1), "data any x fsdp 3 x tensor 1 doesn't fit 8 devices"),
        ((0, 16, 1), "doesn't fit 8 devices"),
        ((0, 0, 1), "mesh.fsdp is 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(UserError, match=message):
        mesh_of(shape)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"heads": 4}, (1, 1, 8), "mesh.tensor of 8 doesn't divide the model's heads of 4"),
        ({"vocab": 68}, (1, 1, 8), "vocab of 68"),
        ({"width": 24, "heads": 8}, (1, 1, 8), None),
        ({"width": 36, "heads": 4}, (1, 8, 1), "mesh.fsdp of 8 doesn't divide the model's width of 36"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(change, shape, message):
    config = dataclasses.replace(CONFIG, **change)
    if message is None:
        sharding.check_model(config, mesh_of(shape))
    else:
        with pytest.raises(UserError, match=message):
            sharding.check_model(config, mesh_of(shape))


def test_outside_a_mesh_nothing_is_asked_for():
    text = jax.jit(lambda p: decode.prepare(p, CONFIG)).lower(params()).as_text()
    assert "sharding_constraint" not in text and "custom_call" not in text
    assert sharding.platform() == "cpu"
