"""Bits flipped in the records of a run."""

import random
from pathlib import Path
from typing import Any

from jaxgpt.files import read_record, write_record
from tests.torture.harness import Kind, Outcomes, flip_bit, held, spoil

RECORD: dict[str, Any] = {"step": 9, "rate": 1e-3, "names": ["a", "é\n"], "inner": {"x": None, "y": True}}


def record_flips(rng: random.Random, folder: Path) -> Outcomes:
    """The reader that all records share."""
    path = folder / "record.json"
    while True:
        write_record(path, RECORD)
        if rng.random() < 0.5:
            what = flip_bit(rng, path)
        else:
            path.write_bytes(data := spoil(rng, path.read_bytes()))
            what = f"{data!r}"
        outcome = held(lambda: read_record(path, RECORD, "write it again"), RECORD, "record.json")
        yield outcome and f"{what}: {outcome}"


KINDS = {"any record, damaged anywhere": Kind(record_flips)}
