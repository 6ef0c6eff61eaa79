"""References: each public function of the loss library, and an independent implementation in float64 NumPy.

The references are written from the papers, with plain loops where those read best, and share no code with the library.
`tests/losses/test_proofs.py` compares every function with its reference, and checks its invariances.
"""

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import losses
from jaxgpt.losses import kl, returns, vocab_head

Inputs = dict[str, np.ndarray]


class Sizes(NamedTuple):
    """B rows, T tokens, C candidates, a vocabulary of V, D hidden units."""

    B: int = 8
    T: int = 6
    C: int = 4
    V: int = 7
    D: int = 5


@dataclasses.dataclass(frozen=True)
class Proof:
    """A function of keyword arrays, its reference, and its properties."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[np.random.Generator, Sizes], Inputs]
    wrt: tuple[str, ...] = ()  # arguments that carry a gradient
    rows: bool = True  # each row of the output depends only on that row of the inputs
    elementwise: bool = False  # each leading element of the output depends only on that element of the inputs
    time: bool = False  # axis 1 is time, and tokens outside `mask` don't count
    shared: tuple[str, ...] = ()  # arguments without a row axis
    extreme: tuple[str, ...] = ()  # arguments that may be +-1e4
    kink: bool = False  # not differentiable where those are all equal


# ---- inputs -------------------------------------------------------------------------------------------------------


def mask_of(rng: np.random.Generator, s: Sizes, empty: bool = True) -> np.ndarray:
    """One answer a row, ragged at both ends; the last of several rows is empty."""
    start = rng.integers(0, max(s.T // 2, 1), s.B)
    length = rng.integers(1, s.T // 2 + 1, s.B)
    if empty and s.B > 1:
        length[-1] = 0
    t = np.arange(s.T)
    return (t >= start[:, None]) & (t < (start + length)[:, None])


def logps(*names: str) -> Callable[[np.random.Generator, Sizes], Inputs]:
    """Log-probabilities [B, T] under those names, and a mask."""

    def make(rng: np.random.Generator, s: Sizes) -> Inputs:
        return {**{name: -np.abs(rng.normal(1.5, 1.0, (s.B, s.T))) for name in names}, "mask_BT": mask_of(rng, s)}

    return make


def without(make: Callable[[np.random.Generator, Sizes], Inputs], *names: str, **more: str) -> Any:
    """Inputs without some of them; `more` renames."""

    def made(rng: np.random.Generator, s: Sizes) -> Inputs:
        return {more.get(name, name): x for name, x in make(rng, s).items() if name not in names}

    return made


def normals(**shapes: str) -> Callable[[np.random.Generator, Sizes], Inputs]:
    """Normal arrays by name, with axes such as "BT"."""
    return lambda rng, s: {n: rng.normal(0, 1.5, [getattr(s, axis) for axis in axes]) for n, axes in shapes.items()}


def words(rng: np.random.Generator, s: Sizes) -> Inputs:
    return {"logits": rng.normal(0, 2, (s.B, s.T, s.V)), "tokens": rng.integers(0, s.V, (s.B, s.T))}


def head(rng: np.random.Generator, s: Sizes) -> Inputs:
    return {
        "hidden": rng.normal(0, 1, (s.B, s.T, s.D)),
        "head_VD": rng.normal(0, 1, (s.V, s.D)),
        "tokens": rng.integers(0, s.V, (s.B, s.T)),
    }


def candidates(*names: str) -> Callable[[np.random.Generator, Sizes], Inputs]:
    """Scores [B, C], presence (of at least one), and the requested labels: choice, rank, tied, favourite, weight."""

    def make(rng: np.random.Generator, s: Sizes) -> Inputs:
        present = np.arange(s.C) < rng.integers(1, s.C + 1, s.B)[:, None]
        present = rng.permuted(present, axis=1)
        order = np.where(present, rng.random((s.B, s.C)), 2.0).argsort(1).argsort(1)
        kept = rng.integers(1, s.C + 1, s.B)[:, None]  # this many are ranked, the others known only to be worse
        weight = np.where(present, rng.random((s.B, s.C)), 0)
        made = {
            "scores_BC": rng.normal(0, 2, (s.B, s.C)),
            "choice_B": order.argmin(1),
            "rank_BC": np.where(order < kept, order, -1),
            "tied_BC": np.minimum(order, s.C - 2) if s.C > 1 else order,  # the last two may tie
            "favourite_BC": order < np.minimum(rng.integers(0, 3, s.B), present.sum(1))[:, None],
            "weight_BC": weight / weight.sum(1, keepdims=True),
            "margin_B": rng.random(s.B),
            "logp_BC": rng.normal(-20, 3, (s.B, s.C)),
            "ref_logp_BC": rng.normal(-20, 3, (s.B, s.C)),
            "present_BC": present,
        }
        return {name: made[name] for name in (*names, "present_BC")}

    return make


def pair(*names: str, low: float = -3.0, high: float = 3.0) -> Callable[[np.random.Generator, Sizes], Inputs]:
    return lambda rng, s: {name: rng.uniform(low, high, s.B) for name in names}


def marked(rng: np.random.Generator, s: Sizes) -> Inputs:
    return {"log_ratio": rng.normal(0, 3, s.B), "desirable": rng.random(s.B) < 0.5}


def ratios(rng: np.random.Generator, s: Sizes) -> Inputs:
    return {"log_ratio": rng.normal(0, 0.5, (s.B, s.T)), "advantage": rng.normal(0, 1, (s.B, s.T))}


def masked_ratios(rng: np.random.Generator, s: Sizes) -> Inputs:
    return {**ratios(rng, s), "mask": mask_of(rng, s)}


def episodes(rng: np.random.Generator, s: Sizes) -> Inputs:
    mask = mask_of(rng, s)
    return {"reward_BT": rng.normal(size=mask.shape), "value_BT": rng.normal(size=mask.shape), "mask_BT": mask}


def scored(rng: np.random.Generator, s: Sizes) -> Inputs:
    mask = mask_of(rng, s)
    return {"score_B": rng.normal(size=s.B), "kl_BT": rng.normal(size=mask.shape), "mask_BT": mask}


def masked(*names: str) -> Callable[[np.random.Generator, Sizes], Inputs]:
    """Arrays [B, T] under those names, and a mask."""
    return lambda rng, s: {**{name: rng.normal(3, 2, (s.B, s.T)) for name in names}, "mask": mask_of(rng, s)}


def pooled(name: str, mean: float) -> Callable[[np.random.Generator, Sizes], Inputs]:
    """One number per row, and which rows count (at least the first two)."""
    return lambda rng, s: {
        name: rng.normal(mean, 2, max(s.B, 2)),
        "mask_B": np.arange(max(s.B, 2)) < rng.integers(2, s.B + 2),
    }


def spent(rng: np.random.Generator, s: Sizes) -> Inputs:
    return {"beta": rng.uniform(0.05, 0.2, ()), **logps("values_BT")(rng, s)}


# ---- formulas -----------------------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_z(x: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(x, -1)


def sigmoid(x: Any) -> Any:
    return (1 + np.tanh(x / 2)) / 2


def log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0, -x)


def gather(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, index[..., None], -1)[..., 0]


def spread(logits: np.ndarray) -> np.ndarray:
    return -(softmax(logits) * log_softmax(logits)).sum(-1)


def luce(scores: np.ndarray, favourites: list[int], among: list[int], tie: list[float]) -> float:
    """-log of Davidson and Luce's probability, by listing every subset. `tie` = [delta_1, delta_2, ...]."""
    if not favourites:
        return 0.0
    log_worth = lambda subset: math.log(tie[len(subset) - 1]) + scores[list(subset)].mean()  # noqa: E731
    subsets = [T for t in range(1, len(tie) + 1) for T in combinations(among, t)]
    return float(np.logaddexp.reduce([log_worth(T) for T in subsets]) - log_worth(favourites))


