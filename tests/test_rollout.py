"""Sampling and scoring on the host, in batches of one shape."""

import jax
import numpy as np
import pytest

from jaxgpt import model, rollout, sharding
from jaxgpt.config import UserError
from tests.helpers import TINY, params_of

PROMPTS = [[6 + i, 7, 8][: 1 + i % 3] for i in range(11)]


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(devices=jax.devices()[:devices])


def sampled(batch: int = 4, devices: int = 1) -> rollout.Sampled:
    mesh = mesh_of(devices)
    return rollout.sample_answers(
        sharding.replicate(params_of(scale=1.0), mesh), TINY, PROMPTS, jax.random.key(0),
        lambda ids: " ".join(map(str, ids)), mesh, new_tokens=9, stop=5, batch=batch,
    )  # fmt: skip


def test_every_prompt_gets_an_answer_after_its_own_tokens():
    found = sampled()
    assert len(found.texts) == len(PROMPTS) == len(found.ended)
    for prompt, tokens, mask in zip(PROMPTS, found.rows.tokens_BT, found.rows.mask_BT, strict=True):
        assert list(tokens[: len(prompt)]) == prompt
        assert int(mask.argmax()) == len(prompt)
    np.testing.assert_array_equal(found.lengths, found.rows.mask_BT.sum(1))


def test_scores_in_batches_equal_scores_at_once():
    found = sampled()
    params = params_of(scale=1.0)
    score = jax.jit(lambda rows: model.score(params, TINY, rows)[0])
    np.testing.assert_allclose(rollout.in_batches(score, found.rows, 4, mesh_of(4)), score(found.rows), atol=1e-5)


@pytest.mark.parametrize("devices", [4, 8])  # a batch of 4: a row for each device, and whole on every device
def test_devices_share_the_rows_and_change_nothing(devices):
    alone, together = sampled(), sampled(devices=devices)
    assert together.texts == alone.texts
    np.testing.assert_array_equal(together.rows.tokens_BT, alone.rows.tokens_BT)


def test_prompts_that_are_empty_or_too_long_are_named():
    with pytest.raises(UserError, match="prompt 1 has 3 tokens and must have 1 to 2"):
        rollout.pad_prompts([[7], [7, 8, 9]], 2)
    with pytest.raises(UserError, match="prompt 0 has 0 tokens"):
        rollout.pad_prompts([[]], 2)
    with pytest.raises(UserError, match="block of 48"):
        rollout.sample_answers(
            params_of(), TINY, [[7] * 45], jax.random.key(0), str, mesh_of(1), new_tokens=9, stop=5, batch=4
        )


def test_minibatches_give_the_rows_in_order():
    x = np.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(rollout.in_minibatches(lambda part: part * 2, x, 3), x * 2)
