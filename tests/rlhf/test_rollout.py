"""Sampling and scoring on the host, in batches of one shape."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import pytest

from jaxgpt import training
from jaxgpt.errors import UserError
from jaxgpt.models import sharding
from jaxgpt.rlhf import rollout
from jaxgpt.rlhf.policies import transformer_policy
from jaxgpt.rlhf.reward import heldout_metrics
from jaxgpt.structs import Answers, Batch, Experience
from tests.helpers import TINY

MODEL = dataclasses.replace(TINY, layers=1)
PROMPTS = [[6 + i, 7, 8][: 1 + i % 3] for i in range(11)]
BATCH = 4  # on 4 devices a row for each, on 8 whole on every one


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(devices=jax.devices()[:devices])


@functools.cache
def sampled(devices: int = 1, batch: int = BATCH) -> rollout.SampledAnswers:
    rng, mesh = np.random.default_rng(0), mesh_of(devices)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), training.param_shapes(MODEL))
    return rollout.sample_answers(
        jax.device_put(params, sharding.replicated_sharding(mesh)),
        MODEL,
        PROMPTS,
        jax.random.key(0),
        lambda ids: " ".join(map(str, ids)),
        mesh,
        new_tokens=9,
        stop=5,
        batch=batch,
    )


def test_every_prompt_gets_an_answer_after_its_own_tokens():
    found = sampled()
    assert len(found.texts) == len(PROMPTS) == len(found.ended)
    for prompt, tokens, mask in zip(PROMPTS, found.rows.tokens_BT, found.rows.mask_BT, strict=True):
        assert list(tokens[: len(prompt)]) == prompt
        assert int(mask.argmax()) == len(prompt)
    np.testing.assert_array_equal(found.lengths, found.rows.mask_BT.sum(1))


@pytest.mark.parametrize("devices", [4, 8])
def test_scores_in_batches_equal_scores_at_once(devices):
    rows, mesh = sampled().rows, mesh_of(devices)
    score = training.jit_on(mesh, lambda rows: (rows.tokens_BT * rows.mask_BT).sum(1))
    expected = (rows.tokens_BT * rows.mask_BT).sum(1)
    np.testing.assert_array_equal(rollout.map_in_batches(score, rows, BATCH, mesh), expected)


@pytest.mark.parametrize(
    ("devices", "batch"),
    [(4, 3), pytest.param(8, BATCH, marks=pytest.mark.slow), pytest.param(1, 1, marks=pytest.mark.slow)],
)
def test_devices_and_batches_change_no_answer(devices, batch):
    """A batch that doesn't divide among the devices is rounded up; one of a single answer needs two queues."""
    alone, together = sampled(), sampled(devices, batch)
    assert together.texts == alone.texts
    np.testing.assert_array_equal(together.rows.tokens_BT, alone.rows.tokens_BT)


def test_held_out_nats_are_per_token_over_all_rows_and_padding_is_none(monkeypatch):
    """Two batches; 2 rows are padding; the first and third row are about one prompt. By hand, with tokens as nats."""
    rng, mesh = np.random.default_rng(1), mesh_of(4)
    tokens, mask = rng.integers(1, 9, (8, 5)), rng.random((8, 5)) < 0.7
    mask[:, 1], mask[6:] = True, False
    batches = [Batch(tokens[at : at + 4], mask[at : at + 4]) for at in (0, 4)]
    program = training.jit_on(mesh, lambda params, rows: ((rows.tokens_BT * rows.mask_BT).sum(1), rows.mask_BT.sum(1)))
    monkeypatch.setattr(rollout, "_compile_row_nll", lambda mesh, config: program)
    found = rollout.heldout_nats({}, MODEL, batches, mesh, list("abacde"))
    mean = (tokens * mask).sum() / mask.sum()
    gaps = ((tokens - mean) * mask).sum(1)[:6]
    error = np.sqrt((np.square([gaps[0] + gaps[2], *gaps[[1, 3, 4, 5]]]).sum()) * 5 / 4) / mask.sum()
    np.testing.assert_allclose((found.mean, found.high - found.low), (mean, 2 * 1.96 * error), rtol=1e-6)
    alone = rollout.heldout_nats({}, MODEL, batches, mesh, ["one prompt"] * 6)
    assert alone.mean == found.mean and alone.plus_minus() == f"{mean:.3f} (too few for an interval)"


