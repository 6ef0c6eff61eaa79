"""Decoding with a cache is the full forward pass, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import decode, model, sampling
from jaxgpt.config import UserError
from tests.helpers import TINY, generate, hidden, params_of, prompts_of, score


@functools.cache
def generated(width: int = 12, new_tokens: int = 16, temperature: float = 1.0):
    prompts, lengths = prompts_of(6, width)
    answers = generate(
        params_of(), TINY, prompts, lengths, jax.random.key(3), new_tokens=new_tokens, stop=5,
        filter_logits=lambda logits: logits / temperature,
    )  # fmt: skip
    return prompts, lengths, answers


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_the_sampler_equal_those_of_the_trainer(temperature):
    prompts, lengths, answers = generated(temperature=temperature)
    rows, sampler_logp = decode.join(prompts, lengths, answers)
    logp, _ = score(params_of(), TINY, rows, temperature=temperature)
    np.testing.assert_allclose(jnp.where(rows.mask_BT, logp, 0.0), sampler_logp, atol=1e-5)
    assert int(rows.mask_BT.sum()) == int(answers.length_B.sum())


def test_greedy_decoding_equals_argmax_of_the_full_forward():
    params, (prompts, lengths) = params_of(), prompts_of(3, 7)
    answers = generate(params, TINY, prompts, lengths, jax.random.key(0), new_tokens=9, stop=5, sample=sampling.greedy)
    rows, _ = decode.join(prompts, lengths, answers)
    best = jnp.argmax(model.unembed(params, hidden(params, TINY, rows.tokens_BT)), axis=-1)
    for b in range(3):
        t = np.flatnonzero(rows.mask_BT[b])
        np.testing.assert_array_equal(best[b, t - 1], rows.tokens_BT[b, t])


def test_padding_of_the_prompt_changes_nothing():
    params, (prompts, lengths) = params_of(), prompts_of(4, 8)
    run = functools.partial(generate, params, TINY, new_tokens=10, stop=5)
    a = run(prompts, lengths, jax.random.key(1))
    b = run(jnp.pad(prompts, ((0, 0), (0, 9)), constant_values=17), lengths, jax.random.key(1))
    np.testing.assert_array_equal(a.tokens_BA, b.tokens_BA)
    np.testing.assert_allclose(a.logp_BA, b.logp_BA, atol=1e-5)


def test_rows_stop_at_the_stop_token_and_stay_padded():
    params, (prompts, lengths) = params_of(scale=1.0), prompts_of(64, 4)
    answers = generate(params, TINY, prompts, lengths, jax.random.key(2), new_tokens=40, stop=5, pad=0)
    tokens, size = np.asarray(answers.tokens_BA), np.asarray(answers.length_B)
    assert answers.ended_B.any() and not answers.ended_B.all()
    for row, n, ended, logp in zip(tokens, size, np.asarray(answers.ended_B), np.asarray(answers.logp_BA), strict=True):
        assert (row[n - 1] == 5) == ended
        assert 5 not in row[: n - 1]
        assert (row[n:] == 0).all() and (logp[n:] == 0).all() and (logp[:n] < 0).all()


def test_samples_follow_the_models_distribution():
    params = params_of(scale=2.0)
    prompts = jnp.tile(jnp.array([[7, 9, 11]]), (4000, 1))
    answers = generate(params, TINY, prompts, jnp.full(4000, 3), jax.random.key(5), new_tokens=1, stop=5)
    expected = np.asarray(jax.nn.softmax(model.unembed(params, hidden(params, TINY, prompts[:1]))[0, -1]))
    counts = np.bincount(np.asarray(answers.tokens_BA[:, 0]), minlength=TINY.vocab)
    common = expected * 4000 >= 5
    chi2 = ((counts - 4000 * expected) ** 2 / (4000 * expected))[common].sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_join_leaves_no_gap_between_prompt_and_answer():
    prompts, lengths, answers = generated()
    rows, _ = decode.join(prompts, lengths, answers)
    for b in range(len(prompts)):
        p, a = int(lengths[b]), int(answers.length_B[b])
        expected = [*np.asarray(prompts[b, :p]), *np.asarray(answers.tokens_BA[b, :a])]
        np.testing.assert_array_equal(rows.tokens_BT[b, : p + a], expected)
        assert (rows.tokens_BT[b, p + a :] == 0).all()
        np.testing.assert_array_equal(np.flatnonzero(rows.mask_BT[b]), np.arange(p, p + a))


def test_streaming_gives_the_tokens_of_generate():
    params, (prompts, lengths) = params_of(), prompts_of(1, 9)
    whole = generate(params, TINY, prompts, lengths, jax.random.key(4), new_tokens=12, stop=5)
    parts = list(decode.stream(params, TINY, prompts, lengths, jax.random.key(4), new_tokens=12, stop=5))
    used = int(whole.length_B[0]) - int(whole.ended_B[0])
    assert parts == [int(t) for t in whole.tokens_BA[0, :used]]


def test_a_vmapped_program_gives_each_keys_own_answers():
    params, (prompts, lengths) = params_of(), prompts_of(2, 5)
    run = functools.partial(decode.generate, params, TINY, prompts, lengths, new_tokens=6, stop=5)
    with jax.debug_key_reuse(False):  # it refuses slices of a vmapped key array
        many = jax.jit(jax.vmap(lambda seed: run(key=jax.random.key(seed))))(jnp.arange(3))
    np.testing.assert_array_equal(many.tokens_BA[1], jax.jit(run)(key=jax.random.key(1)).tokens_BA)


def test_what_does_not_fit_the_block_is_refused():
    prompts, lengths = prompts_of(2, 40)
    with pytest.raises(UserError, match="40 tokens and 9 new ones don't fit the model's block of 48"):
        generate(params_of(), TINY, prompts, lengths, jax.random.key(0), new_tokens=9, stop=5)
    full = generate(params_of(), TINY, prompts, lengths, jax.random.key(0), new_tokens=8, stop=5)
    assert full.tokens_BA.shape == (2, 8)