def favourites(scores_BC: np.ndarray, favourite_BC: np.ndarray, present_BC: np.ndarray, tie: list[float]) -> np.ndarray:
    rows = zip(scores_BC, favourite_BC, present_BC, strict=True)
    return np.array([luce(s, list(np.flatnonzero(f)), list(np.flatnonzero(p)), tie) for s, f, p in rows])


def preference(
    scores_BC: np.ndarray, choice_B: np.ndarray, present_BC: np.ndarray, margin_B: np.ndarray | None = None
) -> np.ndarray:
    values = []
    for b, (scores, choice, present) in enumerate(zip(scores_BC, choice_B, present_BC, strict=True)):
        scores = scores.copy()
        if margin_B is not None:
            scores[choice] -= margin_B[b]
        values.append(log_z(scores[present]) - scores[choice])
    return np.array(values)


def ranking(scores_BC: np.ndarray, rank_BC: np.ndarray, present_BC: np.ndarray, tie: list[float]) -> np.ndarray:
    values = []
    for scores, rank, present in zip(scores_BC, rank_BC, present_BC, strict=True):
        left, value = [c for c in range(len(scores)) if present[c]], 0.0
        for r in sorted({int(rank[c]) for c in left} - {-1}):
            best = [c for c in left if rank[c] == r]
            value += luce(scores, best, left, tie)
            left = [c for c in left if c not in best]
        values.append(value)
    return np.array(values)


