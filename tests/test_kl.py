"""KL estimators against the exact divergence, and the controllers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kl


def test_estimators_agree_with_the_exact_divergence_in_expectation():
    logits, ref_logits = jnp.array([0.2, 1.0, -0.7, 0.0]), jnp.array([0.0, 0.4, 0.3, -0.5])
    pi = np.asarray(jax.nn.softmax(logits), np.float64)
    logp, ref = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (logits, ref_logits))
    truth = (pi * (logp - ref)).sum()
    assert float(kl.exact(logits, ref_logits)) == pytest.approx(truth, rel=1e-5)
    for estimator in (kl.k1, kl.k3):  # unbiased: the sum over the vocabulary, weighted by pi, is exact
        assert float((pi * estimator(jnp.asarray(logp), jnp.asarray(ref))).sum()) == pytest.approx(truth, rel=1e-4)
    assert (kl.k3(jnp.asarray(logp), jnp.asarray(ref)) >= 0).all()
    assert float(kl.k2(jnp.float32(1.5), jnp.float32(1.0))) == 0.125


def test_sequence_kl_sums_nats_over_the_answer():
    logp = jnp.array([[9.0, 1.0, 2.0]])
    mask = jnp.array([[False, True, True]])
    np.testing.assert_allclose(kl.sequence_kl(logp, jnp.zeros((1, 3)), mask), [3.0])


def measured(nats_a_sequence: float, sequences: int = 100, tokens: int = 10) -> kl.Estimate:
    """An estimate of `sequences` answers of `tokens` tokens each."""
    values = jnp.full((sequences, tokens), nats_a_sequence / tokens)
    return kl.estimate(values, jnp.ones(values.shape, bool))


def test_adaptive_beta_moves_towards_the_target():
    start = kl.AdaptiveKL(jnp.float32(0.1), target=6.0, horizon=1000.0)
    assert float(start.update(measured(6.0)).beta) == pytest.approx(0.1)
    assert float(start.update(measured(60.0)).beta) == pytest.approx(0.1 * 1.02)  # the error is clipped at 0.2
    assert float(start.update(measured(5.4)).beta) == pytest.approx(0.1 * 0.99)
    assert float(start.update(measured(-1.0)).beta) == pytest.approx(0.1 * 0.98)


def test_the_unit_of_the_target_is_named():
    a_token = kl.AdaptiveKL(jnp.float32(0.1), target=0.6, horizon=1000.0, unit="token")
    assert float(a_token.update(measured(6.0, tokens=10)).beta) == pytest.approx(0.1)
    assert float(a_token.update(measured(5.4, tokens=10)).beta) == pytest.approx(0.1 * 0.99)
    with pytest.raises(ValueError, match="unit is 'nats'; choose sequence or token"):
        kl.AdaptiveKL(jnp.float32(0.1), unit="nats").update(measured(6.0))


def test_controllers_are_pytrees_of_beta_alone():
    assert len(jax.tree.leaves(kl.AdaptiveKL(jnp.float32(0.1)))) == 1
    fixed = kl.FixedKL(jnp.float32(0.2))
    assert float(jax.jit(lambda c, m: c.update(m))(fixed, measured(99.0)).beta) == pytest.approx(0.2)


def test_estimators_by_hand():
    """pi = 1/2 of a token, rho = 1/4: d = log 2."""
    d = np.log(2)
    logp, ref = jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25))
    assert float(kl.k1(logp, ref)) == pytest.approx(d, rel=1e-6)
    assert float(kl.k2(logp, ref)) == pytest.approx(d**2 / 2, rel=1e-6)
    assert float(kl.k3(logp, ref)) == pytest.approx(1 / 2 - 1 + d, rel=1e-6)
    assert float(kl.k3(ref, logp)) == pytest.approx(2 - 1 - d, rel=1e-6)
    pi, rho = jnp.log(jnp.array([0.5, 0.5])) + 3.0, jnp.log(jnp.array([0.75, 0.25])) - 5.0  # constants don't count
    assert float(kl.exact(pi, rho)) == pytest.approx(np.log(2 / 3**0.5), rel=1e-5)
    assert float(kl.exact(rho, pi)) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)
    assert float(kl.k3(jnp.array(0.0), jnp.array(-1e4))) == pytest.approx(19.0)  # d is held at 20


def test_standard_errors_by_hand():
    """Nats of 1 and 3: mean 2, sample variance 2, standard error sqrt(2 / 2) = 1."""
    one_token = kl.estimate(jnp.array([[1.0], [3.0]]), jnp.ones((2, 1), bool))
    assert (float(one_token.nats_a_sequence), float(one_token.nats_a_sequence_error)) == (2.0, 1.0)
    assert (float(one_token.nats_a_token), float(one_token.nats_a_token_error)) == (2.0, 1.0)
    # a nat a token, in answers of one and of three tokens: only their lengths are uncertain
    lengths = kl.estimate(jnp.ones((2, 3)), jnp.array([[True, False, False], [True, True, True]]))
    assert (float(lengths.nats_a_sequence), float(lengths.nats_a_sequence_error)) == (2.0, 1.0)
    assert (float(lengths.nats_a_token), float(lengths.nats_a_token_error)) == (1.0, 0.0)


PLACEMENTS = {  # what the expected gradient is, as multiples of those of KL(pi || rho) and KL(rho || pi)
    ("loss", kl.k1): (0, 0), ("loss", kl.k2): (1, 0), ("loss", kl.k3): (0, 1),
    ("reward", kl.k1): (1, 0), ("reward", kl.k3): (1, -1),
}  # fmt: skip


def two_policies(shape: tuple[int, ...]):
    keys = jax.random.split(jax.random.key(3))
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)


@pytest.mark.parametrize(("place", "estimator"), PLACEMENTS)
def test_expected_gradients_by_placement(place, estimator):
    """One token, its whole vocabulary enumerated."""
    x, ref = two_policies((6,))
    pi, ref_logp = jax.nn.softmax(x), jax.nn.log_softmax(ref)
    forward = jax.grad(lambda x: kl.exact(x, ref))(x)
    reverse = jax.grad(lambda x: kl.exact(ref, x))(x)
    a, b = PLACEMENTS[place, estimator]
    if place == "loss":
        found = jax.grad(lambda x: pi @ estimator(jax.nn.log_softmax(x), ref_logp))(x)
    else:
        value = estimator(jax.nn.log_softmax(x), ref_logp)
        found = jax.grad(lambda x: pi @ (value * jax.nn.log_softmax(x)))(x)
    np.testing.assert_allclose(found, a * forward + b * reverse, atol=1e-6)


def test_a_loss_term_leaves_out_later_states_and_the_reward_does_not():
    """Two tokens: a table for the first, and one for the second after each first. The sequence's KL is enumerated."""
    (x1, ref1), (x2, ref2) = two_policies((3,)), (y * 2 for y in two_policies((3, 3)))
    ref1, ref2 = jax.nn.log_softmax(ref1), jax.nn.log_softmax(ref2)

    def logps(x1, x2):
        return jax.nn.log_softmax(x1), jax.nn.log_softmax(x2)

    def whole_kl(x1, x2):
        first, second = logps(x1, x2)
        joint, ref = first[:, None] + second, ref1[:, None] + ref2
        return (jnp.exp(joint) * (joint - ref)).sum()

    first, second = logps(x1, x2)
    pi = jnp.exp(first[:, None] + second)

    def as_loss(x1, x2):
        first, second = logps(x1, x2)
        return (pi * (kl.k2(first, ref1)[:, None] + kl.k2(second, ref2))).sum()

    total = (first - ref1)[:, None] + second - ref2  # k1 of the whole answer

    def in_reward(x1, x2):
        first, second = logps(x1, x2)
        return (pi * total * (first[:, None] + second)).sum()

    true, loss, reward = (jax.grad(f, (0, 1))(x1, x2) for f in (whole_kl, as_loss, in_reward))
    np.testing.assert_allclose(reward[0], true[0], atol=1e-5)
    np.testing.assert_allclose(reward[1], true[1], atol=1e-5)
    np.testing.assert_allclose(loss[1], true[1], atol=1e-5)  # nothing follows the last token
    first_alone = jax.grad(lambda x: kl.exact(x, ref1))(x1)
    np.testing.assert_allclose(loss[0], first_alone, atol=1e-5)  # as if the answer had been one token
    assert np.abs(loss[0] - true[0]).max() > 0.1  # the first token's effect on the second's KL is missing


def test_standard_errors_are_the_spread_of_the_estimate():
    """2,000 batches of 40 answers whose tokens hang together and whose lengths differ."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 9, (2000, 40))
    mask = np.arange(8) < length[..., None]
    values = rng.normal(0.5, 1.0, (2000, 40, 1)) + rng.normal(0, 0.5, (2000, 40, 8))
    found = jax.jit(jax.vmap(kl.estimate))(jnp.asarray(values, jnp.float32), jnp.asarray(mask))
    for unit in ("nats_a_sequence", "nats_a_token"):
        spread = float(getattr(found, unit).std())
        assert float(getattr(found, f"{unit}_error").mean()) == pytest.approx(spread, rel=0.06)
    np.testing.assert_allclose(float(found.nats_a_token.mean()), 0.5, atol=0.01)


def test_one_sequence_has_no_standard_error():
    found = kl.estimate(jnp.array([[1.0, 2.0], [9.0, 9.0]]), jnp.array([[True, True], [False, False]]))
    assert (float(found.nats_a_sequence), float(found.nats_a_token)) == (3.0, 1.5)
    assert (float(found.nats_a_sequence_error), float(found.nats_a_token_error)) == (0.0, 0.0)
