"""Every function of the loss library: equal to its float64 reference, and unmoved by what must not move it."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import kl, losses, returns, vocab_head
from tests.proofs import EXEMPT, PROOFS, Inputs, Sizes

SIZES = (Sizes(), Sizes(B=1, T=3, C=1, V=2), Sizes(B=3, T=9, C=5, V=11))
MASKS = {"mask", "mask_B", "mask_BT", "present_BC"}
TAKES = {name: set(proof.make(np.random.default_rng(0), Sizes())) for name, proof in PROOFS.items()}
every = pytest.mark.parametrize("name", PROOFS)


def where(condition):
    return pytest.mark.parametrize("name", [name for name, proof in PROOFS.items() if condition(proof)])


def takes(argument: str, *but: str):
    return pytest.mark.parametrize("name", [name for name in PROOFS if argument in TAKES[name] and name not in but])


@functools.cache
def program(name: str):
    """The function jitted, and what it returns with the gradient of a weighted sum of that."""
    proof = PROOFS[name]

    def weighted(moving, still, weights):
        found = proof.ours(**moving, **still)
        return sum((w * leaf).sum() for w, leaf in zip(weights, jax.tree.leaves(found), strict=True)), found

    return jax.jit(proof.ours), jax.jit(jax.grad(weighted, has_aux=True))


def inputs(name: str, seed: int = 0, sizes: Sizes = SIZES[0]) -> Inputs:
    return PROOFS[name].make(np.random.default_rng(seed), sizes)


def arrays(x: Inputs) -> dict[str, jax.Array]:
    cast = {"f": np.float32, "i": np.int32, "b": np.bool_}
    return {name: jnp.asarray(a.astype(cast[a.dtype.kind])) for name, a in x.items()}


def weights_of(name: str, a: dict[str, jax.Array]) -> list[np.ndarray]:
    """What a sum of the outputs weighs them with: uneven, so that no two could be exchanged."""
    leaves = jax.tree.leaves(jax.eval_shape(PROOFS[name].ours, **a))
    return [np.cos(np.arange(1.0, leaf.size + 1)).reshape(leaf.shape) for leaf in leaves]


def with_gradient(name: str, a: dict[str, jax.Array], weights: list | None = None):
    """(outputs, gradients by argument); no gradients where there is nothing to differentiate."""
    wrt = PROOFS[name].wrt
    if not wrt:
        return program(name)[0](**a), {}
    weights = weights_of(name, a) if weights is None else weights
    moving, still = {n: a[n] for n in wrt}, {n: a[n] for n in a if n not in wrt}
    slopes, found = program(name)[1](moving, still, [jnp.asarray(w, jnp.float32) for w in weights])
    return found, slopes


def agree(found, expected, rtol=2e-5, atol=2e-5, least=0.0):
    """Equal trees; `atol` is a share of the largest number of an array (1 at least), `least` comes on top."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        e = np.asarray(e)
        scale = max(1.0, np.abs(e).max(initial=0)) if e.dtype.kind == "f" else 1.0
        np.testing.assert_allclose(np.asarray(f), e, rtol=rtol, atol=atol * scale + least)


def rounded(x: Inputs) -> Inputs:
    """What float32 can hold, in float64: both sides compute with the same numbers."""
    return {n: a.astype(np.float32).astype(np.float64) if a.dtype.kind == "f" else a for n, a in x.items()}


def slopes_agree(name: str, x: Inputs, seed: int, rel: float = 1e-3) -> None:
    """Ours along random directions, against central differences of the float64 reference."""
    rng, proof = np.random.default_rng(seed), PROOFS[name]
    weights = weights_of(name, arrays(x))
    _, found = with_gradient(name, arrays(x), weights)

    def weighted(x: Inputs) -> float:
        return sum((w * leaf).sum() for w, leaf in zip(weights, jax.tree.leaves(proof.reference(**x)), strict=True))

    for _ in range(4):
        u = {n: rng.normal(size=x[n].shape) for n in proof.wrt}
        ahead, behind = ({**x, **{n: x[n] + h * u[n] for n in proof.wrt}} for h in (1e-6, -1e-6))
        expected = (weighted(ahead) - weighted(behind)) / 2e-6
        along = [(np.asarray(found[n], np.float64) * u[n]) for n in proof.wrt]
        size = sum(np.abs(a).sum() for a in along)
        assert sum(a.sum() for a in along) == pytest.approx(expected, rel=rel, abs=rel / 10 * max(size, 1))


