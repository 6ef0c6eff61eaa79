"""Every loss function equals its float64 reference, and is invariant to what must not affect it.

All cases of a function (seeds, extreme values, garbage outside masks, nothing to count) have the same shape, so that
one program computes the values and gradients of all of them: jit(vmap(grad)). The tests read its results.
"""

import functools
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import losses
from jaxgpt.losses import kl, returns, vocab_head
from tests.losses.proofs import EXEMPT, PROOFS, Inputs, Proof, Sizes

SIZE, OTHER_SIZES = Sizes(), (Sizes(B=1, T=3, C=1, V=2), Sizes(B=3, T=9, C=5, V=11))
SEEDS = range(4)
MASKS = {"mask", "mask_B", "mask_BT", "present_BC"}
TAKES = {name: set(proof.make(np.random.default_rng(0), SIZE)) for name, proof in PROOFS.items()}
NO_RIVAL = ("losses.smooth_choice", "losses.reward_centering", "losses.favourite_hits")
every = pytest.mark.parametrize("name", PROOFS)


def where(condition):
    return pytest.mark.parametrize("name", [name for name, proof in PROOFS.items() if condition(name, proof)])


def inputs(name: str, seed: int = 0, sizes: Sizes = SIZE) -> Inputs:
    """Float32 values in float64, so that the function and its reference compute with the same numbers."""
    x = PROOFS[name].make(np.random.default_rng(seed), sizes)
    return {n: a.astype(np.float32).astype(np.float64) if a.dtype.kind == "f" else a for n, a in x.items()}


def arrays(x: Inputs) -> dict[str, jax.Array]:
    cast = {"f": np.float32, "i": np.int32, "b": np.bool_}
    return {name: jnp.asarray(a.astype(cast[a.dtype.kind])) for name, a in x.items()}


def weights_of(name: str, a: dict[str, jax.Array]) -> list[np.ndarray]:
    """The weights of the sum that is differentiated: all different, so that swapped outputs would be noticed."""
    leaves = jax.tree.leaves(jax.eval_shape(PROOFS[name].ours, **a))
    return [np.cos(np.arange(1.0, leaf.size + 1)).reshape(leaf.shape) for leaf in leaves]


def with_gradient(name: str, a: dict[str, jax.Array]):
    """(outputs, gradients by argument) of the weighted sum; no gradients if there is nothing to differentiate."""
    proof, weights = PROOFS[name], [jnp.asarray(w, jnp.float32) for w in weights_of(name, a)]
    if not proof.wrt:
        return proof.ours(**a), {}

    def weighted(moving, still):
        found = proof.ours(**moving, **still)
        return sum((w * leaf).sum() for w, leaf in zip(weights, jax.tree.leaves(found), strict=True)), found

    moving, still = {n: a[n] for n in proof.wrt}, {n: a[n] for n in a if n not in proof.wrt}
    slopes, found = jax.grad(weighted, has_aux=True)(moving, still)
    return found, slopes


# ---- the cases ----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    given: Inputs  # passed to our function
    meant: Inputs  # passed to the reference


def polluted(x: Inputs, keep: np.ndarray, rubbish: float) -> Inputs:
    """Garbage wherever `keep` [B, T or C] is False."""
    fill = {"f": rubbish, "i": -1, "b": False}
    return {n: np.where(keep, a, fill[a.dtype.kind]) if a.ndim > 1 else a for n, a in x.items()}


def counted(name: str, x: Inputs) -> np.ndarray | None:
    """What counts along the second axis: the tokens inside the mask, or the candidates that are present."""
    if "present_BC" in x:
        return x["present_BC"]
    return x.get("mask_BT", x.get("mask")) if PROOFS[name].time else None


def nothing(name: str) -> Inputs:
    """Empty masks, prompts without candidates or favourites."""
    x = inputs(name, 8)
    for n in TAKES[name] & (MASKS | {"favourite_BC"}):
        x[n] = np.zeros_like(x[n])
    return {**x, "beta": np.full((), 0.1)} if "beta" in x else x


