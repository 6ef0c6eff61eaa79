"""The figures of the studies, each drawn from its study's results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.runs.report import new_figure
from jaxgpt.study import laws
from jaxgpt.study.results import MEASURES, Point, PointsByMethod, describe_bands

StudyResults = Mapping[str, Mapping[str, Any]]  # by run, method or reward model: the contents of its cell of the study


def running_mean(curves_SI: Any, width: int) -> np.ndarray:
    """The mean over seeds and neighbouring iterations, [I]; NaNs are ignored, and remain only where there is nothing
    else."""
    x = np.array(curves_SI, float)
    kernel = np.ones(min(width, x.shape[1]))
    total, count = (np.convolve(y.sum(0), kernel, "same") for y in (np.nan_to_num(x), ~np.isnan(x)))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _over_iterations(
    axes: Any, panels: Mapping[str, str], found: StudyResults, width: int, each_seed: bool = False
) -> None:
    """One panel per measure, one line per run (the mean of its seeds, or one line per seed) over the iterations."""
    for axis, (measure, label) in zip(axes, panels.items(), strict=False):
        axis.set(xlabel="iterations", ylabel=label)
        for n, (name, one) in enumerate(found.items()):
            curves = np.array(one["curves"][measure], float)
            lines = [running_mean(own, width) for own in (curves[:, None] if each_seed else curves[None])]
            axis.plot(np.arange(1, curves.shape[1] + 1), np.transpose(lines), color=f"C{n}", lw=1.2)
            axis.plot([], [], color=f"C{n}", label=name)


def plot_frontier(path: Path, methods: PointsByMethod, measures: Mapping[str, str] = MEASURES) -> None:
    """Each measure against the KL (on a square-root scale, as in Gao et al. 2022): one line per method through its
    settings with a band (`results.describe_bands`), and a small dot per run."""
    picture, axes = new_figure(1, len(measures), 4.6 * len(measures), 4.2)
    for axis, (measure, label) in zip(axes[0], measures.items(), strict=True):
        for n, (method, points) in enumerate(methods.items()):
            color = f"C{n}"
            found = sorted(((point["kl"], point[measure], point) for point in points), key=lambda one: one[0].mean)
            x, y = [kl.mean for kl, _, _ in found], [value.mean for _, value, _ in found]
            axis.plot(x, y, marker="o", ms=5, lw=1.4, color=color, label=method)
            axis.fill_between(
                x, [v.low for _, v, _ in found], [v.high for _, v, _ in found], color=color, alpha=0.15, lw=0
            )
            for _, _, point in found:
                if len(point.runs) > 1:
                    axis.plot(point.run_means("kl"), point.run_means(measure), ".", ms=3, color=color, alpha=0.6)
        axis.set(xlabel="KL to the starting model, nats per sequence", ylabel=label)
        axis.set_xscale("function", functions=(laws.kl_distance, np.square))
        far = axis.get_xlim()[1]
        axis.set_xticks([x for x in (0, 1, 3, 10, 30, 100, 300) if x <= far])
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[0, 0].set_title(describe_bands(methods), fontsize=8)
    picture.savefig(path)


def plot_overoptimisation(
    path: Path,
    best: StudyResults,
    free: StudyResults,
    paid: Mapping[str, Any],
    start: float,
    fits: Mapping[str, Mapping[laws.Law, laws.LawFit]],
) -> None:
    """Gain in gold reward (lines: fits, one per seed), reward model and judge against the distance d, for best-of-n and
    for PPO."""
    picture, axes = new_figure(2, 3, 15, 8)
    for n, name in enumerate(best):
        color, far = f"C{n}", laws.kl_distance(np.array(best[name]["kl"]))
        for axis, measure in zip(axes[0], ("gold", "proxy", "judge"), strict=True):
            value = np.array(best[name][measure]).mean(1) - start * (measure == "gold")
            axis.plot(far, value, "o" if measure == "gold" else "o-", ms=4, lw=1, color=color, label=name)
        d = laws.kl_distance(np.array(free[name]["kl"]))
        for axis, measure in zip(axes[1], ("gold", "score", "judge"), strict=True):
            value = np.array(free[name][measure]) - start * (measure == "gold")
            axis.plot(d.ravel(), value.ravel(), ".", ms=3, color=color, alpha=0.5)
        for axis, (law, fit), end in zip(axes[:, 0], fits[name].items(), (far.max(), d.max()), strict=True):
            x = np.linspace(0.1, end, 60)
            for alpha, beta in zip(fit["alpha"].seeds, fit["beta"].seeds, strict=True):
                axis.plot(x, laws.gold_gain(law, x, alpha, beta), color=color, lw=1.3)
    d = laws.kl_distance(np.array(paid["kl"]))
    axes[1, 0].plot(d.ravel(), np.ravel(paid["gold"]) - start, "x", ms=3, color="k", label="with KL penalty")
    for column, title in enumerate(("gain in gold reward", "the reward model's own score", "judge, P(positive)")):
        for row, method in enumerate(("best-of-n", "PPO")):
            axes[row, column].set(title=f"{method}: {title}", xlabel="d = sqrt(KL to the start in nats)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[1, 0].legend(frameon=False, fontsize=8)
    picture.savefig(path)


def plot_kl_control(path: Path, found: StudyResults, targets: Mapping[str, float | None]) -> None:
    """KL with its targets, beta, the learned reward, and the gold reward, over the iterations; one line per seed."""
    picture, axes = new_figure(1, 4, 17, 3.8)
    panels = {
        "kl": "KL, nats per sequence",
        "beta": "beta, reward units per nat",
        "score": "reward model h",
        "gold": "gold reward",
    }
    _over_iterations(axes[0], panels, found, width=5, each_seed=True)
    for n, name in enumerate(found):
        if targets[name] is not None:
            axes[0, 0].axhline(targets[name], color=f"C{n}", ls=":", lw=1)
    axes[0, 0].set_ylim(0, 3 * max(target for target in targets.values() if target))
    axes[0, 1].set_yscale("log")  # which leaves out a beta of 0
    axes[0, 3].legend(frameon=False, fontsize=8)
    picture.savefig(path)


def plot_through_reward(path: Path, found: StudyResults) -> None:
    """The reward that the objective sees, the reward of sampled answers, gold reward, KL."""
    picture, axes = new_figure(1, 4, 17, 3.8)
    panels = {
        "h_seen": "h as the objective sees it",
        "h": "h of the sampled answers",
        "gold": "gold reward",
        "kl": "KL, nats per sequence",
    }
    _over_iterations(axes[0], panels, found, width=1)
    axes[0, 1].legend(frameon=False, fontsize=7.5, loc="lower right", ncols=2)
    picture.savefig(path)


def plot_arithmetic(path: Path, found: StudyResults, each: int) -> None:
    """Sums solved, lengths of wrong and right answers, and a group's weight by its number of right answers."""
    picture, axes = new_figure(1, 4, 18, 3.9)
    panels = {
        "gold": "solved, training sums",
        "length_wrong": "tokens of wrong answers",
        "length_right": "tokens of right answers",
    }
    _over_iterations(axes[0], panels, found, width=9)
    for n, one in enumerate(found.values()):
        if "weight_1" in one["curves"]:
            every = [np.array(one["curves"][f"weight_{k}"], float) for k in range(1, each)]
            weight = np.array([np.nansum(x) / max(np.isfinite(x).sum(), 1) for x in every])
            axes[0, 3].plot(range(1, each), weight / max(weight.max(), 1e-9), "o-", ms=3, color=f"C{n}", lw=1)
    axes[0, 3].set(xlabel=f"right answers of {each}", ylabel="mean |advantage|, relative", ylim=(0, 1.05))
    axes[0, 0].legend(frameon=False, fontsize=7.5)
    picture.savefig(path)


