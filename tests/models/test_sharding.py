"""Every mesh of eight devices gives the same numbers as one device, with the expected collectives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import decoding, losses, training
from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.losses import kl
from jaxgpt.models import sharding, transformer
from jaxgpt.models.sharding import MeshConfig, make_mesh
from jaxgpt.rlhf import dpo, ppo, reward
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.structs import Batch, Preferences, Prompts
from tests.helpers import FAMILY

CONFIG = ModelConfig(layers=1, width=32, heads=8, block=24, vocab=64)
LLAMA = dataclasses.replace(FAMILY["llama3"], heads=8, kv_heads=4, block=24)
SGD = optax.sgd(0.1)
ROWS, LENGTH = 16, 20


def slow(*shapes):
    return [pytest.param(shape, marks=pytest.mark.slow) for shape in shapes]


def mesh_of(shape):
    return make_mesh(MeshConfig(*shape))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(0.0, 0.1, shape).astype(np.float32)


@functools.cache
def params(config=CONFIG, seed=0):
    """Random numbers everywhere, biases included; norms have scales near 1."""
    shapes = jax.tree_util.tree_leaves_with_path(training.param_shapes(config))
    leaves = [normal(seed + n, *x.shape) + (path[-1].key == "scale") for n, (path, x) in enumerate(shapes)]
    return jax.tree.unflatten(jax.tree.structure(training.param_shapes(config)), [x.astype(np.float32) for x in leaves])


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(6, CONFIG.vocab, shape).astype(np.int32)


def batch():
    return Batch(tokens(ROWS, LENGTH), np.tile(np.arange(LENGTH) > 0, (ROWS, 1)))


def preferences(prompts=8, candidates=3, length=16):
    present = np.ones((prompts, candidates), bool)
    present[0, 2] = False
    mask = np.tile(np.arange(length) >= 6, (prompts, candidates, 1))
    return Preferences(tokens(prompts, candidates, length), mask, np.arange(prompts, dtype=np.int32) % 2, present)


def start(trainable, **frozen):
    """The initial state, on the host: a compiled program shards it itself."""
    return jax.device_get(training.init_state(trainable, SGD, frozen))


def reward_model(seed):
    return {"model": params(seed=seed), "head": {"kernel_D": normal(1, CONFIG.width), "bias": np.float32(0.1)}}


GAIN = {"gain": np.float32(1.0), "bias": np.float32(0.0)}
SCANNED = dataclasses.replace(LLAMA, scan=True, remat="full")
TILED = dataclasses.replace(CONFIG, logits_bytes=4096)
STAGES = {  # loss, state, batch and options of the step
    "nll": lambda: (training.make_nll(CONFIG), start(params()), batch(), {}),
    "nll in tiles": lambda: (training.make_nll(TILED), start(params()), batch(), {}),
    "llama": lambda: (training.make_nll(LLAMA), start(params(LLAMA)), batch(), {}),
    "scanned llama": lambda: (training.make_nll(SCANNED), start(params(LLAMA)), batch(), {"microbatches": 2}),
    "reward": lambda: (reward.make_loss(CONFIG), start(reward_model(0), **GAIN), preferences(), {}),
    "dpo": lambda: (
        dpo.make_loss(transformer_policy(CONFIG, new_tokens=10), 0.1),
        start({"policy": params()}, reference=params(seed=1)),
        preferences(),
        {},
    ),
}


@functools.cache
def compiled(stage, shape=None):
    """The step on a mesh of this shape, or on one device: to run, or to inspect its text and memory use."""
    loss, state, batch, options = STAGES[stage]()
    if shape is None:
        step = jax.jit(training.make_train_step(loss, SGD, **options))
    else:
        mesh = mesh_of(shape)
        step = training.jit_step(loss, SGD, mesh, training.sharded_shapes(mesh, lambda: state), **options)
    return step.lower(state, batch, None).compile()


@functools.cache
def two_steps(stage, shape=None):
    """Parameters and metrics of two steps. The second raises unless the first leaves the state sharded as before."""
    step, (_, state, batch, _) = compiled(stage, shape), STAGES[stage]()
    for _ in range(2):
        before = state
        state, metrics = step(state, batch, None)
    if shape is not None:
        assert all(x.is_deleted() for x in jax.tree.leaves(before.trainable)), "the state was not donated"
    return jax.device_get((state.trainable, metrics))


def assert_same(found, expected, rtol=1e-5):
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        np.testing.assert_allclose(
            x, y, rtol=rtol, atol=rtol * np.abs(y).max() + 1e-7, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), *slow((4, 2, 1), (2, 1, 4), (1, 4, 2))], ids=str
)
def test_every_mesh_gives_the_step_of_one_device(shape):
    assert_same(two_steps("nll", shape), two_steps("nll"))


@pytest.mark.parametrize("shape", [(2, 2, 2), *slow((1, 4, 2))], ids=str)
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_every_stage_gives_the_step_of_one_device(stage, shape):
    assert_same(two_steps(stage, shape), two_steps(stage))


@pytest.mark.parametrize("shape", [(2, 2, 2), *slow((1, 4, 2))], ids=str)
def test_microbatches_scanned_layers_and_remat_give_the_plain_step_of_one_device(shape):
    """For a Llama. Each microbatch is sharded too."""
    assert_same(two_steps("scanned llama", shape), two_steps("llama"))


def test_parameters_and_moments_are_really_divided():
    tx = optax.adam(1e-3)
    shapes = training.sharded_shapes(mesh_of((2, 2, 2)), lambda: training.init_state(params(), tx))
    kernels = [shapes.trainable["block_0"]["up"]["kernel"], shapes.opt_state[0].mu["block_0"]["up"]["kernel"]]
    for leaf in kernels:
        assert leaf.sharding.shard_shape(leaf.shape) == (16, 64)
    table = shapes.trainable["embed"]["tokens_VD"]
    assert table.sharding.shard_shape(table.shape) == (32, 16)
    norm = shapes.trainable["final_norm"]["scale"]
    assert norm.sharding.is_fully_replicated


def test_what_is_placed_may_be_donated_and_leaves_the_original_alone():
    """Even if the original already has the same sharding."""
    tree = {"up": {"kernel": np.ones((32, 128), np.float32)}}
    shapes = training.sharded_shapes(mesh_of((2, 2, 2)), lambda: tree)
    original = sharding.place_like(tree, shapes)
    placed = sharding.place_like(original, shapes)
    assert placed["up"]["kernel"].sharding.shard_shape((32, 128)) == (16, 64)
    jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(placed)
    assert placed["up"]["kernel"].is_deleted()
    np.testing.assert_array_equal(original["up"]["kernel"], 1.0)


def test_pmap_gives_the_step_of_one_device():
    loss, state, batch, _ = STAGES["reward"]()
    step = training.pmap_step(loss, SGD)
    state = jax.tree.map(lambda x: np.broadcast_to(x, (8, *x.shape)), state)
    batch = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    for _ in range(2):
        state, metrics = step(state, batch, None)
    found = jax.device_get((state.trainable, metrics))
    for device in (0, 7):
        assert_same(jax.tree.map(lambda x, d=device: x[d], found), two_steps("reward"))


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


def loops(text):
    """The body of each loop of a compiled program."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    return [re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.M | re.S)[0] for body in bodies]