def lone(name: str) -> Inputs:
    """One candidate present of several."""
    x = inputs(name, 9)
    x["present_BC"] = np.arange(SIZE.C) == np.arange(SIZE.B)[:, None] % SIZE.C
    if "choice_B" in x:
        x["choice_B"] = np.arange(SIZE.B) % SIZE.C
    for n in TAKES[name] & {"favourite_BC", "rank_BC", "tied_BC"}:
        x[n] = x["present_BC"] if n == "favourite_BC" else np.where(x["present_BC"], 0, -1)
    if "weight_BC" in x:
        x["weight_BC"] = x["present_BC"].astype(float)
    return x


def exchanged(name: str, x: Inputs, y: Inputs, axes: int) -> Inputs:
    """`x` with every other row (axes = 1) or element (axes = 2) replaced by `y`'s, as if batched differently."""
    found = {}
    for n, a in x.items():
        if n in PROOFS[name].shared:
            found[n] = a
            continue
        other = np.arange(np.prod(a.shape[:axes], dtype=int)).reshape(a.shape[:axes]) % 2 == 1
        found[n] = np.where(other.reshape(other.shape + (1,) * (a.ndim - other.ndim)), y[n], a)
    return found


@functools.cache
def cases(name: str) -> dict[str, Case]:
    proof = PROOFS[name]
    found = {f"seed {seed}": inputs(name, seed) for seed in SEEDS}
    for n in proof.shared:  # so that rows of seeds 0 and 1 can be swapped
        found["seed 1"][n] = found["seed 0"][n]
    for size in ("+1e4", "-1e4", "+-1e4") if proof.extreme else ():
        x, rng = inputs(name, 7), np.random.default_rng(7)
        for n in proof.extreme:
            high = rng.random(x[n].shape) < 0.5 if size == "+-1e4" else size == "+1e4"
            x[n] = np.where(high, np.full(x[n].shape, 1e4), -1e4)
        found[f"extreme {size}"] = x
    if proof.rows:
        found["rows exchanged"] = exchanged(name, found["seed 0"], found["seed 1"], 1)
    if proof.elementwise:
        found["elements exchanged"] = exchanged(name, found["seed 0"], found["seed 1"], 2)
    if TAKES[name] & MASKS:
        found["nothing"] = nothing(name)
    if "present_BC" in TAKES[name] and name not in NO_RIVAL:
        found["lone"] = lone(name)
    all_cases = {case: Case(x, x) for case, x in found.items()}
    x = inputs(name, 5)
    if (keep := counted(name, x)) is not None:
        all_cases |= {f"rubbish {bad}": Case(polluted(x, keep, bad), x) for bad in (1e3, np.nan)}
        all_cases["clean"] = Case(polluted(x, keep, 0.0), x)
    return all_cases


@functools.cache
def outcome(name: str) -> dict[str, tuple]:
    """{case: (outputs, gradients)}, all computed by one program, without implicit promotion of dtypes."""
    stacked = [arrays(case.given) for case in cases(name).values()]
    stacked = {n: np.stack([x[n] for x in stacked]) for n in stacked[0]}
    with jax.numpy_dtype_promotion("strict"):
        found = jax.device_get(jax.jit(jax.vmap(lambda x: with_gradient(name, x)))(stacked))
    return {case: jax.tree.map(lambda leaf, i=i: leaf[i], found) for i, case in enumerate(cases(name))}