@every
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@example(seed=0, sizes=SIZES[1])
@given(seed=st.integers(0, 2**32 - 1), sizes=st.sampled_from(SIZES))
def test_it_is_the_formula(name, seed, sizes):
    x = rounded(inputs(name, seed, sizes))
    agree(program(name)[0](**arrays(x)), PROOFS[name].reference(**x))


@where(lambda proof: proof.wrt)
@pytest.mark.parametrize("seed", [0, 1])
def test_its_gradient_is_that_of_the_formula(name, seed):
    slopes_agree(name, rounded(inputs(name, seed)), seed)


ULP = 2.0**-10  # between neighbouring float32 numbers at 1e4: no answer can be known better than its inputs


@where(lambda proof: proof.extreme)
@pytest.mark.parametrize("size", [1e4, -1e4, None])
def test_extreme_inputs_are_the_formula_too(name, size):
    """All +1e4, all -1e4, or either at random, beside ordinary values of the other arguments."""
    proof, x, rng = PROOFS[name], inputs(name, 7), np.random.default_rng(7)
    for n in proof.extreme:
        x[n] = np.where(rng.random(x[n].shape) < 0.5, 1e4, -1e4) if size is None else np.full(x[n].shape, size)
    x = rounded(x)
    found, slopes = with_gradient(name, arrays(x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, slopes)))
    agree(found, proof.reference(**x), least=ULP)
    if proof.wrt and not proof.kink:
        slopes_agree(name, x, 7, rel=2 * ULP)


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
    """The same numbers. Where rows don't concern each other no device talks to another; shared weights add up."""
    proof, x = PROOFS[name], arrays(inputs(name, 3))
    rows = NamedSharding(jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)), P("rows"))
    placed = {n: jax.device_put(a, NamedSharding(rows.mesh, P()) if n in proof.shared else rows) for n, a in x.items()}
    compiled = program(name)[0].lower(**placed).compile()
    agree(compiled(**placed), program(name)[0](**x), rtol=1e-5, atol=1e-6)
    if proof.rows:
        assert not re.search(r"all-(reduce|gather|to-all)|collective|reduce-scatter", compiled.as_text())
    if proof.shared and proof.wrt:
        agree(with_gradient(name, placed), with_gradient(name, x), rtol=1e-5, atol=1e-6)


