"""The run doctor: reads the metrics of runs and reports what is wrong, with the evidence.

    python -m jaxgpt.runs.doctor runs/assistant         a run folder, or one that holds several

The exit status is 0 if nothing is wrong, 1 if something is or a run can't be read, 2 if there is no run.
Each check is a function of one run's `run_record.RunRecord`; its thresholds are the constants above it. docs/metrics.md
explains the metrics.
"""

import argparse
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.rlhf.intervals import TOO_WIDE
from jaxgpt.runs.endings import plain_endings
from jaxgpt.runs.run_record import RunRecord, Span, read_run_record


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong, the numbers that show it, and what to look at."""

    what: str
    evidence: str
    advice: str


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN if there are no values (comparisons with NaN are false, so no check fires)."""
    return math.fsum(value / len(values) for value in values) if values else math.nan


def quarter_means(curve: Sequence[float]) -> tuple[float, float]:
    """The means of a curve's first and last quarter."""
    size = max(1, len(curve) // 4)
    return mean(curve[:size]), mean(curve[-size:])


# ---- checks ----

MIN_CURVE_POINTS = 8  # iterations or log lines that a curve needs before it is checked


def check_finite(run: RunRecord) -> Iterator[Finding]:
    """Losses, gradients or results that are NaN or infinite."""
    skipped = run.curve("skipped")
    rows = [(row.step, [name for name, value in row.figures.items() if value is None]) for row in run.rows]
    names = sorted({name for _, found in rows for name in found})
    if names or (skipped and skipped[-1] > 0):
        evidence = f"{skipped[-1]:.0f} updates skipped" if skipped else "no count of skipped updates"
        if names:
            first = next(step for step, found in rows if found)
            evidence += f"; not finite, first at step {first:.0f}: {', '.join(names)}"
        yield Finding(
            "losses or gradients were not finite", evidence, "the data, a lower learning rate, or training in float32"
        )
    if run.not_finite:
        yield Finding(
            "results are not finite",
            f"not finite: {', '.join(run.not_finite)}",
            "the model that was measured: its numbers overflow; a lower learning rate",
        )


MAX_DATA_WAIT = 0.5  # largest fraction of the elapsed time that may be spent waiting for data


def check_data_wait(run: RunRecord) -> Iterator[Finding]:
    """A device that idles while the loop waits for data.

    If the loop also waits for the device, data isn't the bottleneck.
    """
    data, device = run.curve("seconds_data"), run.curve("seconds_device")
    times = [row.time for row in run.rows]
    if len(data) >= 2 and times[-1] > times[0]:
        waited, worked, elapsed = sum(data[1:]), sum(device[1:]), times[-1] - times[0]
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


BLOCKS = 8  # parts of a curve whose means are compared
MAX_RISE = 0.5  # largest rise, as a fraction of the fall before it
RISE_ERRORS = 4.0  # standard errors of a block's mean that fall and rise must exceed


def check_loss_stays_down(run: RunRecord) -> Iterator[Finding]:
    """A training loss that fell and then rose again: it diverged late."""
    curve = run.curve("train_nats_per_token") or run.curve("train_loss")
    size = len(curve) // BLOCKS
    if size < 2:
        return
    blocks = [curve[-(n + 1) * size : len(curve) - n * size] for n in reversed(range(BLOCKS))]
    means = [mean(block) for block in blocks]
    best = min(means)
    fall, rise = means[0] - best, means[-1] - best
    squares = [(a - b) * (a - b) / 2 for block in blocks for a, b in itertools.pairwise(block)]
    error = math.sqrt(mean(squares) / size)  # from differences of neighbours, which leave out the trend
    if fall > RISE_ERRORS * error and rise > max(MAX_RISE * fall, RISE_ERRORS * error):
        yield Finding(
            "the training loss rose after it had fallen",
            f"{means[0]:.3f} -> {best:.3f} -> {means[-1]:.3f} (means over {size} log lines)",
            "a lower learning rate, a longer warm-up; an earlier checkpoint was better",
        )


MAX_FORGETTING = 2.5  # rise of the loss on pretraining text, nats per token; the default run's is 1.9 to 2.1


def check_forgetting(run: RunRecord) -> Iterator[Finding]:
    """Finetuning that forgets what pretraining learned."""
    before, after = run.results.pretraining_nats_before, run.results.pretraining_nats_after
    if before is not None and after is not None and after - before > MAX_FORGETTING:
        yield Finding(
            "finetuning wiped out what pretraining learned",
            f"held-out pretraining text: {before:.2f} -> {after:.2f} nats per token",
            "fewer steps, a lower learning rate, or pretraining text mixed in",
        )


def check_reward_accuracy(run: RunRecord) -> Iterator[Finding]:
    """A reward model no better than guessing: the held-out likelihood of the choices is at chance level, or below."""
    nll, chance, accuracy = run.results.nll, run.results.chance, run.results.accuracy or 0.0
    guess = run.results.chance_nll or (-math.log(chance) if chance else math.inf)
    if nll is not None and chance and nll > 0.99 * guess:
        yield Finding(
            "the reward model is guessing",
            f"held-out loss {nll:.3f} nats, guessing {guess:.3f}; accuracy {accuracy:.1%}, guessing {chance:.1%}",
            "more preferences, more consistent labels, or another learning rate",
        )


MIN_ENDED = 0.25  # share of sampled answers that reach the end token


def check_answers_end(run: RunRecord) -> Iterator[Finding]:
    """Preferences between answers that were cut off, as by a model that was not finetuned, or whose weights are 0."""
    parts = {"train": run.results.train, "heldout": run.results.heldout}
    few = {name: part.ended for name, part in parts.items() if part and is_less(part.ended, MIN_ENDED)}
    if few:
        yield Finding(
            "answers never end",
            ", ".join(f"{share:.0%} of {name}'s answers reached the end token" for name, share in few.items()),
            "whether the model that wrote them was finetuned, and some of its answers; a larger new_tokens",
        )


def check_answer_lengths(run: RunRecord) -> Iterator[Finding]:
    """Answers that never end, or that end at once."""
    lengths, ended = run.curve("length"), run.curve("ended")
    if len(lengths) < MIN_CURVE_POINTS:
        return
    (first, last), (_, ends) = quarter_means(lengths), quarter_means(ended)
    limit = run.settings.ppo.new_tokens or math.inf
    if last < 0.25 * first and last < 5:
        yield Finding(
            "answers collapsed to the end token",
            f"{first:.1f} -> {last:.1f} tokens per answer, {ends:.0%} of the answers reached the end token",
            "the scores of short answers (the reward may prefer empty ones), or a larger beta",
        )
    elif ends < MIN_ENDED and last > 0.9 * limit:
        yield Finding(
            "answers never end",
            f"{ends:.0%} reached the end token; {last:.1f} of at most {limit} tokens per answer",
            "ppo.new_tokens, ppo.unfinished_score, and whether finetuning taught the end token",
        )


MAX_SAMPLER_GAP = {"float32": 1e-3, "bfloat16": 0.5}  # nats per token


def check_sampler_agrees(run: RunRecord) -> Iterator[Finding]:
    """A sampler and a trainer whose log-probabilities of the same tokens, under the same parameters, differ."""
    gaps, errors = run.curve("sampler_gap_max"), run.curve("ratio_error_first")
    if gaps and max(gaps) > (limit := MAX_SAMPLER_GAP.get(run.settings.dtype, MAX_SAMPLER_GAP["float32"])):
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
    fixed, target = run.settings.fixed_beta, run.settings.target_kl
    limit = mean(lengths[-len(lengths) // 4 :]) if fixed or not target else 3 * target
    if last > limit:
        against = "1 nat per token" if fixed or not target else f"3 x target_kl of {target}"
        yield Finding(
            "the policy drifts too far from the reference",
            f"KL {last:.1f} nats per answer in the last quarter (limit {limit:.1f}: {against})",
            "a larger beta, a lower learning rate, or fewer epochs per rollout",
        )


def is_less(a: float | None, b: float | None) -> bool:
    """Whether both are known and a < b."""
    return a is not None and b is not None and a < b


def is_below(lower: Span | None, upper: Span | None) -> bool:
    """Whether the whole interval `lower` lies below `upper`."""
    return lower is not None and upper is not None and is_less(lower.high, upper.low)


def show(span: Span | None) -> str:
    """A mean, for the evidence."""
    return "?" if span is None or span.mean is None else f"{span.mean:.2f}"


def check_reward_hacking(run: RunRecord) -> Iterator[Finding]:
    """The proxy reward rose while a measure that was not trained on fell; in both, the 95 % intervals don't overlap."""
    start = run.results.policies.get("SFT")
    for name, policy in run.results.policies.items():
        if not start or name in ("SFT", "base") or not is_below(start.reward, policy.reward):
            continue
        for other, before, after in (("gold", start.gold, policy.gold), ("judge", start.judge, policy.judge)):
            if is_below(after, before):
                yield Finding(
                    f"{name} games the reward model",
                    f"proxy reward {show(start.reward)} -> {show(policy.reward)}, "
                    f"but {other} {show(before)} -> {show(after)}",
                    "its answers in the report; a larger beta, fewer iterations, or more preferences",
                )
                break


def check_overfitting(run: RunRecord) -> Iterator[Finding]:
    """A held-out loss more than 10 % above the training loss at the start."""
    nll = run.results.heldout_nll
    curve = run.curve("train_loss")
    if nll is not None and curve and nll > 1.1 * curve[0]:
        yield Finding(
            "the policy overfits the preferences",
            f"held-out loss {nll:.3f}, above {curve[0]:.3f} at the start",
            "a lower learning rate, a larger beta, or fewer epochs",
        )


def check_heldout_data(run: RunRecord) -> Iterator[Finding]:
    """Held-out prompts that are also trained on."""
    count = run.results.heldout_trained_on
    if count:
        used = run.results.rows["heldout"].used if "heldout" in run.results.rows else "the"
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
    signs = list(sampled_signs(run.folder.parent / "report"))
    if end and (last := quarter_means(end)[1]) < -MAX_END_LOG_RATIO:
        signs.append(f"the end tag's log-probability {last:+.2f} nats against the reference")
    if high < 0 and low < 0 and signs:
        yield Finding(
            "DPO makes all answers less likely, and answers run on",
            f"implicit reward of chosen {high:.2f}, of rejected {low:.2f} in the last quarter; {'; '.join(signs)}",
            "samples; a larger beta, a lower learning rate, or fewer epochs",
        )


def sampled_signs(report: Path) -> Iterator[str]:
    """How a report's (or align's) DPO samples got worse than those before: longer, ended less often, less varied."""
    try:
        results = read_run_record(report).results
    except UserError:
        return  # there is no report, or it is damaged, which its own check says
    policies = {name.lower(): row for name, row in {**results.policies, **results.models}.items()}
    before, after = policies.get("sft") or policies.get("before"), policies.get("dpo")
    if not before or not after:
        return
    lengths = (("tokens", before.length, after.length), ("words", before.words, after.words))
    for unit, old, new in lengths:
        if old and new and old.high is not None and is_less(MAX_GROWTH * old.high, new.low):
            yield f"answers grow from {show(old)} to {show(new)} {unit}"
    if is_below(after.ended, before.ended):
        yield f"{show(before.ended)} of the answers ended before, {show(after.ended)} after"
    if before.distinct_2 is not None and is_less(after.distinct_2, before.distinct_2 / 2):
        yield f"distinct-2 falls from {before.distinct_2:.2f} to {after.distinct_2:.2f}"


MAX_EQUAL = 0.1  # share of preferences whose answers are all equal


def check_identical_answers(run: RunRecord) -> Iterator[Finding]:
    """A model that gives the same answer to everything, or preferences between equal answers."""
    results, same = run.results, []
    if len(run.rollout) > 1 and len(set(run.rollout)) == 1:
        same.append(f"all {len(run.rollout)} answers of the newest rollout are {run.rollout[0]!r:.60}")
    for name, policy in {**results.policies, **results.models}.items():
        texts = policy.distinct_texts if policy.distinct_texts is not None else len(set(policy.answers))
        if texts == 1 and max(results.prompts, len(policy.answers)) > 1:
            same.append(f"{name} gives one answer to all prompts")
    if same:
        advice = "its training: a larger beta, a lower learning rate, fewer steps"
        yield Finding("all answers are the same", "; ".join(same), advice)
    counts = [(part.equal_answers, part.preferences) for part in (results.train, results.heldout) if part]
    if "preferences" in results.rows:
        counts.append((results.equal_answers, results.rows["preferences"].used))
    for equal, every in counts:
        if equal > MAX_EQUAL * every:
            yield Finding(
                "preferences between equal answers",
                f"{equal} of {every} rows have answers that are all equal: nothing can be learned from them",
                "the model that wrote them, its temperature, or the file",
            )


def check_enough_rows(run: RunRecord) -> Iterator[Finding]:
    """Held-out rows so few that a share's interval is wider than ±10 points."""
    spans = {"accuracy": run.results.accuracy_interval or run.results.heldout_accuracy_interval}
    for name, policy in {**run.results.policies, **run.results.models}.items():
        if name not in ("SFT", "before"):
            spans[f"{name}'s win rate"] = policy.win_rate_gold or policy.better_than_before
    wide = {name: span for name, span in spans.items() if span and not is_narrow(span)}
    if wide:
        name, span = max(wide.items(), key=lambda one: -(one[1].low or 0.0))
        yield Finding(
            "too few held-out rows to compare",
            f"{', '.join(wide)}: intervals wider than ±{TOO_WIDE:.0%}, {name} {show(span)} "
            f"[{span.low or 0:.2f}, {1 if span.high is None else span.high:.2f}]",
            "more held-out rows, before any of these figures is compared",
        )


def is_narrow(span: Span) -> bool:
    """Whether a share's interval is at most ±10 points wide."""
    return span.low is not None and span.high is not None and (span.high - span.low) / 2 <= TOO_WIDE


Check = Callable[[RunRecord], Iterator[Finding]]
CHECKS: dict[str, tuple[Check, ...]] = {
    "pretrain": (check_data_wait, check_loss_falls, check_loss_stays_down),
    "sft": (check_data_wait, check_loss_falls, check_loss_stays_down, check_forgetting),
    "preferences": (check_answers_end,),
    "reward": (check_data_wait, check_reward_accuracy, check_loss_stays_down),
    "ppo": (check_answer_lengths, check_sampler_agrees, check_value_function, check_kl_to_reference),
    "dpo": (check_data_wait, check_overfitting, check_loss_stays_down, check_likelihoods),
    "report": (check_reward_hacking,),
    "align": (),
}
EVERY_STAGE: tuple[Check, ...] = (check_finite, check_heldout_data, check_identical_answers, check_enough_rows)


# ---- running the checks ----


def run_checks(run: RunRecord) -> list[Finding]:
    """The findings of all checks that apply to the run's stage."""
    return [finding for check in (*EVERY_STAGE, *CHECKS.get(run.stage, ())) for finding in check(run)]


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a file of a run. A path that can't be listed counts if it should be a run folder."""
    try:
        return bool({"settings.json", "metrics.jsonl", "done.json"} & set(os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return folder.name in CHECKS
    except OSError:
        return True


def find_run_folders(root: Path) -> list[Path]:
    """`root` if it is a run folder, otherwise the run folders in it, in pipeline order."""
    if root.is_dir() and is_run_folder(root):
        return [root]
    runs = [one for one in root.iterdir() if is_run_folder(one)] if root.is_dir() else []
    if not runs:
        raise UserError(f"{root} is not a run folder and contains none")
    order = {name: n for n, name in enumerate(CHECKS)}
    return sorted(runs, key=lambda one: (order.get(one.name, len(order)), one.name))


def examine(folder: Path) -> tuple[list[str], bool]:
    """What to print about a run folder, and whether anything is wrong."""
    try:
        run = read_run_record(folder)
    except UserError as error:
        return [f"{folder.name}: could not be read: {error}"], True
    place = f"({folder}{'' if run.finished else ', not finished'})"
    if run.stage not in CHECKS:
        return [f"{run.stage}: not checked: the doctor knows no stage of that name {place}"], False
    if not (run.finished or run.rows):
        return [f"{run.stage}: nothing measured yet {place}"], False
    findings = run_checks(run)
    lines = [f"{run.stage}: {'' if findings else 'nothing wrong found '}{place}"]
    for finding in findings:
        lines += [f"  ! {finding.what}", f"    {finding.evidence}", f"    look at: {finding.advice}"]
    return lines, bool(findings)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings and return the exit status: 0 if there are none, 1 if there are some or a run can't be read.
    Exits with 2 if there is no run."""
    parser = argparse.ArgumentParser(prog="python -m jaxgpt.runs.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="a run folder, or one that holds several")
    found_any = False
    with plain_endings():
        for folder in find_run_folders(parser.parse_args(argv).folder):
            lines, wrong = examine(folder)
            found_any = found_any or wrong
            print("\n".join(lines))
    return int(found_any)


if __name__ == "__main__":
    sys.exit(main())