def agree(found, expected, rtol=2e-5, atol=2e-5, least=0.0, case=""):
    """Equal trees; `atol` is relative to the largest number of an array (at least 1), `least` is added to it."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        e = np.asarray(e)
        scale = max(1.0, np.abs(e).max(initial=0)) if e.dtype.kind == "f" else 1.0
        np.testing.assert_allclose(np.asarray(f), e, rtol=rtol, atol=atol * scale + least, err_msg=case)


def slopes_agree(name: str, case: str, rel: float = 1e-3) -> None:
    """Our gradients along random directions, against central differences of the float64 reference."""
    rng, proof, x = np.random.default_rng(0), PROOFS[name], cases(name)[case].meant
    _, found = outcome(name)[case]
    weights = weights_of(name, arrays(x))

    def weighted(x: Inputs) -> float:
        return sum((w * leaf).sum() for w, leaf in zip(weights, jax.tree.leaves(proof.reference(**x)), strict=True))

    for _ in range(4):
        u = {n: rng.normal(size=x[n].shape) for n in proof.wrt}
        ahead, behind = ({**x, **{n: x[n] + h * u[n] for n in proof.wrt}} for h in (1e-6, -1e-6))
        expected = (weighted(ahead) - weighted(behind)) / 2e-6
        along = [(np.asarray(found[n], np.float64) * u[n]) for n in proof.wrt]
        size = sum(np.abs(a).sum() for a in along)
        assert sum(a.sum() for a in along) == pytest.approx(expected, rel=rel, abs=rel / 10 * max(size, 1)), case


# ---- the properties -----------------------------------------------------------------------------------------------


@every
def test_it_is_the_formula(name):
    for case in (f"seed {seed}" for seed in SEEDS):
        agree(outcome(name)[case][0], PROOFS[name].reference(**cases(name)[case].meant), case=case)


@where(lambda name, proof: proof.wrt)
def test_its_gradient_is_that_of_the_formula(name):
    for case in ("seed 0", "seed 1"):
        slopes_agree(name, case)


ULP = 2.0**-10  # spacing of float32 numbers near 1e4: no result can be more precise than its inputs


@where(lambda name, proof: proof.extreme)
@pytest.mark.parametrize("size", ["+1e4", "-1e4", "+-1e4"])
def test_extreme_inputs_are_the_formula_too(name, size):
    """All +1e4, all -1e4, or either at random, with ordinary values for the other arguments."""
    case, proof = f"extreme {size}", PROOFS[name]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome(name)[case]))
    agree(outcome(name)[case][0], proof.reference(**cases(name)[case].meant), least=ULP)
    if proof.wrt and not proof.kink:
        slopes_agree(name, case, rel=2 * ULP)


@pytest.mark.parametrize(
    ("name", "what", "axes"),
    [(name, "rows", 1) for name, proof in PROOFS.items() if proof.rows]
    + [(name, "elements", 2) for name, proof in PROOFS.items() if proof.elementwise],
)
def test_rows_and_elements_depend_on_themselves_alone(name, what, axes):
    """Swapping every other row (or token) of two batches swaps values and gradients too, bit for bit.

    So batches may be split, joined and packed."""
    found, here, there = (own(name, case) for case in (f"{what} exchanged", "seed 0", "seed 1"))
    for f, a, b in zip(*map(jax.tree.leaves, (found, here, there)), strict=True):
        own_axes = f.shape[:axes]
        other = (np.arange(np.prod(own_axes, dtype=int)).reshape(own_axes) % 2 == 1).reshape(
            own_axes + (1,) * (f.ndim - len(own_axes))
        )
        np.testing.assert_array_equal(f, np.where(other, b, a))


def own(name: str, case: str):
    """Outputs and gradients that have rows; the gradient of shared weights is summed over all rows."""
    found, slopes = outcome(name)[case]
    return found, {n: slope for n, slope in slopes.items() if n not in PROOFS[name].shared}


@where(lambda name, proof: "clean" in cases(name))
def test_what_does_not_count_changes_nothing(name):
    """Garbage outside the mask, or for absent candidates: the same values, and gradients of 0 there. With NaN: the same
    values."""
    clean, rubbish, nan = (outcome(name)[case] for case in ("clean", "rubbish 1000.0", "rubbish nan"))
    expected = PROOFS[name].reference(**cases(name)["clean"].meant)
    for case, (found, _) in {"clean": clean, "1e3": rubbish, "nan": nan}.items():
        agree(found, expected, case=case)
    agree(rubbish[1], clean[1], rtol=1e-5, atol=1e-6)
    keep = counted(name, cases(name)["clean"].meant)
    assert all((slope[~keep] == 0).all() for slope in rubbish[1].values() if slope.ndim > 1)


EMPTY = {  # results other than 0 for empty input
    "losses.ratio_metrics": (0, 0, 0, 1, 0),  # the largest ratio is 1 if there are none
    "returns.fit_normalisation": (1, 0),
    "kl.AdaptiveKL": (np.float32(0.1),),  # beta stays
}


@where(lambda name, proof: TAKES[name] & MASKS)
def test_nothing_to_count_gives_zero(name):
    """Empty masks, prompts without candidates or favourites: 0, and gradients of 0."""
    found, slopes = outcome(name)["nothing"]
    leaves = jax.tree.leaves(found)
    for leaf, expected in zip(leaves, EMPTY.get(name, [0] * len(leaves)), strict=True):
        assert (leaf == expected).all()
    assert all((slope == 0).all() for slope in slopes.values())


def empty(name: str, size: int) -> dict[str, jax.Array]:
    """Zeros in the inputs' shapes, without the axis of this size."""
    return arrays(
        {n: np.zeros([d * (d != size) for d in a.shape], a.dtype) for n, a in cases(name)["seed 0"].given.items()}
    )


