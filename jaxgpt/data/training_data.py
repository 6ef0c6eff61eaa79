"""What a stage learns from and is measured on: rows read, used and left out, and prompts that are in both.

Every stage says this in the same words (`RowCounts`), and stores it in its results.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, Self

from jaxgpt.data import formats, pipelines, sources
from jaxgpt.data.comparisons import (
    MaxSizes,
    TokenizedPreference,
    drop_long_preferences,
    max_sizes,
    prompt_of,
    tie_rate,
    tokenize_preferences,
)
from jaxgpt.data.streams import tokenize_stream
from jaxgpt.data.templates import example_ids, prompt_ids
from jaxgpt.data.token_stream import TokenStream, count_shared
from jaxgpt.data.tokenizer import Row, Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.losses import TIE
from jaxgpt.structs import Batch


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """How many rows (examples, prompts, preferences) were read, and how many were left out, by reason."""

    read: int
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, used: Sized, left_out: Counter[str]) -> Self:
        """The counts for the rows that a reader returned and those it left out."""
        return cls(len(used) + left_out.total(), left_out)

    @property
    def used(self) -> int:
        """How many were not left out."""
        return self.read - sum(self.left_out.values())

    def without(self, reason: str, count: int) -> "RowCounts":
        """The counts once `count` more rows are left out."""
        return RowCounts(self.read, {**self.left_out, reason: count}) if count > 0 else self

    def __str__(self) -> str:
        if not self.left_out:
            return f"{self.read:,} read, all used"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return f"{self.read:,} read, {self.used:,} used; left out: {reasons}"

    def record(self) -> dict[str, Any]:
        """The counts as JSON, for a run's results."""
        return {"read": self.read, "used": self.used, "left_out": dict(self.left_out)}


