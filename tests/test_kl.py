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