def plot_label_counts(
    path: Path, groups: PointsByMethod, agreements: Mapping[str, Sequence[Any]], start: Point
) -> None:
    """Gold reward after PPO, and the reward model's agreement with the annotator, against the labels collected."""
    picture, axes = new_figure(2, len(groups), 4.2 * len(groups), 6.6)
    for n, (group, points) in enumerate(groups.items()):
        x, gold = np.arange(len(points)), [point["gold"] for point in points]
        half = [[g.mean - g.low for g in gold], [g.high - g.mean for g in gold]]
        axes[0, n].errorbar(x, [g.mean for g in gold], half, marker="o", capsize=3, color=f"C{n}")
        for place, point in enumerate(points):
            axes[0, n].plot(np.full(len(point.runs), place), point.run_means("gold"), ".", color=f"C{n}", alpha=0.6)
        axes[0, n].axhline(start["gold"].mean, color="0.6", ls=":", lw=1)
        axes[1, n].plot(x, np.array(agreements[group]), "o", color=f"C{n}", alpha=0.5)
        axes[1, n].plot(x, np.mean(agreements[group], axis=1), color=f"C{n}")
        for axis in axes[:, n]:
            axis.set_xticks(x, [point.name for point in points])
        axes[1, n].set(xlabel=group, ylim=(0.2, 1.0))
        axes[0, n].sharey(axes[0, 0])
    golds = [start["gold"], *(point["gold"] for points in groups.values() for point in points)]
    axes[0, 0].set_ylim(min(one.low for one in golds) - 0.02, max(one.high for one in golds) + 0.02)
    axes[0, 0].set_ylabel("gold reward after PPO (dotted: before)")
    axes[0, 0].set_title(describe_bands(groups).replace("bands", "bars"), fontsize=8)
    axes[1, 0].set_ylabel("picks the best of 4 (chance 0.25)")
    picture.savefig(path)
