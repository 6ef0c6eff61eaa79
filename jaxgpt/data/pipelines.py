"""Batches of token rows: seeded, sharded across processes, and resumable in the middle of an epoch.

Batches are dicts of NumPy arrays. `tokens` [B, T] int32 is padded on the right with <pad>. `mask` [B, T] bool marks the
targets: mask[b, t] says that token t is to be predicted from the tokens before it. Packed rows add `segments` [B, T]
int32 (1, 2, ... for the examples of a row, 0 for padding) and `positions` [B, T] int32 (within the example).

With several processes, `batch` is the global batch size, and part p of n gets rows p * batch / n to
(p + 1) * batch / n of the batch that a single process would get. The saved position in the data is the same for every
process and for any number of processes.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.data.comparisons import TokenizedPreference
from jaxgpt.data.token_stream import TokenStream
from jaxgpt.data.tokenizer import Row
from jaxgpt.errors import UserError, needs_extra

with needs_extra("data"):
    import grain
    import grain.experimental

ArrayBatch = dict[str, np.ndarray]
Stream = np.ndarray | TokenStream  # int32 [N]
_READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # no threads: the device works meanwhile
_BINS = 64  # rows packed at a time: with more, less padding is wasted


class Batches(Iterator[ArrayBatch]):
    """A resumable iterator: `set_state(get_state())` gives the same next batches.

    The state is plain JSON, the same for every part, and includes a fingerprint of data and settings, because grain
    itself would silently continue on other data.
    """

    def __init__(self, dataset: grain.IterDataset, identity: Sequence[Any]) -> None:
        self._iterator = iter(dataset)
        self._fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __next__(self) -> ArrayBatch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position in the data, as JSON values to save in a checkpoint."""
        return {"fingerprint": self._fingerprint, "grain": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`. Raises UserError if it was saved with other data or settings."""
        if state["fingerprint"] != self._fingerprint:
            raise UserError("this checkpoint's data position is for other data or data settings; start a new run")
        self._iterator.set_state(state["grain"])


class PromptBatches(Iterator[ArrayBatch]):
    """Endless batches of prompts, `tokens` [B, P] and `length` [B], int32: one shuffled pass after the other. It has a
    position, as `Batches` has; every process makes the whole batch."""

    def __init__(self, tokens_NP: np.ndarray, length_N: np.ndarray, batch: int, seed: int) -> None:
        self.width = tokens_NP.shape[1]
        self._tokens, self._length, self._batch, self._next = tokens_NP, length_N, batch, 0
        self._rng, self._order = np.random.default_rng(seed), np.zeros(0, np.int64)
        identity = ["prompts", _digest([tokens_NP, length_N]), batch, seed]
        self._fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __next__(self) -> ArrayBatch:
        begin, end = self._next * self._batch, (self._next + 1) * self._batch
        while len(self._order) < end:
            self._order = np.concatenate([self._order, self._rng.permutation(len(self._length))])
        self._next += 1
        index = self._order[begin:end]
        return {"tokens": self._tokens[index], "length": self._length[index]}

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {"fingerprint": self._fingerprint, "next": self._next}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises UserError if it was taken on other prompts or settings."""
        if state["fingerprint"] != self._fingerprint:
            raise UserError("this checkpoint's position is for other prompts or settings; start a new run")
        self._next = state["next"]


def windows(stream: Stream, block: int, batch: int, *, seed: int, part: int = 0, parts: int = 1) -> Batches:
    """Endless batches of `block` consecutive tokens; every token of a window but the first is a target.

    An epoch cuts the stream into non-overlapping windows from a random offset (new each epoch, so that no token is
    always first) and shuffles them.
    """
    shuffled = _shuffled(_Windows(stream, block, seed), seed, None)
    content = stream.digest if isinstance(stream, TokenStream) else _digest([stream])
    identity = ["windows", content, block, batch, seed]
    return Batches(_batched(shuffled, batch, part, parts), identity)


def window_eval(stream: Stream, block: int, batch: int, max_batches: int) -> list[ArrayBatch]:
    """At most `max_batches` batches of non-overlapping windows, spread evenly over the stream; always the same ones.

    Every batch has `batch` rows; if windows run out, the last one is filled with rows whose mask is False.
    """
    _check_stream(stream, block)
    count = len(stream) // block
    chosen = np.linspace(0, count - 1, min(count, batch * max_batches)).astype(np.int64)
    rows = [{"tokens": stream[i * block : (i + 1) * block], "mask": np.arange(block) > 0} for i in chosen.tolist()]
    return _filled_batches(rows, batch)


def fit_rows(rows: Sequence[Row], length: int) -> tuple[list[Row], int]:
    """The rows of at most `length` tokens that have a target, and how many were dropped."""
    kept = [row for row in rows if len(row[0]) <= length and any(row[1])]
    if not kept:
        shortest = min((len(row[0]) for row in rows), default=0)
        raise UserError(f"none of {len(rows)} examples fits {length} tokens (shortest: {shortest}); use a longer block")
    return kept, len(rows) - len(kept)


def packed_examples(
    rows: Sequence[Row],
    length: int,
    batch: int,
    *,
    seed: int,
    all_tokens: bool = False,
    part: int = 0,
    parts: int = 1,
) -> Batches:
    """Endless batches of [batch, length] rows that hold several whole examples each (grain's first-fit packing).

    Targets are the answer's tokens and </answer>; with `all_tokens`, every token but an example's first. Examples are
    reshuffled each epoch. Rows must fit (see `fit_rows`). Every part packs the whole batch and keeps its own rows.
    """
    elements = [_element(row, length, all_tokens) for row in rows]
    examples = _shuffled(grain.MapDataset.source(elements), seed, None)
    packed = grain.experimental.FirstFitPackIterDataset(
        examples.to_iter_dataset(_READ_OPTIONS),
        length_struct={"tokens": length, "mask": length},
        num_packing_bins=max(batch, _BINS),
        seed=seed,
    )
    content = _digest(array for element in elements for array in element.values())
    identity = ["packed", content, length, batch, seed]
    size = _part_size(batch, parts)

    def own(whole: ArrayBatch) -> ArrayBatch:
        return {name: array[part * size : (part + 1) * size] for name, array in whole.items()}

    return Batches(packed.map(_packed_row).batch(batch).map(own), identity)


def padded_examples(rows: Sequence[Row], length: int, batch: int, *, all_tokens: bool = False) -> list[ArrayBatch]:
    """All rows once, in order, one example per row, with the keys of `packed_examples`: for evaluation.

    The last batch is filled with rows of padding whose mask is False.
    """
    padded = []
    for row in rows:
        element = _element(row, length, all_tokens)
        size = len(element["tokens"])
        tokens, mask = (np.pad(element[name], (0, length - size)) for name in ("tokens", "mask"))
        steps = np.arange(length, dtype=np.int32)
        real = steps < size
        padded.append({"tokens": tokens, "mask": mask, "segments": real.astype(np.int32), "positions": steps * real})
    return _filled_batches(padded, batch)


def preference_batches(
    rankings: Sequence[TokenizedPreference],
    length: int,
    batch: int,
    *,
    seed: int,
    epochs: int,
    part: int = 0,
    parts: int = 1,
) -> Batches:
    """Batches over `epochs` shuffled passes; an incomplete last batch is dropped.

    Keys: tokens [B, C, T] int32; mask [B, C, T] bool, the answer and its </answer>; choice [B] int32, or `losses.TIE`;
    present [B, C] bool, False where a prompt has fewer than C candidates (C is the most that any ranking has).
    """
    whole = len(rankings) * epochs // batch * batch
    if not whole:
        raise UserError(f"{len(rankings)} preferences x {epochs} epochs fill no batch of {batch}; use a smaller batch")
    elements = _ranking_elements(rankings, length)
    shuffled = _shuffled(grain.MapDataset.source(elements), seed, epochs)
    content = _digest(array for element in elements for array in element.values())
    identity = ["preferences", content, batch, seed, epochs]
    return Batches(_batched(shuffled[:whole], batch, part, parts), identity)


def preference_eval(rankings: Sequence[TokenizedPreference], length: int, batch: int) -> list[ArrayBatch]:
    """All rankings once, in order, with the keys of `preference_batches`: for evaluation.

    The last batch is filled with rows in which no candidate is present: `present.any(1)` says which rows count.
    """
    return _filled_batches(_ranking_elements(rankings, length), batch)


def check_tokens(batch: ArrayBatch, vocab: int) -> None:
    """Raises UserError naming the first token outside [0, vocab): on the device it would be silently clamped."""
    tokens = batch["tokens"]
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise UserError(
            f"token {int(tokens[at])} at {list(at)} of a batch is outside the model's vocabulary of {vocab}; "
            "use the tokenizer the model was trained with"
        )


def _shuffled(dataset: grain.MapDataset, seed: int, epochs: int | None) -> grain.MapDataset:
    """The dataset repeated for `epochs` (None: forever), reshuffled each epoch."""
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be 0 or more")
    folded = int(np.random.SeedSequence(seed).generate_state(1)[0])  # grain uses seed + epoch: keep seeds far apart
    return dataset.shuffle(seed=folded).repeat(epochs)


def _batched(dataset: grain.MapDataset, batch: int, part: int, parts: int) -> grain.IterDataset:
    """The rows of every batch that belong to `part`; the other rows are never built."""
    return dataset.batch(_part_size(batch, parts))[part::parts].to_iter_dataset(_READ_OPTIONS)


def _part_size(batch: int, parts: int) -> int:
    if parts < 1 or batch % parts:
        raise UserError(f"a batch of {batch} rows doesn't divide among {parts} processes; use a multiple of {parts}")
    return batch // parts


class _Windows(grain.MapDataset):
    """Window i of epoch e, where index = e * len + i: the stream from offset(e) + i * block."""

    def __init__(self, stream: Stream, block: int, seed: int) -> None:
        super().__init__()
        _check_stream(stream, block)
        self._stream, self._block, self._seed = stream, block, seed
        self._count = max(1, (len(stream) - block + 1) // block)
        self._room = min(block - 1, len(stream) - self._count * block)
        self._mask = np.arange(block) > 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, i = divmod(index, self._count)
        start = _offset(self._seed, epoch, self._room) + i * self._block
        return {"tokens": self._stream[start : start + self._block], "mask": self._mask}


@functools.lru_cache(maxsize=64)
def _offset(seed: int, epoch: int, room: int) -> int:
    return int(np.random.default_rng([seed, epoch]).integers(room + 1))


def _check_stream(stream: Stream, block: int) -> None:
    if block < 2 or len(stream) < block:
        raise UserError(f"a text of {len(stream)} tokens gives no window of {block}; use more text or a shorter block")


def _element(row: Row, length: int, all_tokens: bool) -> ArrayBatch:
    ids, roles = row
    if len(ids) > length:
        raise ValueError(f"an example of {len(ids)} tokens does not fit {length}; use fit_rows first")
    mask = np.arange(len(ids)) > 0 if all_tokens else np.array(roles, np.bool_)
    return {"tokens": np.array(ids, np.int32), "mask": mask}


def _ranking_elements(rankings: Sequence[TokenizedPreference], length: int) -> list[ArrayBatch]:
    most = max(len(ranking.rows) for ranking in rankings)
    elements = []
    for ranking in rankings:
        tokens, mask = np.zeros((most, length), np.int32), np.zeros((most, length), np.bool_)
        for i, row in enumerate(ranking.rows):
            element = _element(row, length, all_tokens=False)
            size = len(element["tokens"])
            tokens[i, :size], mask[i, :size] = element["tokens"], element["mask"]
        present = np.arange(most) < len(ranking.rows)
        choice = np.array(ranking.choice, np.int32)
        elements.append({"tokens": tokens, "mask": mask, "choice": choice, "present": present})
    return elements


def _packed_row(row: ArrayBatch) -> ArrayBatch:
    names = {"tokens": "tokens", "mask": "mask", "segments": "tokens_segment_ids", "positions": "tokens_positions"}
    return {name: row[key] for name, key in names.items()}


def _filled_batches(rows: Sequence[ArrayBatch], batch: int) -> list[ArrayBatch]:
    """Stack rows into batches; the last is filled with zeros: padding, mask False, nothing present."""
    batches = []
    for at in range(0, len(rows), batch):
        part = list(rows[at : at + batch])
        part += [{name: np.zeros_like(value) for name, value in part[0].items()}] * (batch - len(part))
        batches.append({name: np.stack([row[name] for row in part]) for name in part[0]})
    return batches


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.shape, array.dtype)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