def test_data_parallelism_reduces_gradients_and_nothing_else():
    found = collectives(compiled("nll", (8, 1, 1)).as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    reduced = sum(int(np.prod(shape)) for _, shape in found)
    gradients = sum(x.size for x in jax.tree.leaves(params()))
    tied = params()["embed"]["tokens_VD"].size  # its two gradients may be reduced separately
    assert gradients <= reduced <= gradients + tied + 10  # and the sums for the loss


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_no_activation_is_gathered(shape):
    """Rows have 20 tokens, a size that no weight has, which identifies activations. Only if the vocabulary is larger
    than a device's tokens are embeddings looked up by column and sent to their rows: token ids, and an all-to-all there
    and back."""
    found = collectives(compiled("nll", shape).as_text())
    gathered = [(kind, size) for kind, size in found if kind in ("all-gather", "all-to-all", "collective-permute")]
    activations = [(kind, size) for kind, size in gathered if LENGTH in size or LENGTH - 1 in size]
    rows = ROWS // (shape[0] * shape[1])
    if shape[1] > 1 and rows * LENGTH < CONFIG.vocab:
        ids = (ROWS, LENGTH), (ROWS, LENGTH, 1)
        assert {kind for kind, size in activations if size not in ids} == {"all-to-all"}
        sent = sum(int(np.prod(size)) for kind, size in activations if kind == "all-to-all")
        assert sent == 2 * rows * LENGTH * CONFIG.width
    else:
        assert activations == []
    gathered = [size for _, size in gathered]
    weights = max(x.size for x in jax.tree.leaves(params()))
    assert all(np.prod(size) <= weights for size in gathered)
    if shape[1] > 1:
        assert gathered, "a parameter sharded along fsdp must be gathered"


@pytest.mark.parametrize("shape", [(2, 2, 2), *slow((8, 1, 1))], ids=str)
def test_logits_in_tiles_give_the_same_step_and_the_tables_gradient_is_summed_once(shape):
    """After the loop over tiles, inside which each device accumulates its own: each shard of the table gets its part,
    and only that is summed over copies of the model."""
    assert_same(two_steps("nll in tiles", shape), two_steps("nll"))
    text = compiled("nll in tiles", shape).as_text()
    table = (CONFIG.vocab // shape[2], CONFIG.width)
    in_loops = [size for loop in loops(text) for _, size in collectives(loop)]
    assert loops(text) and any(size[-2:] == table for _, size in collectives(text))
    assert [size for size in in_loops if size[-2:] == table] == []
    if shape[1] > 1:
        found, part = collectives(text), (CONFIG.vocab // shape[2], CONFIG.width // shape[1])
        assert {kind for kind, size in found if size[-2:] == part} >= {"reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_the_state_is_updated_where_it_lies(shape):
    state = STAGES["nll"]()[1]
    shapes = training.sharded_shapes(mesh_of(shape), lambda: (state.trainable, state.opt_state))
    mine = sum(4 * int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(shapes))
    assert compiled("nll", shape).memory_analysis().alias_size_in_bytes >= mine


# ---- reinforcement learning ----

PPO = PPOConfig(new_tokens=14, epochs=2, minibatches=2)


@functools.cache
def two_iterations(shape=None):
    """Parameters and metrics of two PPO iterations: sampling, reward, scoring and updates in one program."""
    head = {"kernel_D": normal(2, CONFIG.width), "bias": np.float32(0.0)}
    trainable, frozen = {"policy": params(), "value_head": head}, {"reference": params(seed=1)}
    state = start(trainable, **frozen, reward={"of_token_V": normal(3, CONFIG.vocab)})
    control, prompts = kl.FixedKL(np.float32(0.1)), Prompts(tokens(ROWS, 6), np.arange(ROWS, dtype=np.int32) % 5 + 2)

    def reward_fn(params, rows):
        return jnp.where(rows.mask_BT, params["reward"]["of_token_V"][rows.tokens_BT], 0.0).sum(1)

    bound = {"policy": ppo.policy_of(CONFIG, PPO, stop=5), "ppo": PPO, "tx": SGD, "reward_fn": reward_fn}
    if shape is None:
        program = jax.jit(functools.partial(ppo.ppo_iteration, **bound))
    else:
        mesh = mesh_of(shape)
        program = ppo.jit_iteration(mesh, training.sharded_shapes(mesh, lambda: state), **bound)
    program, metrics = program.lower(state, control, prompts, jax.random.key(0)).compile(), []
    for i in range(2):
        state, control, _, found = program(state, control, prompts, jax.random.key(i))
        metrics.append(training.to_floats(found))
    return jax.device_get(state.trainable), metrics


@pytest.mark.parametrize("shape", [(2, 2, 2), *slow((1, 4, 2))], ids=str)
def test_ppo_gives_the_iterations_of_one_device(shape):
    (trainable, metrics), (expected, expected_metrics) = two_iterations(shape), two_iterations()
    assert_same(trainable, expected)
    for found, other in zip(metrics, expected_metrics, strict=True):
        assert found["sampler_gap_max"] < 1e-5 and found["ratio_error_first"] < 2e-6  # sharded sums: another order
        noise = {"sampler_gap_max", "ratio_error_first"}
        for name in found.keys() - noise:
            assert found[name] == pytest.approx(other[name], rel=2e-5, abs=1e-5), (
                name
            )  # 2.4e-6 on a CPU without AVX-512


def forced(params, prompt_BP, length_B, tokens_BA):
    """The sampler's log-probabilities of given tokens, through its cache."""
    params = decoding.prepare(params, CONFIG)
    cache, logits_BV = decoding.prefill(params, CONFIG, prompt_BP, length_B, tokens_BA.shape[1])

    def step(carry, x):
        cache, logits_BV = carry
        t, token_B = x
        logp_B = losses.log_prob(logits_BV, token_B)
        return decoding.decode_step(params, CONFIG, cache, token_B, length_B, prompt_BP.shape[1], t), logp_B

    steps = jnp.arange(tokens_BA.shape[1]), tokens_BA.T
    return jax.lax.scan(step, (cache, logits_BV), steps)[1].T


@pytest.mark.parametrize("shape", [(2, 2, 2), *slow((8, 1, 1), (1, 1, 8))], ids=str)
def test_the_divided_sampler_believes_what_one_device_does(shape):
    mesh = mesh_of(shape)
    arguments = params(), tokens(ROWS, 6), np.arange(ROWS, dtype=np.int32) % 5 + 2, tokens(ROWS, 10, seed=4)
    places = sharding.shardings_by_path(params(), transformer.PARTITION, mesh)
    program = jax.jit(sharding.within(mesh, forced), in_shardings=(places, *[sharding.row_sharding(mesh)] * 3))
    program = program.lower(*arguments).compile()
    np.testing.assert_allclose(program(*arguments), jax.jit(forced)(*arguments), atol=1e-5)
    (loop,) = loops(program.as_text())
    assert {kind for kind, _ in collectives(loop)} <= {"all-reduce"}, "weights must be gathered before the loop"
    assert bool(collectives(loop)) == (shape[2] > 1)


# ---- errors ----


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), "mesh.data 3 x mesh.fsdp 1 x mesh.tensor 1 is not the number of devices, 8"),
        ((0, 3, 1), "mesh.fsdp 3 x mesh.tensor 1 does not divide the number of devices, 8"),
        ((0, 16, 1), "does not divide the number of devices, 8"),
        ((0, 0, 1), "fsdp is 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(UserError, match=message):
        mesh_of(shape)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"heads": 4}, (1, 1, 8), "mesh.tensor 8 doesn't divide model.heads 4"),
        ({"vocab": 68}, (1, 1, 8), "model.vocab 68"),
        ({"width": 24, "heads": 8}, (1, 1, 8), None),
        ({"width": 36, "heads": 4}, (1, 8, 1), "mesh.fsdp 8 doesn't divide model.width 36"),
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
    text = jax.jit(lambda p: decoding.prepare(p, CONFIG)).lower(params()).as_text()
    assert "sharding_constraint" not in text and "custom_call" not in text
    assert sharding.platform() == "cpu"