def test_an_empty_batch_is_no_error():
    """No tokens, or no rows."""
    for name in PROOFS:
        has_time = any(SIZE.T in a.shape for a in cases(name)["seed 0"].given.values())
        for size in (SIZE.T, SIZE.B) if name.startswith("vocab_head") else (SIZE.T if has_time else SIZE.B,):
            jax.eval_shape(PROOFS[name].ours, **empty(name, size))


@pytest.mark.parametrize("given", ["bfloat16", "float64"])
@where(lambda name, proof: name not in ("losses.smooth_choice", "returns.last_token_mask"))  # no numbers go in
def test_dtypes_are_promoted_at_entry_and_never_by_chance(name, given):
    """bfloat16 is cast to float32 before anything is computed, float64 stays, and nothing is promoted implicitly."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x = {
            n: jnp.asarray(a.astype(given) if a.dtype.kind == "f" else a)
            for n, a in cases(name)["seed 0"].given.items()
        }
        program, found = jax.make_jaxpr(PROOFS[name].ours, return_shape=True)(**x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {given.replace("bfloat16", "float32")}
    if not name.startswith("vocab_head"):  # its product is in the dtype of the hidden states
        assert str(program).count(":bf16[") == sum(a.dtype == "bfloat16" for a in x.values())


@where(lambda name, proof: "present_BC" in TAKES[name] and name not in NO_RIVAL)
def test_a_lone_candidate_teaches_nothing(name):
    """A single present candidate has no rival: 0 with gradients of 0."""
    for leaf in jax.tree.leaves(outcome(name)["lone"]):
        np.testing.assert_allclose(leaf, 0, atol=1e-6)


OPTIONAL = {"mask_B", "present_BC"}
NEEDED = {"losses.smooth_choice", "losses.preference_objective"}  # these require `present`


@where(lambda name, proof: TAKES[name] & OPTIONAL and name.split(",")[0] not in NEEDED)
def test_no_mask_is_a_full_one(name):
    x = inputs(name, 6)
    (which,) = TAKES[name] & OPTIONAL
    without = {n: a for n, a in arrays(x).items() if n != which}
    agree(jax.jit(PROOFS[name].ours)(**without), PROOFS[name].reference(**{**x, which: np.ones_like(x[which])}))


@pytest.mark.slow  # the library's other tests call it without jit too
@every
def test_without_jit_and_vmap_it_is_the_same(name):
    agree(PROOFS[name].ours(**arrays(inputs(name, 0))), outcome(name)["seed 0"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@every
@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=["smallest", "larger"])
def test_other_sizes_are_the_formula_too(name, sizes):
    """One row, one candidate, a vocabulary of two; and odd sizes."""
    x = inputs(name, 0, sizes)
    found, slopes = jax.jit(lambda x: with_gradient(name, x))(arrays(x))
    agree(found, PROOFS[name].reference(**x))
    if sizes.C == 1 and "present_BC" in x and name not in NO_RIVAL:
        for leaf in jax.tree.leaves((found, slopes)):
            np.testing.assert_allclose(leaf, 0, atol=1e-6)


# ---- eight devices ------------------------------------------------------------------------------------------------


def alone(proof: Proof) -> bool:
    return proof.rows and not proof.shared


@pytest.mark.parametrize(
    "name", [name if not alone(proof) else pytest.param(name, marks=pytest.mark.slow) for name, proof in PROOFS.items()]
)
def test_rows_divided_among_eight_devices(name):
    """The same numbers. Where rows are independent, devices don't communicate; shared gradients are summed."""
    proof, x = PROOFS[name], arrays(inputs(name, 0))
    rows = NamedSharding(jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)), P("rows"))
    placed = {n: jax.device_put(a, NamedSharding(rows.mesh, P()) if n in proof.shared else rows) for n, a in x.items()}
    compiled = jax.jit(lambda x: with_gradient(name, x)).lower(placed).compile()
    agree(compiled(placed), outcome(name)["seed 0"], rtol=1e-5, atol=1e-6)
    if alone(proof):
        assert not re.search(r"all-(reduce|gather|to-all)|collective|reduce-scatter", compiled.as_text())