def test_prompts_that_are_empty_or_too_long_are_named():
    with pytest.raises(UserError, match="prompt 1 has 3 tokens and must have 1 to 2"):
        rollout.pad_prompts([[7], [7, 8, 9]], 2)
    with pytest.raises(UserError, match="prompt 0 has 0 tokens"):
        rollout.pad_prompts([[]], 2)
    with pytest.raises(UserError, match="block of 48"):
        rollout.sample_answers({}, MODEL, [[7] * 45], jax.random.key(0), str, mesh_of(1), new_tokens=9, stop=5, batch=4)


def test_minibatches_give_the_rows_in_order():
    x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    doubled = jax.jit(lambda x: rollout.map_in_minibatches(lambda part: part * 2, x, 3))
    np.testing.assert_array_equal(doubled(x), x * 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_a_result(monkeypatch, bad):
    """Samples, log-probabilities, scores of the reward model and held-out losses, in stages and studies alike."""
    mesh, rows = mesh_of(1), Batch(np.full((2, 4), 7), np.array([[False, True, True, True]] * 2))
    values = np.array([1.0, bad], np.float32)
    answers = Answers(np.full((2, 3), 7), np.array([[0, 0, 0], [0, 0, bad]]), np.full(2, 3), np.ones(2, bool))
    experience = Experience(rows, np.pad(answers.logp_BA, ((0, 0), (1, 0))), answers)
    for name, result in (
        ("_compile_sampler", experience),
        ("_compile_answer_logp", values),
        ("_compile_reward", values),
        ("_compile_row_nll", (values, np.ones(2))),
    ):
        monkeypatch.setattr(rollout, name, lambda *about, result=result: lambda *inputs: result)
    policy, how = transformer_policy(MODEL, new_tokens=3), {"new_tokens": 3, "stop": 5, "batch": 2}
    calls = {
        "1 of 8 log-probabilities of sampled tokens": lambda: rollout.sample_answers(
            {}, MODEL, PROMPTS[:2], jax.random.key(0), str, mesh, **how
        ),
        "1 of 2 log-probabilities of answers": lambda: rollout.answer_log_probs({}, policy, rows, 2, mesh),
        "1 of 2 scores of the reward model": lambda: rollout.reward_scores({}, MODEL, rows, 2, mesh),
        "1 of 2 held-out losses": lambda: rollout.heldout_nats({}, MODEL, [rows], mesh),
        "1 of 2 scores of held-out answers": lambda: heldout_metrics(
            np.array([[1.0, bad]]), np.array([0]), np.ones((1, 2), bool)
        ),
    }
    for words, call in calls.items():
        with pytest.raises(UserError, match=f"{words} are NaN or infinite: .* lower learning rate"):
            call()


def test_a_streamed_token_is_never_drawn_from_numbers_that_are_not_finite(monkeypatch):
    stream = sys.modules["jaxgpt.decoding.stream"]
    logits = np.array([[0.0, 1.0], [0.0, np.nan], [np.inf, 0.0]], np.float32)
    drawn = stream._draw(jax.random.key(0), logits, lambda key, x: x.argmax(-1), lambda x: x)
    assert drawn.tolist() == [1, -1, -1]
    monkeypatch.setattr(stream, "_first_token", lambda *about, **how: (None, np.array([-1])))
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        list(stream.stream({"head_DV": 0}, MODEL, np.ones((1, 2)), np.ones(1), jax.random.key(0), new_tokens=2, stop=5))
