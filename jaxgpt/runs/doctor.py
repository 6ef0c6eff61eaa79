"""The run doctor: reads the metrics of runs and reports what is wrong, with the evidence.

    python -m jaxgpt.runs.doctor runs/assistant         a run folder, or one that holds several

The exit status is 0 if nothing is wrong, 1 if something is, 2 if there is no run.
Each check is a function of one run's `RunRecord`; its thresholds are the constants above it. docs/metrics.md explains
the metrics.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.files import read_json
from jaxgpt.runs.endings import plain_endings

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder: its stage, its settings, one row per log line, and the results once finished."""

    folder: Path
    stage: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    results: Mapping[str, Any]

    def curve(self, name: str) -> list[float]:
        """The finite values of a metric, in order."""
        return [row[name] for row in self.rows if row.get(name) is not None]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong, the numbers that show it, and what to look at."""

    what: str
    evidence: str
    advice: str


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)


def quarter_means(curve: Sequence[float]) -> tuple[float, float]:
    """The means of a curve's first and last quarter."""
    size = max(1, len(curve) // 4)
    return mean(curve[:size]), mean(curve[-size:])


# ---- checks ----

MIN_CURVE_POINTS = 8  # iterations or log lines that a curve needs before it is checked


def check_finite(run: RunRecord) -> Iterator[Finding]:
    """Losses or gradients that are NaN or infinite."""
    skipped = run.curve("skipped")
    names = sorted({name for row in run.rows for name in row.get("nonfinite", ())})
    if names or (skipped and skipped[-1] > 0):
        evidence = f"{skipped[-1]:.0f} updates skipped" if skipped else "no count of skipped updates"
        if names:
            first = next(row["step"] for row in run.rows if row.get("nonfinite"))
            evidence += f"; not finite, first at step {first}: {', '.join(names)}"
        yield Finding(
            "losses or gradients were not finite", evidence, "the data, a lower learning rate, or training in float32"
        )


MAX_DATA_WAIT = 0.5  # largest fraction of the elapsed time that may be spent waiting for data


def check_data_wait(run: RunRecord) -> Iterator[Finding]:
    """A device that idles while the loop waits for data.

    If the loop also waits for the device, data isn't the bottleneck.
    """
    data, device = run.curve("seconds_data"), run.curve("seconds_device")
    times = run.curve("time")
    if len(data) >= 2 and times[-1] > times[0]:
        waited, worked, elapsed = math.fsum(data[1:]), math.fsum(device[1:]), times[-1] - times[0]
        if waited > MAX_DATA_WAIT * elapsed and worked < 0.1 * waited:
            yield Finding(
                "the device waits for data",
                f"{waited:.1f} of {elapsed:.1f} s were spent waiting for batches, {worked:.1f} s for the device",
                "a faster disk or cache, shorter rows, or a larger batch per step",
            )


def check_loss_falls(run: RunRecord) -> Iterator[Finding]:
    """A training loss that doesn't fall."""
    curve = run.curve("train_nats_per_token")
    if len(curve) >= MIN_CURVE_POINTS:
        first, last = quarter_means(curve)
        if last >= first:
            evidence = f"{first:.3f} nats per token in the first quarter of the steps, {last:.3f} in the last"
            yield Finding("the training loss does not fall", evidence, "the learning rate, the warm-up and the data")


MAX_FORGETTING = 2.0  # rise of the loss on pretraining text, nats per token (the new format alone costs about half)


def check_forgetting(run: RunRecord) -> Iterator[Finding]:
    """Finetuning that forgets what pretraining learned."""
    before, after = run.results.get("pretraining_nats_before"), run.results.get("pretraining_nats_after")
    if before is not None and after is not None and after - before > MAX_FORGETTING:
        yield Finding(
            "finetuning wiped out what pretraining learned",
            f"held-out pretraining text: {before:.2f} -> {after:.2f} nats per token",
            "fewer steps, a lower learning rate, or pretraining text mixed in",
        )


def check_reward_accuracy(run: RunRecord) -> Iterator[Finding]:
    """A reward model no better than guessing: the held-out likelihood of the choices is at chance level, or below."""
    nll, chance = run.results.get("nll"), run.results.get("chance")
    guess = run.results.get("chance_nll") or (-math.log(chance) if chance else math.inf)
    if nll is not None and chance and nll > 0.99 * guess:
        yield Finding(
            "the reward model is guessing",
            f"held-out loss {nll:.3f} nats, guessing {guess:.3f}; accuracy {run.results['accuracy']:.1%}, "
            f"guessing {chance:.1%}",
            "more preferences, more consistent labels, or another learning rate",
        )


def check_answer_lengths(run: RunRecord) -> Iterator[Finding]:
    """Answers that never end, or that end at once."""
    lengths, ended = run.curve("length"), run.curve("ended")
    if len(lengths) < MIN_CURVE_POINTS:
        return
    (first, last), (_, ends) = quarter_means(lengths), quarter_means(ended)
    limit = run.settings.get("ppo", {}).get("new_tokens", math.inf)
    if last < 0.25 * first and last < 5:
        yield Finding(
            "answers collapsed to the end token",
            f"{first:.1f} -> {last:.1f} tokens per answer, {ends:.0%} of the answers reached the end token",
            "the scores of short answers (the reward may prefer empty ones), or a larger beta",
        )
    elif ends < 0.25 and last > 0.9 * limit:
        yield Finding(
            "answers never end",
            f"{ends:.0%} reached the end token; {last:.1f} of at most {limit} tokens per answer",
            "ppo.new_tokens, ppo.unfinished_score, and whether finetuning taught the end token",
        )


MAX_SAMPLER_GAP = {"float32": 1e-3, "bfloat16": 0.5}  # nats per token


def check_sampler_agrees(run: RunRecord) -> Iterator[Finding]:
    """A sampler and a trainer whose log-probabilities of the same tokens, under the same parameters, differ."""
    gaps, errors = run.curve("sampler_gap_max"), run.curve("ratio_error_first")
    if gaps and max(gaps) > (
        limit := MAX_SAMPLER_GAP.get(str(run.settings.get("dtype", "float32")), MAX_SAMPLER_GAP["float32"])
    ):
        yield Finding(
            "the sampler's policy is not the trainer's",
            f"log-probabilities of the same tokens differ by up to {max(gaps):.2g} nats (limit {limit:.0e})",
            "the sampler's temperature, filters and cache; until they are right, PPO's ratios are meaningless",
        )
    if errors and max(errors) > 1e-3:
        yield Finding(
            "the first ratio is not 1",
            f"|ratio - 1| up to {max(errors):.2g} before any update",
            "the old log-probabilities must come from the trainer's own function on the same rows",
        )


MIN_EXPLAINED_VARIANCE = 0.03  # fraction of the variance of the returns


def check_value_function(run: RunRecord) -> Iterator[Finding]:
    """A critic that explains almost none of the variance of the returns."""
    curve = run.curve("explained_variance")
    if len(curve) >= 2 * MIN_CURVE_POINTS:
        _, last = quarter_means(curve)
        if last < MIN_EXPLAINED_VARIANCE:
            yield Finding(
                "the value function explains nothing",
                f"explained variance {last:.3f} in the last quarter of {len(curve)} iterations",
                "a larger ppo.value_weight or ppo.value_clip, more epochs, or a higher learning rate",
            )


def check_kl_to_reference(run: RunRecord) -> Iterator[Finding]:
    """A policy that drifts too far from its reference."""
    curve, lengths = run.curve("kl"), run.curve("length")
    if len(curve) < MIN_CURVE_POINTS:
        return
    _, last = quarter_means(curve)
    fixed, target = run.settings.get("fixed_beta", True), run.settings.get("target_kl")
    limit = mean(lengths[-len(lengths) // 4 :]) if fixed or not target else 3 * target
    if last > limit:
        against = "1 nat per token" if fixed or not target else f"3 x target_kl of {target}"
        yield Finding(
            "the policy drifts too far from the reference",
            f"KL {last:.1f} nats per answer in the last quarter (limit {limit:.1f}: {against})",
            "a larger beta, a lower learning rate, or fewer epochs per rollout",
        )


def check_reward_hacking(run: RunRecord) -> Iterator[Finding]:
    """The proxy reward rose while a measure that was not trained on fell; in both, the 95 % intervals part."""
    policies = run.results.get("policies", {})
    start = policies.get("SFT")
    for name, policy in policies.items():
        if not start or name in ("SFT", "base") or not (policy.get("reward") and start.get("reward")):
            continue
        for other in ("gold", "judge"):
            up = policy["reward"]["low"] > start["reward"]["high"]
            if up and policy[other]["high"] < start[other]["low"]:
                yield Finding(
                    f"{name} games the reward model",
                    f"proxy reward {start['reward']['mean']:.2f} -> {policy['reward']['mean']:.2f}, "
                    f"but {other} {start[other]['mean']:.2f} -> {policy[other]['mean']:.2f}",
                    "its answers in the report; a larger beta, fewer iterations, or more preferences",
                )
                break


def check_overfitting(run: RunRecord) -> Iterator[Finding]:
    """A held-out loss more than 10 % above the training loss at the start."""
    nll = run.results.get("heldout_nll")
    curve = run.curve("train_loss")
    if nll is not None and curve and nll > 1.1 * curve[0]:
        yield Finding(
            "the policy overfits the preferences",
            f"held-out loss {nll:.3f}, above {curve[0]:.3f} at the start",
            "a lower learning rate, a larger beta, or fewer epochs",
        )


def check_heldout_data(run: RunRecord) -> Iterator[Finding]:
    """Held-out prompts that are also trained on."""
    count = run.results.get("heldout_trained_on")
    if count:
        used = run.results.get("rows", {}).get("heldout", {}).get("used", "the")
        yield Finding(
            "what is measured on was trained on",
            f"{count} of {used} held-out rows have prompts that are also trained on",
            "the two files; until no prompt is in both, the held-out figures are too good",
        )


MAX_GROWTH = 1.25  # of answers' length under DPO
MAX_END_LOG_RATIO = 0.5  # fall of the end tag's mean log-probability under DPO, nats


def check_likelihoods(run: RunRecord) -> Iterator[Finding]:
    """DPO after which both chosen and rejected answers are less likely than before, which is normal by itself, and
    answers also end less readily, or (in a report beside the run) grow longer, end less often or repeat themselves."""
    chosen, rejected, end = (run.curve(name) for name in ("chosen_reward", "rejected_reward", "end_log_ratio"))
    if len(chosen) < MIN_CURVE_POINTS:
        return
    (_, high), (_, low) = quarter_means(chosen), quarter_means(rejected)
    signs = list(sampled_signs(run.folder.parent / "report/done.json"))
    if end and (last := quarter_means(end)[1]) < -MAX_END_LOG_RATIO:
        signs.append(f"the end tag's log-probability {last:+.2f} nats against the reference")
    if high < 0 and low < 0 and signs:
        yield Finding(
            "DPO makes all answers less likely, and answers run on",
            f"implicit reward of chosen {high:.2f}, of rejected {low:.2f} in the last quarter; {'; '.join(signs)}",
            "samples; a larger beta, a lower learning rate, or fewer epochs",
        )


def sampled_signs(path: Path) -> Iterator[str]:
    """How a report's (or align's) DPO samples got worse than those before: longer, ended less often, less varied."""
    results = read_json(path).get("results", {}) if path.exists() else {}
    policies = {name.lower(): row for name, row in {**results.get("policies", {}), **results.get("models", {})}.items()}
    before, after = policies.get("sft") or policies.get("before"), policies.get("dpo")
    if not before or not after:
        return
    for name, unit in (("length", "tokens"), ("words", "words")):
        if name in after and after[name]["low"] > MAX_GROWTH * before[name]["high"]:
            yield f"answers grow from {before[name]['mean']:.1f} to {after[name]['mean']:.1f} {unit}"
    if after["ended"]["high"] < before["ended"]["low"]:
        yield f"{before['ended']['mean']:.0%} of the answers ended before, {after['ended']['mean']:.0%} after"
    if after["distinct_2"] < before["distinct_2"] / 2:
        yield f"distinct-2 falls from {before['distinct_2']:.2f} to {after['distinct_2']:.2f}"


Check = Callable[[RunRecord], Iterator[Finding]]
CHECKS: dict[str, tuple[Check, ...]] = {
    "pretrain": (check_finite, check_data_wait, check_loss_falls),
    "sft": (check_finite, check_data_wait, check_heldout_data, check_loss_falls, check_forgetting),
    "reward": (check_finite, check_data_wait, check_heldout_data, check_reward_accuracy),
    "ppo": (check_finite, check_answer_lengths, check_sampler_agrees, check_value_function, check_kl_to_reference),
    "dpo": (check_finite, check_data_wait, check_heldout_data, check_overfitting, check_likelihoods),
    "report": (check_reward_hacking,),
    "align": (check_heldout_data,),
}


# ---- reading ----


def read_run_record(folder: Path) -> RunRecord:
    """Read a run folder. A killed run's last line may be cut short; any other unreadable line is a UserError."""
    about = read_json(folder / "settings.json")
    if not isinstance(about, dict) or not isinstance(about.get("settings"), dict) or "stage" not in about:
        raise UserError(f"{folder / 'settings.json'} is not a run's settings file; give the folder of a run")
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else {}
        except json.JSONDecodeError:
            row = {} if number == len(lines) else None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a line of metrics; the file was edited or damaged after the run")
        rows += [row] if row else []
    done = read_json(folder / "done.json") if (folder / "done.json").exists() else {}
    return RunRecord(folder, str(about["stage"]), about["settings"], rows, done.get("results", {}))


def run_checks(run: RunRecord) -> list[Finding]:
    """The findings of all checks that apply to the run's stage."""
    return [finding for check in CHECKS.get(run.stage, ()) for finding in check(run)]


def find_run_folders(root: Path) -> list[Path]:
    """`root` if it is a run folder, otherwise the run folders in it, in pipeline order."""
    if (root / "settings.json").exists():
        return [root]
    runs = [one.parent for one in root.glob("*/settings.json")] if root.is_dir() else []
    if not runs:
        raise UserError(f"{root} is not a run folder and contains none")
    order = {name: n for n, name in enumerate(CHECKS)}
    return sorted(runs, key=lambda one: (order.get(one.name, len(order)), one.name))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings and return the exit status: 0 if there are none, 1 if there are some. Exits with 2 if there is
    no run."""
    parser = argparse.ArgumentParser(prog="python -m jaxgpt.runs.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="a run folder, or one that holds several")
    found_any = False
    with plain_endings():
        for folder in find_run_folders(parser.parse_args(argv).folder):
            run = read_run_record(folder)
            state = "" if (folder / "done.json").exists() else ", not finished"
            findings = run_checks(run)
            found_any = found_any or bool(findings)
            print(f"{run.stage}: {'nothing wrong found' if not findings else ''}".rstrip() + f" ({folder}{state})")
            for finding in findings:
                print(f"  ! {finding.what}\n    {finding.evidence}\n    look at: {finding.advice}")
    return int(found_any)


if __name__ == "__main__":
    sys.exit(main())
