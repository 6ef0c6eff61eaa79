"""Bad input: errors while tracing that name the argument, its actual type and the expected one."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgpt import losses
from jaxgpt.losses import alignment, checks, preferences, returns
from tests.losses.proofs import PROOFS, Inputs, Sizes
from tests.losses.test_proofs import arrays


def made(name: str) -> Inputs:
    return PROOFS[name].make(np.random.default_rng(0), Sizes())


def complaint(name: str, x) -> str:
    """The error message while tracing (nothing runs)."""
    with pytest.raises((TypeError, ValueError)) as caught:
        jax.eval_shape(PROOFS[name].ours, **x)
    return str(caught.value)


def named(argument: str) -> str:
    """The argument's name without axes, as in messages."""
    return argument.split("_B")[0].split("_V")[0].replace("tied", "rank")


def changed(kind: str, a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    match kind:
        case "dtype":
            return jax.ShapeDtypeStruct(a.shape, np.dtype(np.int32 if a.dtype != np.int32 else np.float32))
        case "rank":
            return jax.ShapeDtypeStruct((*a.shape, 1), a.dtype)
        case _:
            return jax.ShapeDtypeStruct((a.shape[0] - 1, *a.shape[1:]), a.dtype)


def mistakes(name: str):
    """Each array of a function with each mistake. A single array may have any shape, and a vocabulary any size."""
    x = made(name)
    for argument, kind in itertools.product(x, ("dtype", "rank", "size")):
        right = kind != "dtype" and (len(x) == 1 or (argument, kind) == ("head_VD", "size"))
        if x[argument].ndim and not right:
            yield argument, kind


@pytest.mark.parametrize("name", [name for name in PROOFS if any(mistakes(name))])
def test_every_argument_of_every_function_is_checked(name):
    """Wrong dtype, an extra axis, another size: the message names an argument, its type and the expected one.

    A wrong dtype is reported for the argument itself; a wrong shape for the first argument that doesn't fit the earlier
    ones.
    """
    right = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays(made(name)).items()}
    for argument, kind in mistakes(name):
        x = {**right, argument: changed(kind, right[argument])}
        said = complaint(name, x)
        accused = [argument] if kind == "dtype" else list(x)
        descriptions = [f"`{named(n)}` is {x[n].dtype}[{', '.join(map(str, x[n].shape))}]; expected" for n in accused]
        assert any(description in said for description in descriptions), (argument, kind, said)


@pytest.mark.parametrize("mask", [None, np.ones(3, bool)], ids=["no mask", "mask"])
def test_terms_of_different_shape_are_refused(mask):
    with pytest.raises(ValueError, match=r"combine: `b` is float32\[2\]; expected float"):
        losses.combine({"a": jnp.ones(3), "b": jnp.ones(2)}, mask)


def test_whole_numbers_are_refused_without_a_mask():
    with pytest.raises(TypeError, match=r"reduce: `values` is int32\[3\]; expected float"):
        losses.reduce(jnp.arange(3))


def test_a_reference_point_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="`reference` is"):
        losses.kto(jnp.zeros(2), jnp.ones(2, bool), jnp.zeros((2, 1)), 0.1)


def test_a_message_says_what_and_where():
    with pytest.raises(ValueError) as caught:
        jax.jit(losses.preference_nll)(jnp.zeros((5, 4)), jnp.zeros(3, jnp.int32))
    assert str(caught.value) == "preference_nll: `choice` is int32[3]; expected int [B] with B = 5 as in `scores`"
    with pytest.raises(TypeError) as caught:
        jax.jit(losses.preference_nll)(jnp.zeros((5, 4), jnp.int32), jnp.zeros(5, jnp.int32))
    assert str(caught.value) == "preference_nll: `scores` is int32[5, 4]; expected float [B, C]"
    with pytest.raises(ValueError, match=r"`scores` is float32\[4\]; expected float \[B, C\], an array of 2 axes"):
        losses.preference_nll(jnp.zeros(4), jnp.zeros(5, jnp.int32))


SCORES = np.zeros((2, 3), np.float32)
TOKENS = np.zeros((2, 3), np.float32), np.ones((2, 3), bool)


