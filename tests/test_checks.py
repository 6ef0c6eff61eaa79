"""Bad input: messages that name the argument, what it is and what it should be, while tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgpt import checks, losses
from tests.proofs import PROOFS, Inputs, Sizes
from tests.test_proofs import arrays


def made(name: str) -> Inputs:
    return PROOFS[name].make(np.random.default_rng(0), Sizes())


def traced(name: str, x) -> str:
    """The complaint while tracing (nothing runs)."""
    with pytest.raises((TypeError, ValueError)) as caught:
        jax.eval_shape(PROOFS[name].ours, **x)
    return str(caught.value)


def unchecked(name: str) -> set[str]:
    """Arguments of NumPy's kind that are helped by broadcasting on purpose."""
    return {"losses.preference_nll": {"margin_B"}, "losses.bradley_terry_nll": {"margin"}}.get(name, set())


@pytest.mark.parametrize("name", PROOFS)
def test_every_argument_of_every_function_is_checked(name):
    """Wrong dtype, an axis too many, another size: each names the argument that is wrong, or the one it fits not."""
    x = arrays(made(name))
    for argument in set(x) - unchecked(name):
        short = argument.split("_B")[0].split("_V")[0].replace("tied", "rank")
        wrong = x[argument].astype(jnp.int32 if x[argument].dtype != jnp.int32 else jnp.float32)
        complaint = traced(name, {**x, argument: wrong})
        assert f"`{short}` is {wrong.dtype}[" in complaint and "expected" in complaint, complaint
        if len(x) > 1:
            for wrong in (x[argument][..., None], *([x[argument][:-1]] if argument != "head_VD" else [])):
                assert "expected" in traced(name, {**x, argument: wrong})


def test_a_message_says_what_and_where():
    with pytest.raises(ValueError) as caught:
        jax.jit(losses.preference_nll)(jnp.zeros((5, 4)), jnp.zeros(3, jnp.int32))
    assert str(caught.value) == "preference_nll: `choice` is int32[3]; expected int [B] with B = 5 as in `scores`"
    with pytest.raises(TypeError) as caught:
        jax.jit(losses.preference_nll)(jnp.zeros((5, 4), jnp.int32), jnp.zeros(5, jnp.int32))
    assert str(caught.value) == "preference_nll: `scores` is int32[5, 4]; expected float [B, C]"
    with pytest.raises(ValueError, match=r"`scores` is float32\[4\]; expected float \[B, C\], an array of 2 axes"):
        losses.preference_nll(jnp.zeros(4), jnp.zeros(5, jnp.int32))


SCORES = jnp.zeros((2, 3))
VALUES = {
    "preference_nll: a choice is outside 0..2": lambda x: losses.preference_nll(SCORES, jnp.int32(x) + jnp.arange(2)),
    "implicit_reward: beta is -": lambda x: losses.dpo(SCORES, SCORES, jnp.array([0, 1]), -1.0 * x),
    "favourites_nll: more than 1 answers tie": lambda x: losses.favourites_nll(SCORES, SCORES < x),
    "plackett_luce_nll: a rank is outside -1..2": lambda x: losses.plackett_luce_nll(
        SCORES, jnp.int32(x) + jnp.zeros((2, 3), jnp.int32)
    ),
    "kto: beta is -": lambda x: losses.kto(SCORES, SCORES < 1, 0.0, -1.0 * x),
    "ipo: tau is -": lambda x: losses.ipo(SCORES, SCORES, -1.0 * x),
    "simpo: beta is -": lambda x: losses.simpo(SCORES, SCORES, -1.0 * x, 1.0),
}


@pytest.mark.parametrize("message", VALUES)
def test_wrong_values_raise_where_concrete_and_under_checkify_where_traced(message):
    f, x = VALUES[message], jnp.float32(3)
    with pytest.raises(ValueError, match=message):
        f(x)
    error, _ = jax.jit(checkify.checkify(f, errors=checkify.user_checks))(x)
    assert message in error.get()
    jax.jit(f)(x)  # and cost nothing otherwise


def test_a_favourite_that_is_not_there():
    with pytest.raises(ValueError, match="favourites_nll: a favourite is not present"):
        losses.preference_nll(SCORES, jnp.array([0, 2]), jnp.array([[True, True, False]] * 2))


def test_expect_binds_letters_and_leading_axes():
    def f(a, b):
        checks.expect(a=(a, "float ... V"), b=(b, "int ..."))

    f(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), int))
    f(jnp.zeros(5), jnp.zeros((), int))
    f(None, jnp.zeros(4, int))
    with pytest.raises(ValueError, match=r"f: `b` is int32\[3\]; expected int \[...\] with ... = \(2, 3\) as in `a`"):
        f(jnp.zeros((2, 3, 5)), jnp.zeros(3, int))
