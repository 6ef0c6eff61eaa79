"""Records of runs with values of any kind in them, read by the doctor."""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import traceback
from pathlib import Path
from typing import Any

from jaxgpt.files import write_record
from jaxgpt.runs import doctor
from tests.torture.harness import Kind, Outcomes, spoil

SPAN = {"mean": 0.5, "low": 0.45, "high": 0.55}
READ = {"read": 300, "used": 299, "left_out": {"longer than 64 tokens": 1}}
ROWS = {"heldout": READ, "preferences": READ}
POLICY = {
    **dict.fromkeys(("gold", "judge", "reward", "length", "words", "ended", "win_rate_gold"), SPAN),
    "better_than_before": SPAN,
    "distinct_2": 0.5,
    "distinct_texts": 80,
    "answers": ["good", "bad"],
}
PPO = ("score", "kl", "length", "ended", "sampler_gap_max", "ratio_error_first", "explained_variance", "skipped")
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # stage -> a line of metrics, and the results
    "pretrain": (
        {"train_nats_per_token": 4.0, "skipped": 0.0, "seconds_data": 0.0, "seconds_device": 0.1},
        {"heldout_nats_per_token": 4.9, "heldout_interval": SPAN},
    ),
    "sft": (
        {"train_nats_per_token": 4.0, "skipped": 0.0, "seconds_data": 0.0, "seconds_device": 0.1},
        {"pretraining_nats_before": 4.8, "pretraining_nats_after": 5.0, "heldout_trained_on": 0, "rows": ROWS},
    ),
    "preferences": (
        {},
        {name: {"preferences": 20, "equal_answers": 0} for name in ("train", "heldout")} | {"heldout_trained_on": 0},
    ),
    "reward": (
        {"train_loss": 1.2, "skipped": 0.0, "seconds_data": 0.0, "seconds_device": 0.1},
        {"accuracy": 0.5, "accuracy_interval": SPAN, "chance": 0.25, "chance_nll": 1.386, "nll": 1.1, "rows": ROWS},
    ),
    "ppo": (
        dict.fromkeys(PPO, 0.0) | {"ended": 0.9, "length": 20.0, "explained_variance": 0.3},
        {"score": 1.0, "kl": 5.0},
    ),
    "dpo": (
        {"train_loss": 1.2, "skipped": 0.0, "chosen_reward": 0.1, "rejected_reward": -0.1, "end_log_ratio": 0.0},
        {"heldout_nll": 1.1, "heldout_accuracy_interval": SPAN, "rows": ROWS, "heldout_trained_on": 0},
    ),
    "report": ({}, {"policies": {"SFT": POLICY, "DPO": POLICY, "PPO": POLICY}, "prompts": 200, "rows": ROWS}),
    "align": ({}, {"models": {"before": POLICY, "dpo": POLICY}, "rows": ROWS, "heldout_trained_on": 0}),
}
SETTINGS = {"ppo": {"new_tokens": 40}, "fixed_beta": False, "target_kl": 9.0}
STRANGE: tuple[Any, ...] = (
    None, True, "", "1.5", "NaN", "\ud800", "é" * 500, [], {}, [1.0], [[]], {"mean": "x"},
    -1, 0, 1e300, -1e300, 1e308, 5e-324, 10**400,
)  # fmt: skip
NUMBERS = {"accuracy", "chance", "nll", "score", "kl", "heldout_nll", "heldout_trained_on", "distinct_texts", "prompts"}
GROUPS = {"results", "policies", "models", "rows", "train", "SFT", "dpo", "gold", "ended", "accuracy_interval"}
PLACES = ("settings.json", "metrics.jsonl", "done.json")


def records(stage: str) -> dict[str, Any]:
    """A whole run of a stage: file -> content, all of it new."""
    line, results = copy.deepcopy(STAGES[stage])
    falling = {name: value for name, value in line.items() if name.startswith("train_")}
    rows = [
        {"step": n + 1, "time": 0.5 * n, **line, **{name: value + 3.0 - 0.1 * n for name, value in falling.items()}}
        for n in range(24 if line else 0)
    ]
    return {
        "settings.json": {"stage": stage, "settings": SETTINGS, "inputs": {}, "versions": {}},
        "metrics.jsonl": rows,
        "done.json": {"stage": stage, "fingerprint": "0", "results": results, "files": {}},
    }