def whole(x):
    return jnp.asarray(x, jnp.int32)


VALUES = {  # wrong for x = 3
    "preference_nll: a choice is outside 0..2": lambda x: losses.preference_nll(SCORES, whole(x) * jnp.arange(2)),
    "preference_nll: a choice is outside 0..2, the": lambda x: losses.preference_objective(
        SCORES, whole(x) - jnp.array([3, 5]), SCORES < 1
    ),
    "implicit_reward: beta is -": lambda x: losses.dpo(SCORES, SCORES, jnp.array([0, 1]), -1.0 * x),
    "implicit_reward: beta is -[13]": lambda x: losses.cdpo(SCORES, SCORES, jnp.array([0, 1]), -1.0 * x, 0.1),
    "favourites_nll: more than 1 answers tie": lambda x: losses.favourites_nll(SCORES, x > SCORES),
    "favourites_nll: more than 2 answers tie": lambda x: losses.plackett_luce_nll(
        SCORES, jnp.zeros((2, 3), jnp.int32) * whole(x), log_tie=(0.0,)
    ),
    "plackett_luce_nll: a rank is outside -1..2": lambda x: losses.plackett_luce_nll(
        SCORES, whole(x) * jnp.array([[1, 0, 0], [0, 0, 0]])
    ),
    "kto: beta is -": lambda x: losses.kto(SCORES, SCORES < 1, 0.0, -1.0 * x),
    "ipo: tau is -": lambda x: losses.ipo(SCORES, SCORES, -1.0 * x),
    "simpo: beta is -": lambda x: losses.simpo(SCORES, SCORES, -1.0 * x, 1.0),
    "dual_clip: limit is ": lambda x: losses.dual_clip(SCORES, SCORES, limit=x - 2.0),
    "smooth_choice: a choice is outside 0..2": lambda x: losses.smooth_choice(
        whole(x) + jnp.arange(2), SCORES < 1, 0.1
    ),
    "a choice is outside 0..2": lambda x: losses.cdpo(SCORES, SCORES, whole(x) + jnp.arange(2), 0.1, 0.2),
    "a favourite is not present": lambda x: losses.cdpo(
        SCORES, SCORES, whole(x) - jnp.array([3, 1]), 0.1, 0.2, jnp.array([[True, True, False]] * 2)
    ),
    "all_pairs_nll: a rank is outside -1..2": lambda x: losses.all_pairs_nll(
        SCORES, whole(x) + jnp.zeros((2, 3), jnp.int32)
    ),
    "shaped_rewards: beta is -": lambda x: returns.shaped_rewards(jnp.zeros(2), *TOKENS, -1.0 * x),
}


@pytest.mark.parametrize("message", VALUES)
def test_wrong_values_raise_where_concrete_and_under_checkify_where_traced(message):
    f, x = VALUES[message], jnp.float32(3)
    with pytest.raises(ValueError, match=message):
        f(x)
    error, _ = jax.jit(checkify.checkify(f, errors=checkify.user_checks))(x)
    assert re.search(message, error.get())


def test_right_values_pass_under_checkify():
    f = checkify.checkify(lambda c, b: losses.dpo(SCORES, SCORES, c, b), errors=checkify.user_checks)
    error, found = jax.jit(f)(jnp.array([0, 2]), jnp.float32(0.0))
    assert error.get() is None
    np.testing.assert_allclose(found, np.log(3), rtol=1e-6)


def test_checks_of_values_cost_nothing_without_checkify(monkeypatch):
    """The compiled program is the same as without the checks."""

    def program() -> str:
        def f(scores, choice, beta):  # a new function each time: nothing is cached
            return losses.dpo(scores, scores, choice, beta)

        text = jax.jit(f).lower(SCORES, jnp.array([0, 1]), jnp.float32(-1.0)).compile().as_text()
        text = text[re.search(r"^(%|ENTRY)", text, re.MULTILINE).start() :]  # after the tables of source lines
        return re.sub(r", metadata={[^}]*}", "", text)

    checked = program()
    for module in (alignment, preferences):
        monkeypatch.setattr(module, "expect_value", lambda *x, **more: None)
    assert checked == program() and "custom-call" not in checked


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