@every
def test_a_mesh_with_explicit_axes_is_taken_too(name):
    """`jax.make_mesh`'s own default: shardings are a part of the types, and known while tracing."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = {
            n: jax.device_put(a, NamedSharding(mesh, P() if n in PROOFS[name].shared else P("rows")))
            for n, a in arrays(inputs(name, 3)).items()
        }
        jax.eval_shape(lambda x: with_gradient(name, x), placed)


@where(lambda proof: proof.rows)
def test_parts_of_a_batch_joined_are_the_batch(name):
    proof, x = PROOFS[name], arrays(inputs(name, 4))
    half = [{n: a if n in proof.shared else a[i : i + 4] for n, a in x.items()} for i in (0, 4)]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(program(name)[0](**part) for part in half))
    agree(joined, program(name)[0](**x), rtol=1e-5, atol=1e-6)


def widened(x: Inputs, keep: np.ndarray, rubbish: float, before: int, after: int) -> dict[str, jax.Array]:
    """Arrays with a second axis: rubbish wherever `keep` is False, and more of it at both ends."""
    fill, found = {"f": rubbish, "i": -1, "b": False}, {}
    for n, a in x.items():
        if a.ndim > 1:
            value = fill[a.dtype.kind]
            a = np.pad(np.where(keep, a, value), ((0, 0), (before, after)), constant_values=value)
        found[n] = a
    return arrays(found)


def unmoved_by_rubbish(name: str, x: Inputs, keep: np.ndarray, before: int, after: int) -> None:
    def inner(tree):
        return jax.tree.map(lambda leaf: leaf[:, before : leaf.shape[1] - after] if leaf.ndim > 1 else leaf, tree)

    clean = widened(x, keep, 0.0, 0, 0)
    weights = weights_of(name, clean)
    wide = [np.pad(w, ((0, 0), (before, after)), constant_values=1) if w.ndim > 1 else w for w in weights]
    found, slopes = with_gradient(name, widened(x, keep, 1e3, before, after), wide)
    agree(inner((found, slopes)), with_gradient(name, clean, weights), rtol=1e-5, atol=1e-6)
    outside = ~np.pad(keep, ((0, 0), (before, after)))
    assert all((np.asarray(slope)[outside] == 0).all() for slope in slopes.values() if slope.ndim > 1)
    found = program(name)[0](**widened(x, keep, np.nan, before, after))
    agree(inner(found), program(name)[0](**clean), rtol=1e-5, atol=1e-6)


@where(lambda proof: proof.time)
def test_what_stands_outside_the_mask_changes_nothing(name):
    """Rubbish there, and two more tokens of it before and three behind: the same values, and gradients of 0 there."""
    x = inputs(name, 5)
    unmoved_by_rubbish(name, x, x.get("mask_BT", x.get("mask")), 2, 3)


@takes("present_BC")
def test_absent_candidates_change_nothing(name):
    """Rubbish for those that aren't there, and two more of them: the smaller problem."""
    x = inputs(name, 5)
    unmoved_by_rubbish(name, x, x["present_BC"], 0, 2)


OPTIONAL = {"mask_B", "present_BC"}
NEEDED = {"losses.smooth_choice", "losses.preference_objective"}  # these have no default


@pytest.mark.parametrize("name", [n for n in PROOFS if TAKES[n] & OPTIONAL and n.split(",")[0] not in NEEDED])
def test_no_mask_is_a_full_one(name):
    x = arrays(inputs(name, 6))
    (which,) = TAKES[name] & OPTIONAL
    full = {**x, which: jnp.ones_like(x[which])}
    without = {n: a for n, a in x.items() if n != which}
    agree(program(name)[0](**without), program(name)[0](**full), rtol=1e-6, atol=1e-6)


@where(lambda proof: proof.elementwise)
def test_packing_changes_nothing(name):
    """All rows laid into one."""
    proof, x = PROOFS[name], arrays(inputs(name, 6))
    axes = jax.tree.leaves(jax.eval_shape(proof.ours, **x))[0].ndim
    row = {n: a if n in proof.shared else a.reshape(1, -1, *a.shape[axes:]) for n, a in x.items()}
    flat = jax.tree.map(lambda leaf: leaf.reshape(1, -1), program(name)[0](**x))
    agree(program(name)[0](**row), flat, rtol=1e-5, atol=1e-6)


EMPTY = {  # what these give for nothing, instead of 0
    "losses.ratio_metrics": (0, 0, 0, 1, 0),  # the largest ratio of none is 1
    "returns.normalisation": (1, 0),
    "kl.AdaptiveKL": (np.float32(0.1),),  # beta stays
}


@pytest.mark.parametrize("name", [name for name in PROOFS if TAKES[name] & MASKS])
def test_nothing_to_count_gives_zero(name):
    """Empty masks, prompts without candidates or favourites: 0, and gradients of 0."""
    x = inputs(name, 8)
    for n in TAKES[name] & (MASKS | {"favourite_BC"}):
        x[n] = np.zeros_like(x[n])
    if "beta" in x:
        x["beta"] = np.full((), 0.1)
    found, slopes = with_gradient(name, arrays(x))
    leaves = jax.tree.leaves(found)
    for leaf, expected in zip(leaves, EMPTY.get(name, [0] * len(leaves)), strict=True):
        assert (np.asarray(leaf) == expected).all()
    assert all((np.asarray(slope) == 0).all() for slope in jax.tree.leaves(slopes))