def count_trained_on(heldout: Iterable[Hashable], train: Iterable[Hashable]) -> int:
    """How many held-out rows, each given by its prompt, are about a prompt that is trained on."""
    known = set(train)
    return sum(prompt in known for prompt in heldout)


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """What a stage says about its data, and stores."""

    counts: Mapping[str, RowCounts]  # of what is learned from, by its name ("preferences", "examples"), and "heldout"
    trained_on: int = 0  # held-out rows whose prompt (for raw text: whole document) is also trained on
    note: str = ""  # more about what is learned from
    same_file: bool = False

    def announce(self, say: Callable[[str], None], stage: str) -> None:
        """Say what was read, used and left out, and warn if prompts are trained on and measured on."""
        for name, counts in self.counts.items():
            say(f"{stage}: {'held out' if name == 'heldout' else f'{name}{self.note}'}: {counts}")
        self.warn(say, stage)

    def warn(self, say: Callable[[str], None], stage: str) -> None:
        """Warn if held-out prompts or documents are also trained on."""
        if self.trained_on and "heldout" in self.counts:
            count = f"{self.trained_on:,} of {self.counts['heldout'].used:,} held-out rows"
            same = " (both are the same file)" if self.same_file else ""
            say(f"{stage}: WARNING: {count} have prompts that are trained on{same}: the figures are too good")
        elif self.trained_on:
            count = f"{self.trained_on:,} held-out documents"
            say(f"{stage}: WARNING: {count} are also trained on: the figures are too good")

    def record(self) -> dict[str, Any]:
        """The same for a run's results."""
        rows = {name: counts.record() for name, counts in self.counts.items()}
        return {
            "rows": rows,
            **({"heldout_trained_on": self.trained_on} if any("held" in name for name in rows) else {}),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceData(LoadedData):
    """Preferences to learn from and held-out ones."""

    train: list[TokenizedPreference]
    heldout: list[TokenizedPreference]
    size: MaxSizes  # of all
    steps: int  # batches in all epochs
    equal_answers: int  # training preferences whose answers are all equal: they teach nothing
    tie_rate: float  # how often people found all answers equally good

    def record(self) -> dict[str, Any]:
        """The same for a run's results."""
        return {**super().record(), "equal_answers": self.equal_answers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleData(LoadedData):
    """Examples to learn from and held-out ones."""

    train: list[Row]
    heldout: list[Row]


def load_tokenized(path: Path, tok: Tokenizer, length: int) -> tuple[list[TokenizedPreference], RowCounts]:
    """The preferences of a file or database whose rows have at most `length` tokens, and what was left out. UserError
    if none is left."""
    preferences, _, left_out = formats.load_counted(path)
    counts = RowCounts(len(preferences) + left_out.total(), left_out)
    rankings = tokenize_preferences(tok, preferences)
    try:
        kept, dropped = drop_long_preferences(rankings, length)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return kept, counts.without(f"longer than {length} tokens", dropped)


def load_preference_data(
    preferences: Path, heldout: Path, tok: Tokenizer, *, length: int, limit: int, batch: int, epochs: int
) -> PreferenceData:
    """Load both files, keep the first `limit` preferences to learn from, and count what is left out. UserError, naming
    the file, if nothing fits `length` tokens, or if there are too few for one batch."""
    train, counts = load_tokenized(preferences, tok, length)
    counts = counts.without(f"beyond --limit {limit}", len(train) - limit)
    train, steps = train[:limit], min(len(train), limit) * epochs // batch
    if not steps:
        raise UserError(
            f"{preferences}: {len(train)} preferences x {epochs} epochs fill no batch of {batch}; give more, or set a "
            "smaller --batch"
        )
    if epochs == 1:
        counts = counts.without("in an incomplete last batch", len(train) - steps * batch)
    held, heldout_counts = load_tokenized(heldout, tok, length)
    if all(one.choice == TIE for one in held):
        raise UserError(f"{heldout}: all {len(held)} preferences are ties; hold out some that have a favourite")
    size, ties = max_sizes(train + held), sum(one.choice == TIE for one in train)
    return PreferenceData(
        counts={"preferences": counts, "heldout": heldout_counts},
        trained_on=count_trained_on((one.prompt for one in held), (one.prompt for one in train)),
        note=f" (up to {size.candidates} answers{f', {ties:,} ties' if ties else ''})",
        same_file=formats.fingerprint(preferences) == formats.fingerprint(heldout),
        train=train,
        heldout=held,
        size=size,
        steps=steps,
        equal_answers=sum(len({tuple(ids) for ids, _ in one.rows}) == 1 for one in train),
        tie_rate=tie_rate(train),
    )


def load_examples(source: str, cache: Path, tok: Tokenizer, *, length: int, heldout: int) -> ExampleData:
    """Load both splits of a source of examples; of the second, the first `heldout` that fit. UserError, naming source
    and split, if no example fits `length` tokens."""
    rows, counts = {}, {}
    splits: dict[str, sources.Split] = {"examples": "train", "heldout": "test"}
    for name, split in splits.items():
        pairs = sources.examples(source, split, cache)
        try:
            rows[name], dropped = pipelines.fit_rows([example_ids(tok, *pair) for pair in pairs], length)
        except UserError as error:
            raise UserError(f"{source}{' (held out)' if name == 'heldout' else ''}: {error}") from None
        counts[name] = RowCounts.of(pairs, pairs.left_out).without(f"longer than {length} tokens", dropped)
    counts["heldout"] = counts["heldout"].without("beyond --eval-batches", len(rows["heldout"]) - heldout)
    train, held = rows["examples"], rows["heldout"][:heldout]
    trained_on = count_trained_on(map(prompt_of, held), map(prompt_of, train))
    return ExampleData(counts=counts, trained_on=trained_on, train=train, heldout=held)


def load_prompts(source: str, cache: Path, tok: Tokenizer) -> tuple[list[list[int]], RowCounts]:
    """The ids of a source's prompts to train on, and what was left out."""
    prompts = sources.prompts(source, "train", cache)
    return [prompt_ids(tok, prompt.text) for prompt in prompts], RowCounts.of(prompts, prompts.left_out)


def text_counts(train: TokenStream, heldout: TokenStream, windows: RowCounts) -> LoadedData:
    """The counts for raw text; `windows`: those of `heldout_windows`."""
    documents = RowCounts(train.documents).without(sources.BLANK, train.blank)
    return LoadedData({"documents": documents, "held-out windows": windows}, count_shared(heldout, train))


def load_windows(
    source: str, tok: Tokenizer, cache: Path, length: int, batch: int, batches: int
) -> tuple[list[Batch], RowCounts]:
    """`heldout_windows` of a source's held-out text."""
    stream = tokenize_stream(sources.open_documents(source, "test", cache), tok, cache)
    return heldout_windows(stream, length, batch, batches)


def heldout_windows(stream: pipelines.Stream, length: int, batch: int, batches: int) -> tuple[list[Batch], RowCounts]:
    """At most `batches` batches of windows of `length` tokens, spread evenly over a stream, and how many it holds."""
    found = [Batch.of(arrays) for arrays in pipelines.window_eval(stream, length, batch, batches)]
    whole = len(stream) // length
    return found, RowCounts(whole).without("beyond --eval-batches", whole - batch * batches)
