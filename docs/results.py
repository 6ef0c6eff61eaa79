"""The tables of docs/results.md, from finished runs: `python docs/results.py runs/assistant runs/seed1 runs/seed2`."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.files import read_json
from jaxgpt.runs.endings import plain_endings
from jaxgpt.runs.run_record import read_results

GAIN = "gold_gain_in_baseline_sd"
NAMES = {  # a heading, and how a policy's figures in report.json are shown below it
    "gold score": lambda p: plus_minus(p["gold"]),
    "gain over SFT, in SFT standard deviations": lambda p: plus_minus(gain) if (gain := p[GAIN]) else "–",
    "judge, P(positive) minus SFT's": lambda p: plus_minus(p["judge_gain"]),
    "KL to SFT, nats a sequence": lambda p: plus_minus(p["kl"]) if p["kl"] else bound(p["kl_bound"]),
    "wins against SFT (gold)": lambda p: plus_minus(p["win_rate_gold"]),
    "answers that end by themselves": lambda p: f"{p['ended']['mean']:.0%}",
    "answers that open as asked": lambda p: f"{p['opens_as_asked']['mean']:.0%}",
    "tokens an answer": lambda p: plus_minus(p["length"], 1),
    "nats a token under the frozen pretrained model": lambda p: plus_minus(p["pretrained_nll"]),
    "distinct-2": lambda p: f"{p['distinct_2']:.2f}",
    "held-out text, nats a token": lambda p: f"{p['heldout_text_nats']['mean']:.2f}" if p["heldout_text_nats"] else "",
}


def plus_minus(x: dict[str, float], digits: int = 2) -> str:
    return f"{x['mean']:.{digits}f} ± {(x['high'] - x['low']) / 2:.{digits}f}"


def bound(nats: float | None) -> str:
    return "–" if nats is None else f"≤ {nats:.2f}"


def results(run: Path, stage: str) -> dict[str, Any]:
    return read_results(run / stage, stage)


def stage_rows(run: Path) -> dict[str, str]:
    """What the stages measured: the name of a row -> its figure."""
    pretrain, sft, reward, dpo = (results(run, name) for name in ("pretrain", "sft", "reward", "dpo"))
    policies = results(run, "report")["policies"]
    rise, gain = policies["PPO"]["gold"]["mean"] - policies["SFT"]["gold"]["mean"], policies["PPO"][GAIN]
    sd = rise / gain["mean"] if gain else 0.0  # no gain: SFT's answers all have the same gold score
    return {
        "pretraining, held out, nats a token (bits a byte)": f"{pretrain['heldout_nats_per_token']:.3f} "
        f"({pretrain['heldout_bits_per_byte']:.3f})",
        "finetuning: held-out answers, nats a token": f"{sft['heldout_answer_nats_per_token']:.3f}",
        "pretraining's held-out text after finetuning": f"{sft['pretraining_nats_before']:.3f} → "
        f"{sft['pretraining_nats_after']:.3f}",
        "gold score of SFT's answers: standard deviation": f"{sd:.3f}",
        "reward model: held-out accuracy (chance 25 %)": f"{reward['accuracy']:.1%}",
        "the annotator's own ceiling": f"{reward['annotator_ceiling']:.1%}",
        "calibration error": f"{reward['calibration_error']:.3f}",
        "DPO: held-out loss (log 4 = 1.386 at the start)": f"{dpo['heldout_nll']:.3f}",
        "judge's accuracy on held-out human labels": f"{results(run, 'report')['judge_accuracy']:.1%}",
    }


def table(heading: str, columns: Iterable[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {' | '.join([heading, *columns])} |", "|---" * (1 + len(next(iter(rows.values())))) + "|"]
    return "\n".join(lines + [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]) + "\n"


def main(runs: list[Path]) -> None:
    columns = [f"seed {read_json(run / 'pretrain/settings.json')['settings']['seed']}" for run in runs]
    policies = [results(run, "report")["policies"] for run in runs]
    show: Callable[[dict[str, Any]], str]
    for heading, show in NAMES.items():
        rows = {name: [show(found[name]) for found in policies] for name in policies[0]}
        print(table(heading, columns, {name: cells for name, cells in rows.items() if any(cells)}))
    stages = [stage_rows(run) for run in runs]
    print(table("stage", columns, {name: [found[name] for found in stages] for name in stages[0]}))


if __name__ == "__main__":
    with plain_endings():
        try:
            main([Path(name) for name in sys.argv[1:]])
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"a figure is missing or not a number ({error!r}); give finished runs of all stages"
            ) from None
