"""The report: a table of policies with intervals, figures, and the same prompts answered by each stage, on one page."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.openings import Prompt
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import write_json
from jaxgpt.rlhf.intervals import TOO_FEW, Interval, interval, share, too_wide, wins
from jaxgpt.rlhf.judge import Judge
from jaxgpt.runs.pages import Html, embed_picture, escape, make_section, make_table, write_page
from jaxgpt.runs.run import results_to_json
from jaxgpt.runs.run_record import FINISHED, RunRecord, read_run_record

with needs_extra("train"):
    from rich.console import Console
    from rich.table import Table

SHOWN_PROMPTS = 12  # prompts shown with every policy's answer; the first three come before the figures
METHOD = """{count} held-out prompts, one answer each, all policies sampled at the same temperature; mean ± 95 %
interval over prompts (text loss: over windows of text). Gold reward and preferences: {annotator}. Judge: a classifier
fitted on human labels, never used in training, right about {judge} held-out reviews. Best-of-n picks the
answer that the reward model scores highest; its KL is the upper bound log n − (n−1)/n."""
ABOUT_ANSWERS = (
    "The base model was not trained on prompts: it continues the opening words. “…” marks an answer that was cut off."
)


@dataclasses.dataclass(frozen=True)
class PolicyResults:
    """One policy's answers to the held-out prompts, and each measure's value per prompt."""

    name: str
    texts: list[str]
    gold: np.ndarray  # gold reward: the simulated annotator's
    reward: np.ndarray  # proxy reward: the reward model's h
    judge: np.ndarray  # P(positive) by the judge
    length: np.ndarray  # tokens
    ended: np.ndarray  # 0 or 1
    opens: np.ndarray  # 0 or 1: starts with the words that the prompt asks for
    pretrained_nll: np.ndarray  # nats per token under the frozen pretrained model
    distinct_2: float
    text_nats: Interval  # held-out language-model loss of the policy's model, nats per token
    kl: np.ndarray | None = None  # log pi - log rho of the sampled answer, nats
    kl_bound: float | None = None  # upper bound, where the KL is not measured

    @property
    def kl_mean(self) -> float | None:
        """The mean KL in nats per answer; the bound where it isn't measured."""
        return self.kl_bound if self.kl is None else float(self.kl.mean())


def summarise_policy(policy: PolicyResults, baseline: PolicyResults) -> dict[str, Any]:
    """Means with intervals over prompts, and differences from the baseline on the same prompts."""
    spread = baseline.gold.std()  # 0 if all answers get the same reward, as from a tiny model
    return {
        "gold": interval(policy.gold),
        "gold_gain_in_baseline_sd": interval((policy.gold - baseline.gold) / spread) if spread > 0 else None,
        "reward": interval(policy.reward),
        "judge": interval(policy.judge),
        "judge_gain": interval(policy.judge - baseline.judge),
        "win_rate_gold": share(wins(policy.gold, baseline.gold)),
        "win_rate_judge": share(wins(policy.judge, baseline.judge)),
        "kl": None if policy.kl is None else interval(policy.kl),
        "kl_bound": policy.kl_bound,
        "length": interval(policy.length),
        "ended": share(policy.ended),
        "opens_as_asked": share(policy.opens),
        "pretrained_nll": interval(policy.pretrained_nll),
        "distinct_2": policy.distinct_2,
        "distinct_texts": len(set(policy.texts)),
        "heldout_text_nats": policy.text_nats,
    }


COLUMNS = (
    ("gold reward", "gold"),
    ("gain, SFT sd", "gold_gain_in_baseline_sd"),
    ("reward h", "reward"),
    ("judge P(+)", "judge"),
    ("judge gain", "judge_gain"),
    ("wins vs SFT", "win_rate_gold"),
    ("wins, judge", "win_rate_judge"),
    ("KL, nats", "kl"),
    ("tokens", "length"),
    ("ended", "ended"),
    ("opens as asked", "opens_as_asked"),
    ("pretrained NLL", "pretrained_nll"),
    ("distinct-2", "distinct_2"),
    ("text loss", "heldout_text_nats"),
)


def format_value(row: dict[str, Any], name: str) -> str:
    """A value as the tables show it: mean ± half its interval, ≤ before a bound, – if there is none."""
    value = row[name]
    if value is None:
        return f"≤ {row['kl_bound']:.2f}" if name == "kl" and row["kl_bound"] is not None else "–"
    if isinstance(value, Interval):
        digits = 1 if name == "length" else 2
        return f"{value.mean:.{digits}f} ± {(value.high - value.low) / 2:.{digits}f}"
    return f"{value:.3f}"


def format_wins(found: Interval) -> str:
    """A win rate, with a question mark where the prompts are too few to say."""
    return f"{found.mean:.0%}{'?' if too_wide(found) else ''}"


