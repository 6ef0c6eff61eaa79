"""What JAX does without a word, one test each: the guard, and beside it what happens without one."""

import ast
import json
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.errors import KeyReuseError

from jaxgpt import decoding, losses, training
from jaxgpt.config import ModelConfig
from jaxgpt.data import pipelines
from jaxgpt.errors import UserError
from jaxgpt.models import transformer
from jaxgpt.rlhf import ppo
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.runs.run import Run
from jaxgpt.structs import Batch
from jaxgpt.training import optim
from tests.helpers import TINY, params_of, prompts_of, tokens_of
from tests.runs.test_run import Settings

ROOT = Path(__file__).parents[1]
SMALL = ModelConfig(layers=1, width=8, heads=2, block=12, vocab=24)


def test_a_token_outside_the_vocabulary_is_named_where_indexing_would_clamp():
    clamped, taken = jax.jit(lambda table, i: (table[i], jnp.take(table, i)))(np.arange(64.0), 99)
    assert float(clamped) == 63.0 and np.isnan(taken)
    with pytest.raises(UserError, match=r"token 99 at \[1, 2\] of a batch is outside the model's vocabulary of 64"):
        pipelines.check_tokens({"tokens": np.array([[1, 2, 3], [4, 5, 99]])}, 64)


def test_rows_longer_than_the_block_are_refused_where_positions_would_clamp():
    with pytest.raises(UserError, match="49 tokens don't fit the model's block of 48"):
        jax.eval_shape(lambda: transformer.hidden(params_of(), TINY, jnp.zeros((1, 49), jnp.int32)))


def test_answers_longer_than_the_block_are_refused_where_the_cache_would_be_overwritten():
    write = jax.jit(lambda at: jax.lax.dynamic_update_slice_in_dim(jnp.zeros(4), jnp.ones(1), at, axis=0))
    assert write(9).tolist() == [0, 0, 0, 1]  # written to the last slot
    tokens, lengths = prompts_of(2, 40)
    with pytest.raises(UserError, match="40 tokens and 9 new ones don't fit the model's block of 48"):
        jax.eval_shape(
            lambda: decoding.generate(params_of(), TINY, tokens, lengths, jax.random.key(0), new_tokens=9, stop=5)
        )


def test_a_batch_without_targets_is_zero_where_a_mean_would_be_nan():
    """A step on one is in the last of three batches below."""
    means = jax.jit(lambda x, mask: (jnp.mean(x, where=mask), losses.reduce(x, mask).value))
    theirs, ours = means(np.ones((2, 8), np.float32), np.zeros((2, 8), bool))
    assert np.isnan(theirs) and float(ours) == 0.0


def test_a_row_of_padding_only_is_finite():
    segments = np.zeros((2, 8), np.int32)  # rows of padding only
    hidden = jax.jit(lambda *x: transformer.hidden(params_of(SMALL), SMALL, x[0], segments_BT=x[1]))
    assert np.isfinite(hidden(tokens_of(2, 8, SMALL.vocab), segments)).all()


def test_examples_without_an_answer_are_dropped_and_counted():
    rows = [([1, 2, 3], [0, 0, 1]), ([1, 2, 3], [0, 0, 0])]
    assert pipelines.fit_rows(rows, 8) == ([rows[0]], 1)


def test_a_count_of_tokens_outgrows_int32(tmp_path):
    assert int(jnp.asarray(np.int64(2**31 + 5))) != 2**31 + 5
    with Run(tmp_path, Settings(), "sft") as run:
        run.log(1, {"tokens": 2**31 + 5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["tokens"] == 2**31 + 5
    for path in (ROOT / "experiments").glob("*.py"):
        assert "jnp.int32(0)" not in path.read_text()


def test_a_key_used_twice_is_an_error_in_every_test():
    key = jax.random.key(0)
    jax.random.normal(key)
    with pytest.raises(KeyReuseError):
        jax.random.uniform(key)


def test_a_second_step_is_not_a_second_compilation_and_leaks_nothing():
    """Nor is one on a batch without targets, whose loss is 0."""
    tx = optax.adam(1e-3)
    step = jax.jit(
        chex.assert_max_traces(training.make_train_step(training.make_nll(SMALL), tx), n=1), donate_argnums=0
    )
    state = training.init_state(jax.jit(lambda: params_of(SMALL))(), tx)
    with jax.checking_leaks():
        for seed, targets in enumerate((True, True, False)):
            mask = np.full((4, 10), targets) & (np.arange(10) > 0)
            state, metrics = step(state, Batch(tokens_of(4, 10, SMALL.vocab, seed), mask), None)
            assert (training.to_floats(metrics)["loss"] > 1) == targets
    assert training.to_floats(metrics)["loss"] == 0.0


def test_a_frozen_reference_has_buffers_of_its_own():
    """Donated under another name, an alias is deleted with the original."""
    state = training.init_state({"w": jnp.ones(3)}, optax.sgd(0.1))
    alias = state.trainable["w"]
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    with pytest.raises(RuntimeError, match="deleted"):
        alias.tolist()
    tx = optim.adam_tf(optax.constant_schedule(1e-3))
    started = ppo.init(transformer_policy(SMALL), {"w": jnp.ones(3), "b": jnp.ones(3)}, tx, {})
    ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(started.frozen["reference"])}
    assert ours.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(started.trainable["policy"]))


def test_what_is_chosen_for_the_hardware_is_chosen_for_the_mesh_in_use():
    """`jax.default_backend()` is 'cpu' while a program is lowered for a TPU that is not there; only `sharding.platform`
    asks it, where no mesh says better (tests/tpu/test_plan.py compiles for TPUs on this machine)."""
    asking = [path.name for path in (ROOT / "jaxgpt").rglob("*.py") if "default_backend()" in path.read_text("utf-8")]
    assert asking == ["sharding.py"]


def test_no_module_has_a_name_of_the_standard_library():
    """`python jaxgpt/types.py` would hide it from everything."""
    for folder in ("jaxgpt", "experiments", "tests", "tpu"):
        names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert not names & sys.stdlib_module_names, folder


def test_weights_are_never_pickles():
    for path in [path for folder in ("jaxgpt", "experiments", "tpu") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "joblib"}, path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path
