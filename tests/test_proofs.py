"""Every function of the loss library: equal to its float64 reference, and unmoved by what must not move it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import kl, losses, returns, vocab_head
from tests.proofs import ELSEWHERE, PROOFS, Inputs, Sizes

SIZES = (Sizes(), Sizes(B=1, T=3, C=1, V=2), Sizes(B=3, T=9, C=5, V=11))
MASKS = {"mask", "mask_BT", "present_BC"}
TAKES = {name: set(proof.make(np.random.default_rng(0), Sizes())) for name, proof in PROOFS.items()}
every = pytest.mark.parametrize("name", PROOFS)


def where(condition):
    return pytest.mark.parametrize("name", [name for name, proof in PROOFS.items() if condition(proof)])


@functools.cache
def program(name: str):
    """The function jitted, and the gradient of a weighted sum of what it returns."""
    proof = PROOFS[name]

    def weighted(moving, still, weights):
        leaves = jax.tree.leaves(proof.ours(**moving, **still))
        return sum((w * leaf).sum() for w, leaf in zip(weights, leaves, strict=True))

    return jax.jit(proof.ours), jax.jit(jax.grad(weighted))


def inputs(name: str, seed: int = 0, sizes: Sizes = SIZES[0]) -> Inputs:
    return PROOFS[name].make(np.random.default_rng(seed), sizes)


def arrays(x: Inputs) -> dict[str, jax.Array]:
    cast = {"f": np.float32, "i": np.int32, "b": np.bool_}
    return {name: jnp.asarray(a.astype(cast[a.dtype.kind])) for name, a in x.items()}


def gradient(name: str, x: Inputs, weights: list[np.ndarray]) -> dict[str, jax.Array]:
    a = arrays(x)
    moving = {n: a.pop(n) for n in PROOFS[name].wrt}
    return program(name)[1](moving, a, [jnp.asarray(w, jnp.float32) for w in weights])


def ones(name: str, x: Inputs) -> list[np.ndarray]:
    return [np.ones(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(PROOFS[name].ours, **arrays(x)))]


def agree(found, expected, rtol=2e-5, atol=2e-5):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        e = np.asarray(e)
        scale = max(1.0, np.abs(e).max(initial=0)) if e.dtype.kind == "f" else 1.0
        np.testing.assert_allclose(np.asarray(f), e, rtol=rtol, atol=atol * scale)


@every
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.sampled_from(SIZES))
def test_it_is_the_formula(name, seed, sizes):
    x = inputs(name, seed, sizes)
    x = {n: a.astype(np.float32).astype(np.float64) if a.dtype.kind == "f" else a for n, a in x.items()}
    agree(program(name)[0](**arrays(x)), PROOFS[name].reference(**x))


@where(lambda proof: proof.wrt)
@pytest.mark.parametrize("seed", [0, 1])
def test_its_gradient_is_that_of_the_formula(name, seed):
    """Central differences of the float64 reference along random directions."""
    rng, proof, x = np.random.default_rng(seed), PROOFS[name], inputs(name, seed)
    weights = [rng.normal(size=w.shape) for w in ones(name, x)]
    found = gradient(name, x, weights)

    def weighted(x: Inputs) -> float:
        return sum((w * leaf).sum() for w, leaf in zip(weights, jax.tree.leaves(proof.reference(**x)), strict=True))

    for _ in range(4):
        u = {n: rng.normal(size=x[n].shape) for n in proof.wrt}
        ahead, behind = ({**x, **{n: x[n] + h * u[n] for n in proof.wrt}} for h in (1e-6, -1e-6))
        expected = (weighted(ahead) - weighted(behind)) / 2e-6
        along = [(np.asarray(found[n], np.float64) * u[n]) for n in proof.wrt]
        size = sum(np.abs(a).sum() for a in along)
        assert sum(a.sum() for a in along) == pytest.approx(expected, rel=1e-3, abs=1e-4 * max(size, 1))


@every
def test_with_and_without_jit_and_under_vmap(name):
    proof, both = PROOFS[name], [arrays(inputs(name, seed)) for seed in (1, 2)]
    for n in proof.shared:
        both[1][n] = both[0][n]
    one_by_one = [program(name)[0](**x) for x in both]
    agree(proof.ours(**both[0]), one_by_one[0], rtol=1e-5, atol=1e-6)
    axes = {n: None if n in proof.shared else 0 for n in both[0]}
    stacked = {n: both[0][n] if n in proof.shared else jnp.stack([x[n] for x in both]) for n in both[0]}
    found = jax.jit(jax.vmap(lambda x: proof.ours(**x), in_axes=(axes,)))(stacked)
    agree(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one), rtol=1e-5, atol=1e-6)


@every
def test_rows_divided_among_eight_devices(name):
    proof, x = PROOFS[name], arrays(inputs(name, 3))
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    placed = {n: jax.device_put(a, NamedSharding(mesh, P() if n in proof.shared else P("rows"))) for n, a in x.items()}
    agree(program(name)[0](**placed), program(name)[0](**x), rtol=1e-5, atol=1e-6)


@where(lambda proof: proof.rows)
def test_parts_of_a_batch_joined_are_the_batch(name):
    proof, x = PROOFS[name], arrays(inputs(name, 4))
    half = [{n: a if n in proof.shared else a[i : i + 4] for n, a in x.items()} for i in (0, 4)]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(program(name)[0](**part) for part in half))
    agree(joined, program(name)[0](**x), rtol=1e-5, atol=1e-6)


@where(lambda proof: proof.time)
def test_padding_changes_nothing(name):
    """Three more tokens outside the mask, NaN where they are floats."""
    x = inputs(name, 5)
    T = SIZES[0].T
    more = {
        n: np.pad(a, ((0, 0), (0, 3)), constant_values={"f": np.nan, "i": 1, "b": False}[a.dtype.kind])
        if a.ndim > 1
        else a
        for n, a in x.items()
    }
    mask = more["mask_BT" if "mask_BT" in more else "mask"]
    if "reward_BT" in more:  # rewards are 0 outside the mask by contract
        more["reward_BT"] = np.where(mask, more["reward_BT"], 0)
    found = jax.tree.map(lambda leaf: leaf[:, :T] if leaf.ndim > 1 else leaf, program(name)[0](**arrays(more)))
    agree(found, program(name)[0](**arrays(x)), rtol=1e-5, atol=1e-6)


@where(lambda proof: proof.elementwise)
def test_packing_changes_nothing(name):
    """All rows laid into one."""
    proof, x = PROOFS[name], arrays(inputs(name, 6))
    axes = jax.tree.leaves(jax.eval_shape(proof.ours, **x))[0].ndim
    row = {n: a if n in proof.shared else a.reshape(1, -1, *a.shape[axes:]) for n, a in x.items()}
    flat = jax.tree.map(lambda leaf: leaf.reshape(1, -1), program(name)[0](**x))
    agree(program(name)[0](**row), flat, rtol=1e-5, atol=1e-6)


@where(lambda proof: proof.extreme)
@pytest.mark.parametrize("size", [1e4, -1e4, None])
def test_extreme_inputs_stay_finite(name, size):
    """All +1e4, all -1e4, or either at random; beside ordinary values of the other arguments."""
    proof, x, rng = PROOFS[name], inputs(name, 7), np.random.default_rng(7)
    for n in proof.extreme:
        x[n] = np.where(rng.random(x[n].shape) < 0.5, 1e4, -1e4) if size is None else np.full(x[n].shape, size)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(program(name)[0](**arrays(x))))
    if proof.wrt:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(name, x, ones(name, x))))


@pytest.mark.parametrize("name", [name for name in PROOFS if TAKES[name] & MASKS])
def test_nothing_to_count_gives_zero(name):
    """Empty masks, prompts without candidates or favourites: 0, and gradients of 0."""
    x = inputs(name, 8)
    for n in TAKES[name] & (MASKS | {"favourite_BC", "reward_BT"}):
        x[n] = np.zeros_like(x[n])
    found = jax.tree.leaves(program(name)[0](**arrays(x)))
    if name == "losses.ratio_metrics":
        found[3] = found[3] - 1  # the largest ratio of none is 1
    assert all((np.asarray(leaf) == 0).all() for leaf in found)
    if PROOFS[name].wrt:
        slopes = gradient(name, x, ones(name, x))
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(slopes))


NOT_A_COMPARISON = {"losses.smooth_choice", "losses.reward_centering"}


@pytest.mark.parametrize("name", [n for n in PROOFS if "present_BC" in TAKES[n] and n not in NOT_A_COMPARISON])
def test_a_lone_candidate_teaches_nothing(name):
    found = jax.tree.leaves(program(name)[0](**arrays(inputs(name, 9, SIZES[1]))))
    assert (np.asarray(found[0]) == 0).all()


def test_every_public_function_has_a_proof():
    public = {f"losses.{name}" for name in losses.__all__}
    for module in (kl, returns, vocab_head):
        short = module.__name__.removeprefix("jaxgpt.")
        own = [n for n, f in vars(module).items() if getattr(f, "__module__", None) == module.__name__]
        public |= {f"{short}.{n}" for n in own if not n.startswith("_")}
    assert public - {name.split(",")[0] for name in PROOFS} - set(ELSEWHERE) == set()


def test_pooled_sums_are_those_of_the_whole_batch():
    """Mean and Estimate: parts added, and parts of eight devices under psum."""
    x = arrays(inputs("kl.estimate", 3))
    whole = losses.reduce(*x.values()), kl.estimate(*x.values())
    parts = [[a[i : i + 4] for a in x.values()] for i in (0, 4)]
    for f, all_ in zip((losses.reduce, kl.estimate), whole, strict=True):
        agree(f(*parts[0]) + f(*parts[1]), all_)
        mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
        pooled = jax.shard_map(
            lambda v, m, f=f: jax.lax.psum(f(v, m), "rows"), mesh=mesh, in_specs=(P("rows"), P("rows")), out_specs=P()
        )
        agree(jax.jit(pooled)(*x.values()), all_)
