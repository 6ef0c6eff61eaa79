"""What JAX does without a word, one test each: the guard, and beside it what happens without one."""

import ast
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.errors import KeyReuseError

from jaxgpt import decode, losses, model, optim, ppo, train
from jaxgpt.checkpoint import load_model
from jaxgpt.config import UserError
from jaxgpt.data import pipelines
from jaxgpt.run import Run
from jaxgpt.structs import Batch
from tests.helpers import TINY, batch_of, params_of, prompts_of
from tests.test_run import Settings

ROOT = Path(__file__).parents[1]


def test_a_token_outside_the_vocabulary_is_named_where_indexing_would_clamp():
    table = jnp.arange(64.0)
    assert float(table[jnp.int32(99)]) == 63.0 and np.isnan(jnp.take(table, 99))
    with pytest.raises(UserError, match=r"token 99 at \[1, 2\] of a batch is outside the model's vocabulary of 64"):
        pipelines.check_tokens({"tokens": np.array([[1, 2, 3], [4, 5, 99]])}, 64)


def test_rows_longer_than_the_block_are_refused_where_positions_would_clamp():
    with pytest.raises(UserError, match="49 tokens don't fit the model's block of 48"):
        model.hidden(params_of(), TINY, jnp.zeros((1, 49), jnp.int32))


def test_answers_longer_than_the_block_are_refused_where_the_cache_would_be_overwritten():
    slots = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(4), jnp.ones(1), 9, axis=0)
    assert slots.tolist() == [0, 0, 0, 1]  # written to the last slot
    tokens, lengths = prompts_of(2, 40)
    with pytest.raises(UserError, match="block"):
        decode.generate(params_of(), TINY, tokens, lengths, jax.random.key(0), new_tokens=9, stop=5)


def test_a_batch_without_targets_is_zero_where_a_mean_would_be_nan():
    nothing = jnp.zeros((2, 8), bool)
    assert np.isnan(jnp.mean(jnp.ones(16), where=nothing.ravel()))
    assert float(losses.reduce(jnp.ones((2, 8)), nothing).value) == 0.0
    batch = batch_of(2, 8)
    loss, _ = train.make_nll(TINY)(params_of(), Batch(batch.tokens_BT, nothing), None)
    assert float(loss.value) == 0.0


def test_a_row_that_attends_to_nothing_is_finite_where_softmax_would_be_nan():
    assert np.isnan(jax.nn.softmax(jnp.full(4, -jnp.inf))).all()
    batch = batch_of(2, 8)
    segments = jnp.zeros((2, 8), jnp.int32)  # a row of padding only
    assert np.isfinite(model.hidden(params_of(), TINY, batch.tokens_BT, segments_BT=segments)).all()


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
    tx = optax.adam(1e-3)
    step = jax.jit(train.make_train_step(train.make_nll(TINY), tx), donate_argnums=0)
    state = train.init_state(params_of(), tx)
    with jax.checking_leaks():
        for seed in range(3):
            state, _ = step(state, batch_of(4, 20, seed=seed), None)
    assert step._cache_size() == 1


def test_a_frozen_reference_has_buffers_of_its_own():
    """Donated under another name, an alias is deleted with the original."""
    state = train.init_state({"w": jnp.ones(3)}, optax.sgd(0.1))
    alias = state.trainable["w"]
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    with pytest.raises(RuntimeError, match="deleted"):
        alias.tolist()
    started = ppo.init(params_of(), TINY, optim.adam_tf(optax.constant_schedule(1e-3)), {})
    ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(started.frozen["reference"])}
    assert ours.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(started.trainable["policy"]))


def test_what_is_chosen_for_the_hardware_is_chosen_for_the_mesh_in_use():
    """`jax.default_backend()` is 'cpu' while a program is lowered for a TPU that is not there; only `sharding.platform`
    asks it, where no mesh says better (tests/test_plan.py compiles for TPUs on this machine)."""
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


def test_a_foreign_folder_is_neither_run_nor_model(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and is not a run folder"):
        Run(tmp_path, Settings(), "sft").__enter__()
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