@takes("present_BC", "losses.smooth_choice", "losses.reward_centering", "losses.preference_objective, accuracy")
def test_a_lone_candidate_teaches_nothing(name):
    """One candidate, or one present of several, has no rival: 0 with gradients of 0."""
    lone = inputs(name, 9, SIZES[1])
    several = inputs(name, 9)
    several["present_BC"] = np.arange(4) == np.arange(8)[:, None] % 4
    if "choice_B" in several:
        several["choice_B"] = np.arange(8) % 4
    for n in TAKES[name] & {"favourite_BC", "rank_BC", "tied_BC"}:
        several[n] = several["present_BC"] if n == "favourite_BC" else np.where(several["present_BC"], 0, -1)
    if "weight_BC" in several:
        several["weight_BC"] = several["present_BC"].astype(float)
    for x in (lone, several):
        found, slopes = with_gradient(name, arrays(x))
        for leaf in jax.tree.leaves((found, slopes)):
            np.testing.assert_allclose(leaf, 0, atol=1e-6)


def test_logits_of_ten_thousand_pass_through_a_whole_update():
    """From logits of +-1e4 to PPO's and GSPO's loss with k3: finite; log-ratios held at 20 and counted."""
    rng = np.random.default_rng(0)
    now, before = (jnp.asarray(1e4 * rng.choice([-1.0, 1.0], (4, 6, 5)), jnp.float32) for _ in range(2))
    tokens, advantage = jnp.asarray(rng.integers(0, 5, (4, 6))), jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    mask = jnp.ones((4, 6), bool).at[0, 3:].set(False)

    def loss(logits):
        logp, old_logp = losses.log_prob(logits, tokens), losses.log_prob(before, tokens)
        d = losses.log_ratio(logp, old_logp)
        terms = {"ppo": losses.ppo_clip(d, advantage), "dual": losses.dual_clip(d, advantage),
                 "k3": kl.k3(logp, old_logp), "entropy": losses.entropy(logits)}  # fmt: skip
        gspo = losses.ppo_clip(losses.sequence_log_ratio(logp, old_logp, mask), advantage[:, 0])
        mean, metrics = losses.combine(terms, mask)
        return mean.value + losses.reduce(gspo).value, (metrics, losses.ratio_metrics(d, advantage, mask), d)

    (value, (metrics, watched, d)), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(now)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, metrics, watched, slope)))
    assert float(jnp.abs(d).max()) == 20 and float(watched["ratio_max"]) == pytest.approx(np.exp(20), rel=1e-6)
    held = float((jnp.abs(d) == 20)[mask].mean())
    assert 0 < held < 1 and float(watched["clamp_fraction"].value) == pytest.approx(held)


def test_every_public_name_is_proved_or_exempt():
    """A new function without a proof fails here, and so does an entry that proves nothing any more."""
    public = {f"losses.{name}" for name in losses.__all__}
    for module in (kl, returns, vocab_head):
        short = module.__name__.removeprefix("jaxgpt.")
        own = [n for n, x in vars(module).items() if getattr(x, "__module__", module.__name__) == module.__name__]
        public |= {f"{short}.{n}" for n in own if not n.startswith("_") and not inspect.ismodule(vars(module)[n])}
    proved = {name.split(",")[0] for name in PROOFS}
    assert public == proved | set(EXEMPT) and not proved & set(EXEMPT)


def test_pooled_sums_are_those_of_the_whole_batch():
    """Mean, combined terms and Estimate: parts added, and parts of eight devices under psum."""
    x = arrays(inputs("kl.estimate", 3))
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

    def both(v, m):
        return losses.combine({"a": v, "b": v**2}, m, {"b": 0.5})[0]

    for f in (losses.reduce, both, kl.estimate):
        whole, parts = f(*x.values()), [f(*(a[i : i + 4] for a in x.values())) for i in (0, 4)]
        agree(parts[0] + parts[1], whole)
        pooled = jax.shard_map(
            lambda v, m, f=f: jax.lax.psum(f(v, m), "rows"), mesh=mesh, in_specs=(P("rows"), P("rows")), out_specs=P()
        )
        agree(jax.jit(pooled)(*x.values()), whole)
