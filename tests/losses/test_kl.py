"""KL estimators against the exact divergence, and the controllers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxgpt.losses import kl


def run(f, *args):
    """f's result in NumPy. Jitted, since an eager call would compile each primitive separately."""
    return jax.tree.map(np.asarray, jax.jit(f)(*args))


def test_estimators_agree_with_the_exact_divergence_in_expectation():
    logits, ref_logits = np.array([0.2, 1.0, -0.7, 0.0]), np.array([0.0, 0.4, 0.3, -0.5])
    logp, ref = log_softmax(logits), log_softmax(ref_logits)
    exact, k1, k3 = run(lambda x, y, *both: (kl.exact(x, y), kl.k1(*both), kl.k3(*both)), logits, ref_logits, logp, ref)
    truth = np.exp(logp) @ (logp - ref)
    assert exact == pytest.approx(truth, rel=1e-5)
    for values in (k1, k3):  # unbiased: the sum over the vocabulary, weighted by pi, is exact
        assert np.exp(logp) @ values == pytest.approx(truth, rel=1e-4)
    assert (k3 >= 0).all()


def test_estimators_by_hand():
    """pi = 1/2 of a token, rho = 1/4: d = log 2."""

    def f(logp, ref, pi, rho, never):
        tokens = kl.k1(logp, ref), kl.k2(logp, ref), kl.k3(logp, ref), kl.k3(ref, logp), kl.k3(0 * logp, never)
        return *tokens, kl.exact(pi, rho), kl.exact(rho, pi)

    d = np.log(2)
    pi, rho = np.log([0.5, 0.5]) + 3.0, np.log([0.75, 0.25]) - 5.0  # constant offsets don't matter
    *tokens, one_way, other_way = run(f, np.log(0.5), np.log(0.25), pi, rho, -1e4)
    expected = [d, d**2 / 2, 1 / 2 - 1 + d, 2 - 1 - d, 19.0]  # the last d is clipped to 20
    np.testing.assert_allclose(tokens, expected, rtol=1e-6)
    assert one_way == pytest.approx(np.log(2 / 3**0.5), rel=1e-5)
    assert other_way == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)


def test_sequence_kl_sums_nats_over_the_answer():
    found = run(kl.sequence_kl, np.array([[9.0, 1.0, 2.0]]), np.zeros((1, 3)), np.array([[False, True, True]]))
    np.testing.assert_allclose(found, [3.0])


def updated(*nats_per_sequence, sequences: int = 100, tokens: int = 10, **settings):
    """Beta, starting at 0.1, after an estimate for each number of nats, from `sequences` answers of `tokens` tokens."""

    def update(nats):
        values = jnp.broadcast_to(nats / tokens, (sequences, tokens))
        measured = kl.estimate(values, jnp.ones(values.shape, bool))
        return kl.AdaptiveKL(jnp.float32(0.1), horizon=1000.0, **settings).update(measured).beta

    return run(jax.vmap(update), np.array(nats_per_sequence))


def test_adaptive_beta_moves_towards_the_target():
    """The error is clipped at 0.2."""
    found = updated(6.0, 60.0, 5.4, -1.0, target=6.0)
    np.testing.assert_allclose(found, [0.1, 0.1 * 1.02, 0.1 * 0.99, 0.1 * 0.98], rtol=1e-6)


def test_a_kl_that_was_not_measured_leaves_beta_alone():
    measured = kl.Estimate(*[np.float32(np.nan)] * len(dataclasses.fields(kl.Estimate)))
    assert float(kl.AdaptiveKL(jnp.float32(0.1)).update(measured).beta) == np.float32(0.1)


def test_the_unit_of_the_target_is_named():
    np.testing.assert_allclose(updated(6.0, 5.4, target=0.6, unit="token"), [0.1, 0.1 * 0.99], rtol=1e-6)
    with pytest.raises(ValueError, match="unit is 'nats'; choose sequence or token"):
        updated(6.0, unit="nats")


def test_controllers_are_pytrees_of_beta_alone():
    assert len(jax.tree.leaves(kl.AdaptiveKL(jnp.float32(0.1)))) == 1
    measured = kl.Estimate(*np.float32([2, 20, 198, 19602, 200, 1980]))  # 99 nats per sequence
    assert float(jax.jit(lambda c, m: c.update(m))(kl.FixedKL(np.float32(0.2)), measured).beta) == np.float32(0.2)


def test_standard_errors_by_hand():
    def f(values, mask):
        e = kl.estimate(values, mask)
        return e.nats_per_sequence, e.nats_per_sequence_error, e.nats_per_token, e.nats_per_token_error

    cases = {
        # nats of 1 and 3: mean 2, sample variance 2, standard error sqrt(2 / 2) = 1
        "a token each": ([[1.0, 9.0], [3.0, 9.0]], [1, 1], (2.0, 1.0, 2.0, 1.0)),
        # one nat per token: only the lengths of 1 and 3 vary
        "lengths": ([[1.0, 9.0, 9.0], [1.0, 1.0, 1.0]], [1, 3], (2.0, 1.0, 1.0, 0.0)),
        "a lone sequence": ([[1.0, 2.0], [9.0, 9.0]], [2, 0], (3.0, 0.0, 1.5, 0.0)),
    }
    values = np.stack([np.pad(x, ((0, 0), (0, 3 - len(x[0])))) for x, _, _ in cases.values()])
    mask = np.arange(3) < np.array([lengths for _, lengths, _ in cases.values()])[..., None]
    for name, *found in zip(cases, *run(jax.vmap(f), values, mask), strict=True):
        assert tuple(found) == cases[name][2], name