def all_pairs(scores_BC: np.ndarray, rank_BC: np.ndarray, present_BC: np.ndarray) -> np.ndarray:
    values = []
    for scores, rank, present in zip(scores_BC, rank_BC, present_BC, strict=True):
        rank = [len(rank) if r < 0 else r for r in rank]
        found = [
            -log_sigmoid(scores[i] - scores[j])
            for i in range(len(rank))
            for j in range(len(rank))
            if present[i] and present[j] and rank[i] < rank[j]
        ]
        values.append(np.mean(found) if found else 0.0)
    return np.array(values)


def soft(scores_BC: np.ndarray, weight_BC: np.ndarray, present_BC: np.ndarray) -> np.ndarray:
    return np.array(
        [-(w[p] * log_softmax(s[p])).sum() for s, w, p in zip(scores_BC, weight_BC, present_BC, strict=True)]
    )


def smooth(choice_B: np.ndarray, present_BC: np.ndarray, epsilon: float) -> np.ndarray:
    weight = np.zeros(present_BC.shape)
    for b, present in enumerate(present_BC):
        others = [c for c in np.flatnonzero(present) if c != choice_B[b]]
        weight[b, choice_B[b]] = 1 - epsilon if others else 1
        weight[b, others] = epsilon / max(len(others), 1)
    return weight


def conservative(logp_BC: Any, ref_logp_BC: Any, choice_B: Any, present_BC: Any, beta: float, epsilon: float) -> Any:
    h = beta * (logp_BC - ref_logp_BC)
    values = []
    for b in range(len(h)):
        of = [preference(h[b : b + 1], np.array([c]), present_BC[b : b + 1])[0] for c in range(h.shape[1])]
        others = [of[c] for c in np.flatnonzero(present_BC[b]) if c != choice_B[b]]
        doubt = epsilon if others else 0.0
        values.append((1 - doubt) * of[choice_B[b]] + doubt * (np.mean(others) if others else 0.0))
    return np.array(values)


def hits(scores_BC: np.ndarray, favourite_BC: np.ndarray, present_BC: np.ndarray) -> np.ndarray:
    rows = zip(scores_BC, favourite_BC, present_BC, strict=True)
    return np.array([np.mean(f[p & (s == s[p].max())]) for s, f, p in rows])


def odds(mean_logp: np.ndarray) -> np.ndarray:
    mean_logp = np.minimum(mean_logp, -1e-6)
    return mean_logp - np.log(-np.expm1(mean_logp))


def clipped(log_ratio: np.ndarray, advantage: np.ndarray, low: float, high: float) -> np.ndarray:
    r = np.exp(log_ratio)
    return -np.minimum(r * advantage, np.clip(r, 1 - low, 1 + high) * advantage)


def dual(log_ratio: np.ndarray, advantage: np.ndarray, clip: float, limit: float) -> np.ndarray:
    objective = -clipped(log_ratio, advantage, clip, clip)
    return -np.where(advantage < 0, np.maximum(objective, limit * advantage), objective)