def make_terminal_table(rows: dict[str, dict[str, Any]], count: int) -> Table:
    """The measures that fit 80 columns; the report has the rest, with their intervals."""
    table = Table(
        title=f"mean ± 95 % interval over {count} held-out prompts; gains and wins against SFT",
        title_justify="left",
        box=None,
        padding=(0, 1),
    )
    if any(too_wide(row["win_rate_gold"]) for row in rows.values()):
        table.caption = f"?: {TOO_FEW}"
    for title in ("policy", "gold", "gain (sd)", "judge gain", "KL (nats)", "wins", "ended", "tokens"):
        table.add_column(title, justify="left" if title == "policy" else "right", no_wrap=True)
    for name, row in rows.items():
        keys = ("gold", "gold_gain_in_baseline_sd", "judge_gain", "kl")
        intervals = [format_value(row, key).replace(" ± ", "±") for key in keys]
        means = (format_wins(row["win_rate_gold"]), f"{row['ended'].mean:.0%}", f"{row['length'].mean:.0f}")
        table.add_row(name, *intervals, *means)
    return table


def write_report(
    folder: Path,
    stages: Mapping[str, RunRecord],
    prompts: Sequence[Prompt],
    policies: Sequence[PolicyResults],
    judge: Judge,
    console: Console,
) -> dict[str, Any]:
    """Write report.html, report.json and the figures into `folder` and print the table; returns what report.json
    holds. `stages`: from `read_stages`."""
    baseline = next(policy for policy in policies if policy.name == "SFT")
    rows = {policy.name: summarise_policy(policy, baseline) for policy in policies}
    accuracy = {"judge_accuracy": judge.accuracy.mean, "judge_accuracy_interval": judge.accuracy}
    results: dict[str, Any] = results_to_json({**accuracy, "prompts": len(prompts), "policies": rows})
    figures = {
        "frontier.png": ("Gold reward against KL", lambda path: save_frontier_figure(path, policies, stages)),
        "scores.png": ("Distribution of gold rewards", lambda path: save_gold_histograms(path, policies)),
        "training.png": ("Training", lambda path: save_training_curves(path, stages)),
        "calibration.png": (
            "Reward model: calibration on held-out choices",
            lambda path: save_calibration_figure(path, stages),
        ),
    }
    for name, (_, draw) in figures.items():
        draw(folder / name)
    write_json(folder / "report.json", results)
    table = ((name, *(format_value(row, key) for _, key in COLUMNS)) for name, row in rows.items())
    pictures = "".join(embed_picture(folder / name, title, title) for name, (title, _) in figures.items())
    trained = policies[-1]
    gap = trained.gold - baseline.gold
    median = int(np.argsort(gap, kind="stable")[len(gap) // 2])
    annotator = stages["preferences"].results.annotator if "preferences" in stages else ""
    about = METHOD.format(count=len(prompts), annotator=annotator or "simulated annotator", judge=judge)
    write_page(
        folder,
        "From language model to assistant",
        Html(f"<strong>{escape(verdict(rows, trained.name, len(prompts)))}</strong>"),
        [
            ("", Html(f"<p>{escape(about)}</p>")),
            (
                "Three prompts, fixed in advance",
                Html(f"<p>{ABOUT_ANSWERS}</p>{_sections(prompts, policies, range(3))}"),
            ),
            (f"The median prompt by {trained.name}'s gain in gold reward", _answers(median, prompts, policies)),
            (f"The prompt where {trained.name} loses most", _answers(int(gap.argmin()), prompts, policies)),
            ("All measures", make_table(("policy", *(title for title, _ in COLUMNS)), table, named=True)),
            ("", Html(pictures)),
            ("More prompts", _sections(prompts, policies, range(3, SHOWN_PROMPTS))),
        ],
    )
    console.print(make_terminal_table(rows, len(prompts)))
    return results


def verdict(rows: Mapping[str, Mapping[str, Any]], name: str, count: int) -> str:
    """The outcome of training in one sentence, which claims no more than the intervals support."""
    row = rows[name]
    wins, judge, kl = row["win_rate_gold"], row["judge_gain"], row["kl"]
    preferred = f"The simulated annotator prefers {name} to SFT on {wins.mean:.0%} of {count} held-out prompts"
    if wins.low <= 0.5 <= wins.high:
        preferred += f", {TOO_FEW}" if too_wide(wins) else ", which may be chance"
    finds = "more positive" if judge.low > 0 else "less positive" if judge.high < 0 else "neither better nor worse"
    drift = "" if kl is None else f", at a drift of {kl.mean:.1f} nats"
    cut = 1 - row["ended"].mean
    return f"{preferred}{drift}; the independent judge finds its answers {finds}; {cut:.0%} of them are cut off."


def _sections(prompts: Sequence[Prompt], policies: Sequence[PolicyResults], index: Iterable[int]) -> Html:
    return Html("".join(_answers(i, prompts, policies) for i in index if i < len(prompts)))


def _answers(i: int, prompts: Sequence[Prompt], policies: Sequence[PolicyResults]) -> Html:
    """A prompt with every policy's answer and its gold reward."""
    names = (Html(f"{escape(policy.name)} <small>gold {policy.gold[i]:+.2f}</small>") for policy in policies)
    texts = (policy.texts[i] + ("" if policy.ended[i] else " …") for policy in policies)
    return make_section(prompts[i].text, zip(names, texts, strict=True))


def read_stages(folder: Path) -> dict[str, RunRecord]:
    """The records of the finished stages in a folder. UserError if one is damaged, so call this before sampling."""
    try:
        return {name: read_run_record(folder / name) for name in FINISHED if (folder / name / "done.json").exists()}
    except UserError as error:
        raise UserError(f"{error}; run that stage again with --fresh") from None


def _curve(run: RunRecord | None, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric of a run; none where there is no run."""
    points = run.points(name) if run else []
    return [step for step, _ in points], [value for _, value in points]


def new_figure(rows: int, columns: int, width: float, height: float) -> Any:
    """(figure, axes [rows, columns]) in the style that all figures share."""
    with needs_extra("eval"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def save_frontier_figure(path: Path, policies: Sequence[PolicyResults], stages: Mapping[str, RunRecord]) -> None:
    """Gold reward, judge and reward model against sequence KL, with intervals, and PPO's course during training."""
    figure, axes = new_figure(1, 3, 13, 4)
    panels = (("gold", "gold reward"), ("judge", "judge, P(positive)"), ("reward", "reward model, h"))
    (_, path_x), (_, path_y) = (_curve(stages.get("ppo"), name) for name in ("kl", "score"))
    axes[0, 2].plot(path_x, path_y, color="0.75", lw=1, label="PPO, during training")
    for axis, (measure, label) in zip(axes[0], panels, strict=True):
        for policy in policies:
            x, y = policy.kl_mean, interval(getattr(policy, measure))
            if x is None:
                axis.axhline(y.mean, color="0.6", ls=":", lw=1)
                axis.annotate(
                    policy.name, (1, y.mean), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4"
                )
                continue
            xerr = None if policy.kl is None else (interval(policy.kl).high - interval(policy.kl).low) / 2
            marker = "s" if policy.kl is None else "o"
            axis.errorbar(
                x, y.mean, xerr=xerr, yerr=(y.high - y.low) / 2, marker=marker, capsize=2, ls="none", label=policy.name
            )
        axis.set_xlabel("KL to SFT, nats per sequence (squares: bound)")
        axis.set_ylabel(label)
        axis.set_xlim(left=-0.3)
    axes[0, 2].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def save_gold_histograms(path: Path, policies: Sequence[PolicyResults]) -> None:
    """Histograms of gold rewards, one panel per policy."""
    figure, axes = new_figure(1, len(policies), 2.3 * len(policies), 2.6)
    for axis, policy in zip(axes[0], policies, strict=True):
        axis.hist(policy.gold, bins=np.linspace(-1, 1, 21), color="tab:blue", alpha=0.8)
        axis.axvline(policy.gold.mean(), color="k", lw=1)
        axis.set_title(f"{policy.name}: {policy.gold.mean():.2f}", fontsize=10)
        axis.set_xlabel("gold reward")
        axis.set_yticks([])
    figure.savefig(path)


def save_training_curves(path: Path, stages: Mapping[str, RunRecord]) -> None:
    """The training curves of every stage."""
    panels = (
        ("pretrain", "nats per token", {"train_nats_per_token": "training", "heldout_nats_per_token": "held out"}),
        (
            "sft",
            "nats per token",
            {"train_nats_per_token": "training answers", "heldout_answer_nats_per_token": "held-out answers"},
        ),
        ("reward", "nats per choice", {"train_loss": "training"}),
        ("dpo", "nats per choice", {"train_loss": "training"}),
        ("ppo", "score h", {"score": "score h", "score_after_kl": "h − β KL"}),
        ("ppo", "nats per sequence", {"kl": "KL to SFT"}),
    )
    figure, axes = new_figure(2, 3, 11, 5.5)
    for axis, (stage, unit, curves) in zip(axes.flat, panels, strict=True):
        for name, label in curves.items():
            steps, values = _curve(stages.get(stage), name)
            axis.plot(steps, values, marker="o" if len(steps) < 10 else None, ms=3, label=label)
        axis.set_title(stage, fontsize=10)
        axis.set_ylabel(unit)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path)


def save_calibration_figure(path: Path, stages: Mapping[str, RunRecord]) -> None:
    """Predicted probability of a candidate against how often it was chosen."""
    figure, axes = new_figure(1, 1, 4, 3.6)
    table = stages["reward"].results.calibration if "reward" in stages else ()
    axis = axes[0, 0]
    axis.plot([0, 1], [0, 1], color="0.6", ls=":")
    sizes = [4 + 60 * row.count / max(r.count for r in table) for row in table]
    axis.scatter([row.predicted for row in table], [row.observed for row in table], s=sizes)
    axis.set_xlabel("predicted P(chosen)")
    axis.set_ylabel("chosen")
    figure.savefig(path)