@every
def test_a_mesh_with_explicit_axes_is_taken_too(name):
    """`jax.make_mesh`'s default: shardings are part of the types, and known while tracing."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = {
            n: jax.device_put(a, NamedSharding(mesh, P() if n in PROOFS[name].shared else P("rows")))
            for n, a in arrays(inputs(name, 3)).items()
        }
        jax.eval_shape(lambda x: with_gradient(name, x), placed)


# ---- all of them together -----------------------------------------------------------------------------------------


def test_logits_of_ten_thousand_pass_through_a_whole_update():
    """From logits of +-1e4 to PPO's and GSPO's loss with k3: finite; log-ratios are clipped at 20 and counted."""
    rng = np.random.default_rng(0)
    now, before = (jnp.asarray(1e4 * rng.choice([-1.0, 1.0], (4, 6, 5)), jnp.float32) for _ in range(2))
    tokens, advantage = jnp.asarray(rng.integers(0, 5, (4, 6))), jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    mask = jnp.ones((4, 6), bool).at[0, 3:].set(False)

    def loss(logits):
        logp, old_logp = losses.log_prob(logits, tokens), losses.log_prob(before, tokens)
        d = losses.log_ratio(logp, old_logp)
        terms = {
            "ppo": losses.ppo_clip(d, advantage),
            "dual": losses.dual_clip(d, advantage),
            "k3": kl.k3(logp, old_logp),
            "entropy": losses.entropy(logits),
        }
        gspo = losses.ppo_clip(losses.sequence_log_ratio(logp, old_logp, mask), advantage[:, 0])
        mean, metrics = losses.combine(terms, mask)
        return mean.value + losses.reduce(gspo).value, (metrics, losses.ratio_metrics(d, advantage, mask), d)

    (value, (metrics, watched, d)), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(now)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, metrics, watched, slope)))
    assert float(jnp.abs(d).max()) == 20 and float(watched["ratio_max"]) == pytest.approx(np.exp(20), rel=1e-6)
    held = float((jnp.abs(d) == 20)[mask].mean())
    assert 0 < held < 1 and float(watched["clamp_fraction"].value) == pytest.approx(held)


def test_every_public_name_is_proved_or_exempt():
    """A new function without a proof fails here, and so does an entry for a function that no longer exists."""
    public = {f"losses.{name}" for name in losses.__all__}
    for module in (kl, returns, vocab_head):
        short = module.__name__.removeprefix("jaxgpt.losses.")
        own = [n for n, x in vars(module).items() if getattr(x, "__module__", module.__name__) == module.__name__]
        public |= {f"{short}.{n}" for n in own if not n.startswith("_") and not inspect.ismodule(vars(module)[n])}
    proved = {name.split(",")[0] for name in PROOFS}
    assert public == proved | set(EXEMPT) and not proved & set(EXEMPT)


def test_pooled_sums_are_those_of_the_whole_batch():
    """Mean, combined terms and Estimate: parts added with `+`, and parts on eight devices with psum."""
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