PLACEMENTS = {  # the expected gradient, as multiples of those of KL(pi || rho) and KL(rho || pi)
    ("loss", kl.k1): (0, 0),
    ("loss", kl.k2): (1, 0),
    ("loss", kl.k3): (0, 1),
    ("reward", kl.k1): (1, 0),
    ("reward", kl.k3): (1, -1),
}


def two_policies(*shape: int, seed: int = 3):
    return np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)


@functools.cache
def expected_gradients():
    """Of KL(pi || rho), of KL(rho || pi), and by placement; for one token, enumerating the whole vocabulary."""

    def f(x, ref):
        pi, logp, ref_logp = jax.nn.softmax(x), jax.nn.log_softmax(x), jax.nn.log_softmax(ref)

        def weighed(place, estimator):
            if place == "loss":
                return lambda x: pi @ estimator(jax.nn.log_softmax(x), ref_logp)
            return lambda x: pi @ (estimator(logp, ref_logp) * jax.nn.log_softmax(x))

        exact = jax.grad(lambda x: kl.exact(x, ref))(x), jax.grad(lambda x: kl.exact(ref, x))(x)
        return *exact, [jax.grad(weighed(*placement))(x) for placement in PLACEMENTS]

    forward, reverse, found = run(f, *two_policies(6))
    return forward, reverse, dict(zip(PLACEMENTS, found, strict=True))


@pytest.mark.parametrize(("place", "estimator"), PLACEMENTS)
def test_expected_gradients_by_placement(place, estimator):
    forward, reverse, found = expected_gradients()
    a, b = PLACEMENTS[place, estimator]
    np.testing.assert_allclose(found[place, estimator], a * forward + b * reverse, atol=1e-6)


def test_a_loss_term_leaves_out_later_states_and_the_reward_does_not():
    """Two tokens: a table for the first, and one for the second after each first. The sequence's KL is enumerated."""
    (x1, ref1), (x2, ref2) = two_policies(3), 2 * two_policies(3, 3, seed=4)
    ref1, ref2 = log_softmax(ref1), log_softmax(ref2, axis=-1)

    def logps(x1, x2):
        return jax.nn.log_softmax(x1), jax.nn.log_softmax(x2)

    def gradients(x1, x2, ref1, ref2):
        first, second = logps(x1, x2)
        pi = jnp.exp(first[:, None] + second)
        total = (first - ref1)[:, None] + second - ref2  # k1 of the whole answer

        def whole_kl(x1, x2):
            first, second = logps(x1, x2)
            joint, ref = first[:, None] + second, ref1[:, None] + ref2
            return (jnp.exp(joint) * (joint - ref)).sum()

        def as_loss(x1, x2):
            first, second = logps(x1, x2)
            return (pi * (kl.k2(first, ref1)[:, None] + kl.k2(second, ref2))).sum()

        def in_reward(x1, x2):
            first, second = logps(x1, x2)
            return (pi * total * (first[:, None] + second)).sum()

        first_alone = jax.grad(lambda x: kl.exact(x, ref1))(x1)
        return *(jax.grad(f, (0, 1))(x1, x2) for f in (whole_kl, as_loss, in_reward)), first_alone

    true, loss, reward, first_alone = run(gradients, x1, x2, ref1, ref2)
    np.testing.assert_allclose(reward[0], true[0], atol=1e-5)
    np.testing.assert_allclose(reward[1], true[1], atol=1e-5)
    np.testing.assert_allclose(loss[1], true[1], atol=1e-5)  # nothing follows the last token
    np.testing.assert_allclose(loss[0], first_alone, atol=1e-5)  # as if the answer had been one token
    assert np.abs(loss[0] - true[0]).max() > 0.1  # the first token's effect on the second's KL is missing


def test_standard_errors_are_the_spread_of_the_estimate():
    """2,000 batches of 40 answers whose tokens are correlated and whose lengths differ."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 9, (2000, 40))
    mask = np.arange(8) < length[..., None]
    values = rng.normal(0.5, 1.0, (2000, 40, 1)) + rng.normal(0, 0.5, (2000, 40, 8))

    def f(values, mask):
        e = kl.estimate(values, mask)
        of_tokens = e.nats_per_token, e.nats_per_token_error
        return {"sequence": (e.nats_per_sequence, e.nats_per_sequence_error), "token": of_tokens}

    found = run(jax.vmap(f), values.astype(np.float32), mask)
    for unit, (nats, error) in found.items():
        assert error.mean() == pytest.approx(nats.std(), rel=0.06), unit
    np.testing.assert_allclose(found["token"][0].mean(), 0.5, atol=0.01)