def rows_mean(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.array([row[m].mean() if m.any() else 0.0 for row, m in zip(x, mask, strict=True)])


def rows_sum(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.array([row[m].sum() for row, m in zip(x, mask, strict=True)])


def watched(log_ratio: np.ndarray, advantage: np.ndarray, mask: np.ndarray, clip: float) -> tuple[float, ...]:
    d, a = log_ratio[mask], advantage[mask]
    if not d.size:
        return 0.0, 0.0, 0.0, 1.0, 0.0
    r = np.exp(d)
    held = np.where(a > 0, r > 1 + clip, r < 1 - clip)
    return (
        float((d**2 / 2).mean()),
        float(held.mean()),
        float((abs(d) >= 20).mean()),
        r.max(initial=1),
        abs(r - 1).max(),
    )


def measured(values_BT: np.ndarray, mask_BT: np.ndarray) -> tuple[float, float, float, float]:
    """Means and standard errors per sequence and per token (the latter from the linearised ratio)."""
    x = np.array([v[m].sum() for v, m in zip(values_BT, mask_BT, strict=True) if m.any()])
    n = np.array([m.sum() for m in mask_BT if m.any()])
    if not n.size:
        return 0.0, 0.0, 0.0, 0.0
    ratio, N = x.sum() / n.sum(), max(len(x) - 1, 1)
    error = np.sqrt(((x - ratio * n) ** 2).sum() * len(x) / N) / n.sum()
    return x.mean(), ratio, np.sqrt(((x - x.mean()) ** 2).sum() / N / len(x)), error


def ours_measured(values_BT: Any, mask_BT: Any) -> tuple:
    e = kl.estimate(values_BT, mask_BT)
    return e.nats_per_sequence, e.nats_per_token, e.nats_per_sequence_error, e.nats_per_token_error


def last(mask_BT: np.ndarray) -> np.ndarray:
    found = np.zeros(mask_BT.shape, bool)
    for row, m in zip(found, mask_BT, strict=True):
        row[np.flatnonzero(m)[-1:]] = True
    return found


def shaped(score_B: np.ndarray, kl_BT: np.ndarray, mask_BT: np.ndarray, beta: float) -> np.ndarray:
    return -beta * kl_BT * mask_BT + last(mask_BT) * score_B[:, None]


def advantages(reward_BT: Any, value_BT: Any, mask_BT: Any, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """GAE as an explicit sum: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantage, target = np.zeros(reward_BT.shape), np.zeros(reward_BT.shape)
    for b, mask in enumerate(mask_BT):
        steps = np.flatnonzero(mask)
        delta = [
            reward_BT[b, t] + gamma * (value_BT[b, steps[i + 1]] if i + 1 < len(steps) else 0) - value_BT[b, t]
            for i, t in enumerate(steps)
        ]
        for i, t in enumerate(steps):
            advantage[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
            target[b, t] = advantage[b, t] + value_BT[b, t]
    return advantage, target


def to_go(reward_BT: np.ndarray, mask_BT: np.ndarray, gamma: float) -> np.ndarray:
    found = np.zeros(reward_BT.shape)
    for b, mask in enumerate(mask_BT):
        steps = np.flatnonzero(mask)
        for i, t in enumerate(steps):
            found[b, t] = sum(gamma**k * reward_BT[b, u] for k, u in enumerate(steps[i:]))
    return found


def moments(x: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    return (float(x[mask].mean()), float(x[mask].var())) if mask.any() else (0.0, 0.0)


def whitened(x: np.ndarray, mask: np.ndarray, keep: bool = False) -> np.ndarray:
    mean, variance = moments(x, mask)
    return np.where(mask, (x - mean) / np.sqrt(variance + 1e-8) + keep * mean, 0)


def groups(f: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    def reference(score_BC: np.ndarray, present_BC: np.ndarray) -> np.ndarray:
        found = np.zeros(score_BC.shape)
        for row, scores, present in zip(found, score_BC, present_BC, strict=True):
            row[present] = f(scores[present]) if present.sum() > 1 else 0.0
        return found

    return reference


def leave_one_out(x: np.ndarray) -> np.ndarray:
    return np.array([x[i] - np.delete(x, i).mean() for i in range(len(x))])


def head_outputs(hidden: np.ndarray, head_VD: np.ndarray, tokens: np.ndarray, t: float = 1.0) -> tuple[np.ndarray, ...]:
    logits = hidden @ head_VD.T / t
    logp = log_softmax(logits)
    return gather(logp, tokens), log_z(logits), logp.mean(-1), spread(logits)


# ---- the table ----------------------------------------------------------------------------------------------------

SCORES = without(candidates("scores_BC"), scores_BC="score_BC")
BOTH = ("logp", "ref_logp")
TIE = [1.0, math.exp(-0.3), math.exp(-1.0)]

PROOFS: dict[str, Proof] = {
    "losses.log_prob": Proof(
        losses.log_prob, lambda logits, tokens: gather(log_softmax(logits), tokens), words,
        ("logits",), elementwise=True, extreme=("logits",),
    ),
    "losses.nll": Proof(
        losses.nll, lambda logits, tokens: log_z(logits) - gather(logits, tokens), words,
        ("logits",), elementwise=True, extreme=("logits",),
    ),
    "losses.label_smoothing": Proof(
        lambda **x: losses.label_smoothing(**x, epsilon=0.1),
        lambda logits, tokens: -((0.9 * np.eye(logits.shape[-1])[tokens] + 0.1 / logits.shape[-1])
                                 * log_softmax(logits)).sum(-1),
        words, ("logits",), elementwise=True, extreme=("logits",),
    ),
    "losses.z_loss": Proof(
        losses.z_loss, lambda logits: log_z(logits) ** 2, without(words, "tokens"),
        ("logits",), elementwise=True, extreme=("logits",),
    ),
    "losses.entropy": Proof(
        losses.entropy, spread, without(words, "tokens"), ("logits",), elementwise=True, extreme=("logits",)
    ),
    "losses.sequence_sum": Proof(
        losses.sequence_sum, lambda values_BT, mask_BT: rows_sum(values_BT, mask_BT), logps("values_BT"),
        ("values_BT",), time=True, extreme=("values_BT",),
    ),
    "losses.sequence_mean": Proof(
        losses.sequence_mean, lambda values_BT, mask_BT: rows_mean(values_BT, mask_BT), logps("values_BT"),
        ("values_BT",), time=True, extreme=("values_BT",),
    ),
    "losses.reduce": Proof(
        losses.reduce, lambda values, mask: (values[mask].sum(), mask.sum()), masked("values"), ("values",), rows=False,
        time=True, extreme=("values",),
    ),
    "losses.combine": Proof(
        lambda mask, **x: (lambda total, each: (total.value, each["a"].value, each["b"].value))(
            *losses.combine(x, mask, {"b": 0.3})
        ),
        lambda a, b, mask: tuple(moments(x, mask)[0] for x in (a + 0.3 * b, a, b)), masked("a", "b"), ("a", "b"),
        rows=False, time=True, extreme=("a",),
    ),
    "losses.favourites_nll": Proof(
        lambda **x: losses.favourites_nll(**x, log_tie=np.log(TIE[1:3])),
        lambda **x: favourites(**x, tie=TIE), candidates("scores_BC", "favourite_BC"),
        ("scores_BC",), extreme=("scores_BC",),
    ),
    "losses.preference_nll": Proof(
        losses.preference_nll, preference, candidates("scores_BC", "choice_B", "margin_B"),
        ("scores_BC", "margin_B"), extreme=("scores_BC",),
    ),
    "losses.bradley_terry_nll": Proof(
        losses.bradley_terry_nll, lambda chosen, rejected, margin: -log_sigmoid(chosen - rejected - margin),
        pair("chosen", "rejected", "margin"), ("chosen", "rejected", "margin"),
        elementwise=True, extreme=("chosen", "rejected"),
    ),
    "losses.plackett_luce_nll": Proof(
        losses.plackett_luce_nll, lambda **x: ranking(**x, tie=[1.0]), candidates("scores_BC", "rank_BC"),
        ("scores_BC",), extreme=("scores_BC",),
    ),
    "losses.plackett_luce_nll, ties": Proof(
        lambda tied_BC, **x: losses.plackett_luce_nll(rank_BC=tied_BC, **x, log_tie=(-0.3, -1.0)),
        lambda tied_BC, **x: ranking(rank_BC=tied_BC, **x, tie=TIE), candidates("scores_BC", "tied_BC"),
        ("scores_BC",), extreme=("scores_BC",),
    ),
    "losses.all_pairs_nll": Proof(
        losses.all_pairs_nll, all_pairs, candidates("scores_BC", "rank_BC"), ("scores_BC",), extreme=("scores_BC",)
    ),
    "losses.soft_preference_nll": Proof(
        losses.soft_preference_nll, soft, candidates("scores_BC", "weight_BC"),
        ("scores_BC", "weight_BC"), extreme=("scores_BC",),
    ),
    "losses.smooth_choice": Proof(
        lambda **x: losses.smooth_choice(**x, epsilon=0.2), lambda **x: smooth(**x, epsilon=0.2),
        candidates("choice_B"),
    ),
    "losses.reward_centering": Proof(
        losses.reward_centering, lambda scores_BC, present_BC: np.array(
            [s[p].sum() ** 2 for s, p in zip(scores_BC, present_BC, strict=True)]
        ),
        candidates("scores_BC"), ("scores_BC",), extreme=("scores_BC",),
    ),
    "losses.preference_objective": Proof(
        lambda **x: losses.preference_objective(**x)[0].value, lambda **x: preference(**x).mean(),
        candidates("scores_BC", "choice_B"), ("scores_BC",), rows=False, extreme=("scores_BC",),
    ),
    "losses.favourite_hits": Proof(
        losses.favourite_hits, hits, candidates("scores_BC", "favourite_BC"), extreme=("scores_BC",)
    ),
    "losses.implicit_reward": Proof(
        lambda **x: losses.implicit_reward(**x, beta=0.3),
        lambda logp_sum, ref_logp_sum: 0.3 * (logp_sum - ref_logp_sum),
        pair("logp_sum", "ref_logp_sum"),
        ("logp_sum", "ref_logp_sum"), elementwise=True, extreme=("logp_sum",),
    ),
    "losses.dpo": Proof(
        lambda **x: losses.dpo(**x, beta=0.1),
        lambda logp_BC, ref_logp_BC, **x: preference(0.1 * (logp_BC - ref_logp_BC), **x),
        candidates("logp_BC", "ref_logp_BC", "choice_B"), ("logp_BC", "ref_logp_BC"), extreme=("logp_BC",),
    ),
    "losses.cdpo": Proof(
        lambda **x: losses.cdpo(**x, beta=0.1, epsilon=0.2), lambda **x: conservative(**x, beta=0.1, epsilon=0.2),
        candidates("logp_BC", "ref_logp_BC", "choice_B"), ("logp_BC",), extreme=("logp_BC",),
    ),
    "losses.ipo": Proof(
        lambda **x: losses.ipo(**x, tau=0.1),
        lambda chosen_log_ratio, rejected_log_ratio: (chosen_log_ratio - rejected_log_ratio - 5.0) ** 2,
        pair("chosen_log_ratio", "rejected_log_ratio"), ("chosen_log_ratio", "rejected_log_ratio"),
        elementwise=True, extreme=("chosen_log_ratio",),
    ),
    "losses.kto_reference": Proof(
        losses.kto_reference, lambda mismatched_log_ratio_B, mask_B: max(0.0, mismatched_log_ratio_B[mask_B].mean()),
        pooled("mismatched_log_ratio_B", 1.0), rows=False, extreme=("mismatched_log_ratio_B",),
    ),
    "losses.kto": Proof(
        lambda **x: losses.kto(**x, reference=0.4, beta=0.2, desirable_weight=1.3, undesirable_weight=0.7),
        lambda log_ratio, desirable: np.where(
            desirable, 1.3 * (1 - sigmoid(0.2 * (log_ratio - 0.4))), 0.7 * (1 - sigmoid(0.2 * (0.4 - log_ratio)))
        ),
        marked, ("log_ratio",), elementwise=True, extreme=("log_ratio",),
    ),
    "losses.log_odds": Proof(
        losses.log_odds, odds, pair("mean_logp", low=-6, high=-0.01), ("mean_logp",), elementwise=True,
        extreme=("mean_logp",),
    ),
    "losses.orpo": Proof(
        lambda **x: losses.orpo(**x, weight=0.25),
        lambda chosen_mean_logp, rejected_mean_logp: (
            -chosen_mean_logp - 0.25 * log_sigmoid(odds(chosen_mean_logp) - odds(rejected_mean_logp))
        ),
        pair("chosen_mean_logp", "rejected_mean_logp", low=-6, high=-0.01),
        ("chosen_mean_logp", "rejected_mean_logp"), elementwise=True, extreme=("chosen_mean_logp",),
    ),
    "losses.simpo": Proof(
        lambda **x: losses.simpo(**x, beta=2.0, gamma=1.0),
        lambda chosen_mean_logp, rejected_mean_logp: -log_sigmoid(
            2.0 * chosen_mean_logp - 2.0 * rejected_mean_logp - 1.0
        ),
        pair("chosen_mean_logp", "rejected_mean_logp", low=-4, high=0),
        ("chosen_mean_logp", "rejected_mean_logp"), elementwise=True, extreme=("chosen_mean_logp",),
    ),
    "losses.log_ratio": Proof(
        losses.log_ratio, lambda logp, old_logp: np.clip(logp - old_logp, -20, 20),
        without(logps("logp", "old_logp"), "mask_BT"), ("logp",), elementwise=True, extreme=("logp", "old_logp"),
    ),
    "losses.sequence_log_ratio": Proof(
        losses.sequence_log_ratio,
        lambda logp_BT, old_logp_BT, mask_BT: np.clip(rows_mean(logp_BT - old_logp_BT, mask_BT), -20, 20),
        logps("logp_BT", "old_logp_BT"), ("logp_BT",), time=True, extreme=("logp_BT",),
    ),
    "losses.ppo_clip": Proof(
        lambda **x: losses.ppo_clip(**x, clip=0.2, clip_high=0.3), lambda **x: clipped(**x, low=0.2, high=0.3),
        ratios, ("log_ratio", "advantage"), elementwise=True,
    ),
    "losses.dual_clip": Proof(
        lambda **x: losses.dual_clip(**x, limit=1.5), lambda **x: dual(**x, clip=0.2, limit=1.5),
        ratios, ("log_ratio",), elementwise=True,
    ),
    "losses.reinforce": Proof(
        losses.reinforce, lambda logp, advantage: -advantage * logp, normals(logp="BT", advantage="BT"),
        ("logp",), elementwise=True, extreme=("logp",),
    ),
    "losses.value_clip": Proof(
        losses.value_clip,
        lambda value, old_value, returns: 0.5 * np.maximum(
            (value - returns) ** 2, (old_value + np.clip(value - old_value, -0.2, 0.2) - returns) ** 2
        ),
        normals(value="BT", old_value="BT", returns="BT"), ("value",), elementwise=True, extreme=("value",),
    ),
    "losses.ratio_metrics": Proof(
        lambda **x: tuple(getattr(m, "value", m) for m in losses.ratio_metrics(**x, clip=0.2).values()),
        lambda **x: watched(**x, clip=0.2), masked_ratios, rows=False, time=True,
    ),
    "kl.k1": Proof(kl.k1, lambda logp, ref_logp: logp - ref_logp, pair(*BOTH), BOTH, elementwise=True, extreme=BOTH),
    "kl.k2": Proof(
        kl.k2, lambda logp, ref_logp: (logp - ref_logp) ** 2 / 2, pair(*BOTH), BOTH, elementwise=True, extreme=BOTH
    ),
    "kl.k3": Proof(
        kl.k3, lambda logp, ref_logp: (lambda d: np.exp(-d) - 1 + d)(np.clip(logp - ref_logp, -20, 20)), pair(*BOTH),
        BOTH, elementwise=True, extreme=BOTH,
    ),
    "kl.exact": Proof(
        kl.exact,
        lambda logits, ref_logits: (softmax(logits) * (log_softmax(logits) - log_softmax(ref_logits))).sum(-1),
        lambda rng, s: {name: rng.normal(0, 2, (s.B, s.T, s.V)) for name in ("logits", "ref_logits")},
        ("logits", "ref_logits"), elementwise=True, extreme=("logits",),
    ),
    "kl.sequence_kl": Proof(
        kl.sequence_kl, lambda logp_BT, ref_logp_BT, mask_BT: rows_sum(logp_BT - ref_logp_BT, mask_BT),
        logps("logp_BT", "ref_logp_BT"), ("logp_BT", "ref_logp_BT"), time=True, extreme=("logp_BT",),
    ),
    "kl.estimate": Proof(ours_measured, measured, logps("values_BT"), rows=False, time=True),
    "kl.AdaptiveKL": Proof(
        lambda beta, **x: kl.AdaptiveKL(beta, target=7.0, horizon=50.0).update(kl.estimate(**x)).beta,
        lambda beta, **x: beta * (1 + np.clip(measured(**x)[0] / 7 - 1, -0.2, 0.2) * x["mask_BT"].any(1).sum() / 50),
        spent, rows=False, time=True, shared=("beta",),
    ),
    "returns.last_token_mask": Proof(returns.last_token_mask, last, without(logps(), "x"), time=True),
    "returns.shaped_rewards": Proof(
        lambda **x: returns.shaped_rewards(**x, beta=0.3), lambda **x: shaped(**x, beta=0.3), scored,
        ("score_B", "kl_BT"), time=True, extreme=("score_B",),
    ),
    "returns.gae": Proof(
        lambda **x: returns.gae(**x, gamma=0.97, lam=0.9), lambda **x: advantages(**x, gamma=0.97, lam=0.9), episodes,
        ("reward_BT", "value_BT"), time=True, extreme=("value_BT",),
    ),
    "returns.rewards_to_go": Proof(
        lambda **x: returns.rewards_to_go(**x, gamma=0.9), lambda **x: to_go(**x, gamma=0.9),
        without(episodes, "value_BT"), ("reward_BT",), time=True,
    ),
    "returns.masked_moments": Proof(returns.masked_moments, moments, masked("x"), ("x",), rows=False, time=True),
    "returns.whiten": Proof(returns.whiten, whitened, masked("x"), ("x",), rows=False, time=True),
    "returns.whiten_keep_mean": Proof(
        returns.whiten_keep_mean, lambda **x: whitened(**x, keep=True), masked("x"), ("x",), rows=False, time=True
    ),
    "returns.fit_normalisation": Proof(
        returns.fit_normalisation,
        lambda score_B, mask_B: (lambda x: (1 / x.std(), -x.mean() / x.std()))(score_B[mask_B]),
        pooled("score_B", 3.0), ("score_B",), rows=False,
    ),
    "returns.centre_scores": Proof(
        returns.centre_scores, groups(lambda x: x - x.mean()), SCORES, ("score_BC",), extreme=("score_BC",)
    ),
    "returns.rloo": Proof(returns.rloo, groups(leave_one_out), SCORES, ("score_BC",), extreme=("score_BC",)),
    "returns.grpo": Proof(
        returns.grpo, groups(lambda x: (x - x.mean()) / (x.std(ddof=1) + 1e-4)), SCORES, ("score_BC",),
        extreme=("score_BC",), kink=True,
    ),
    "returns.broadcast_to_tokens": Proof(
        returns.broadcast_to_tokens, lambda advantage_B, mask_BT: advantage_B[:, None] * mask_BT,
        without(scored, "kl_BT", score_B="advantage_B"), ("advantage_B",), time=True,
    ),
    "vocab_head.log_prob": Proof(
        lambda **x: vocab_head.log_prob(**x, tile=4), lambda **x: head_outputs(**x)[0], head,
        ("hidden", "head_VD"), elementwise=True, shared=("head_VD",), extreme=("hidden",),
    ),
    "vocab_head.nll": Proof(
        lambda **x: vocab_head.nll(**x, tile=4), lambda **x: -head_outputs(**x)[0], head,
        ("hidden", "head_VD"), elementwise=True, shared=("head_VD",), extreme=("hidden",),
    ),
    "vocab_head.tiled_head_outputs": Proof(
        lambda **x: tuple(vocab_head.tiled_head_outputs(**x, tile=4, temperature=0.7)),
        lambda **x: head_outputs(**x, t=0.7),
        head, ("hidden", "head_VD"), elementwise=True, shared=("head_VD",), extreme=("hidden",),
    ),
}  # fmt: skip

# Public names without an entry, and why.
EXEMPT = {
    "losses.Mean": "result of `reduce`; test_proofs adds up its parts",
    "losses.LOG_RATIO_LIMIT": "a number",
    "kl.LOG_RATIO_LIMIT": "a number",
    "losses.MASKED_LOGIT": "a number",
    "losses.TIE": "a number",
    "kl.Estimate": "result of `estimate`",
    "kl.FixedKL": "does nothing; test_kl",
    "vocab_head.HeadOutputs": "result of `outputs`",
}