def write(folder: Path, content: dict[str, Any]) -> None:
    """The files of a run, with the right checksums."""
    folder.mkdir(parents=True)
    for name, value in content.items():
        if name in ("settings.json", "done.json") and isinstance(value, dict):
            with contextlib.suppress(ValueError):  # what no JSON holds
                write_record(folder / name, value)
                continue
        rows = value if name.endswith("l") and isinstance(value, list) else [value]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    if isinstance(value, dict):
        return [place for key, inner in value.items() for place in [(value, key), *places(inner)]]
    if isinstance(value, list):
        return [place for key, inner in enumerate(value) for place in [(value, key), *places(inner)]]
    return []


def is_readable(path: Path) -> bool:
    """Whether each line (of another file: all of it) is an object of JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    data = path.read_bytes()
    parts = [line for line in data.split(b"\n") if line] if path.suffix == ".jsonl" else [data]
    try:
        return all(isinstance(json.loads(part.decode(), parse_constant=refuse), dict) for part in parts)
    except (ValueError, RecursionError):
        return False


def spoil_value(rng: random.Random, folder: Path, stage: str) -> tuple[str, bool]:
    """Replace or remove values; returns what was done, and whether the doctor must say that it can't read this."""
    content = records(stage)
    done, must = [], False
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        name = rng.choice([name for name in PLACES if content[name]])
        found = places(content[name])
        if not found:
            continue
        holder, key = rng.choice(found)
        row = name == "metrics.jsonl" and isinstance(holder, dict)
        if isinstance(holder, dict) and rng.random() < 0.2:
            del holder[key]
            done.append(f"{name}: no {key}")
            must |= row and key in ("step", "time")
        else:
            holder[key] = value = copy.deepcopy(rng.choice(STRANGE))
            done.append(f"{name}: {key} = {value!r:.60}")
            must |= row and (value == 10**400 or isinstance(value, (bool, str, list, dict)))
            must |= row and key in ("step", "time") and value is None
            must |= (
                name == "done.json" and key in NUMBERS and (value == 10**400 or isinstance(value, (bool, str, list)))
            )
            must |= name == "done.json" and key in GROUPS and value is not None and not isinstance(value, dict)
    if rng.random() < 0.1:
        content["metrics.jsonl"] = [*content["metrics.jsonl"], rng.choice([[], 5, "x", None, [[1]]])]
        done, must = [*done, "another kind of line"], True
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, content)
    return "; ".join(done), must and len(done) == 1


def spoil_file(rng: random.Random, folder: Path, stage: str) -> tuple[str, bool]:
    """Damage a file, or put something else in its place; returns as `spoil_value`."""
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, records(stage))
    path = folder / rng.choice(PLACES)
    match rng.randrange(8):
        case 0:
            path.unlink()
            return f"no {path.name}", path.name == "settings.json" or (bool(STAGES[stage][0]) and path.name[0] == "m")
        case 1:
            path.unlink()
            path.symlink_to(path.name)
            return f"{path.name} is a link to itself", True
        case 2:
            path.unlink()
            path.mkdir()
            return f"{path.name} is a folder", True
        case 3:
            path.write_bytes(data := rng.randbytes(rng.randrange(1, 200)))
        case 4:
            path.write_bytes(data := b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000)
        case 5:
            path.write_bytes(data := rng.choice([b"", b"null", b"[]", b"\xff\xfe{}", b"\x1f\x8b\0", b"{}"]))
        case _:
            path.write_bytes(data := spoil(rng, path.read_bytes()))
    return f"{path.name}: {data!r:.300}", not is_readable(path)


def crafted_records(rng: random.Random, folder: Path) -> Outcomes:
    """One spoilt stage beside a whole one: no traceback, nothing wrong only of what could be read, both are named."""
    write(folder / "pretrain", records("pretrain"))
    while True:
        stage = rng.choice([name for name in STAGES if name != "pretrain"])
        place = folder / stage
        what, must = rng.choice([spoil_value, spoil_value, spoil_file])(rng, place, stage)
        printed = io.StringIO()
        outcome = ""
        try:
            with contextlib.redirect_stdout(printed):
                status = doctor.main([str(folder)])
        except BaseException:
            outcome = traceback.format_exc(limit=-3)
        else:
            lines = [line for line in printed.getvalue().split("\n") if line and not line.startswith("  ")]
            unread = [line for line in lines if "could not be read" in line]
            if len(lines) != 2 or "nothing wrong found" not in lines[0]:
                outcome = f"not one line for each stage: {lines}"
            elif must and not unread:
                outcome = f"said of a run that can't be read: {lines[1]}"
            elif unread and (status != 1 or "nothing wrong" in lines[1]):
                outcome = f"status {status} after {lines}"
        shutil.rmtree(place) if place.is_dir() else os.unlink(place)
        yield outcome and f"{stage}: {what}: {outcome}"


KINDS = {"the doctor, crafted records": Kind(crafted_records)}
