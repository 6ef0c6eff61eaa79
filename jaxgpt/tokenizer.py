"""Text to token ids and back: byte-level BPE or single characters, and the prompt/answer template.

The template is made of ids, never of rendered text that is encoded afterwards:

    <prompt> prompt </prompt> <answer> answer </answer>

so text that spells a tag stays text and cannot forge one. Ids 0-5 are the tags of `SPECIALS` in every tokenizer.
"""

import dataclasses
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxgpt.config import UserError

SPECIALS = ("<pad>", "<bos>", "<prompt>", "</prompt>", "<answer>", "</answer>")
PAD, BOS, PROMPT, PROMPT_END, ANSWER, ANSWER_END = range(len(SPECIALS))
TEMPLATE_VERSION = 1
SMALLEST_BPE = len(SPECIALS) + 256  # the tags and every byte
TRAINING_CHARACTERS = 8_000_000  # BPE learns its merges from at most this much text
_PIECE = 65_536  # characters: long documents are cut into such pieces before the sample is drawn

Ids = Sequence[int] | np.ndarray
Row = tuple[Sequence[int], Sequence[int]]  # the ids of an example, and their roles: see `example_ids`


class Tokenizer:
    """Encodes any Unicode text exactly. Wraps a `tokenizers.Tokenizer` whose first ids are `SPECIALS`."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        found = tuple(core.id_to_token(i) for i in range(len(SPECIALS)))
        if found != SPECIALS:
            raise UserError(f"ids 0-5 of this tokenizer are {found}, not {SPECIALS}; train one with jaxgpt.tokenizer")
        core.encode_special_tokens = True  # "</answer>" inside a text is text; this setting is not part of the file
        self._core = core
        self.vocab_size: int = core.get_vocab_size()
        self.fingerprint: str = _digest([f"template {TEMPLATE_VERSION}", core.to_str()])

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without tags. Raises UserError for lone surrogates, which are not Unicode text."""
        try:
            return self._core.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise UserError(f"cannot encode {text[:40]!r}: not valid Unicode text; remove lone surrogates") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            found = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            return [self.encode(text) for text in texts]  # names the text that is at fault
        return [encoding.ids for encoding in found]

    def decode(self, ids: Ids) -> str:
        """The text of `ids`; tags, padding and ids outside the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=True)

    def show(self, ids: Ids) -> str:
        """The text of `ids` with the tags in place and padding dropped, for people to read."""
        parts: list[str] = []
        run: list[int] = []
        for i in (int(i) for i in ids):
            if i >= len(SPECIALS):
                run.append(i)
                continue
            parts += [self.decode(run), "" if i == PAD else SPECIALS[i]]
            run = []
        return "".join([*parts, self.decode(run)])

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and template.json into `folder`, which is made if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._core.to_str(pretty=True), encoding="utf-8")
        template = {"version": TEMPLATE_VERSION, "specials": list(SPECIALS)}
        (folder / "template.json").write_text(json.dumps(template, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Reads what `save` wrote. Raises UserError when a file is missing, unreadable or of another template."""
        for name in ("tokenizer.json", "template.json"):
            if not (folder / name).is_file():
                raise UserError(f"no {name} in {folder}; give a folder that a run saved a model or tokenizer to")
        try:
            template = json.loads((folder / "template.json").read_text(encoding="utf-8"))
            core = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise UserError(f"the tokenizer in {folder} is unreadable ({error}); delete it, run again") from error
        if template != {"version": TEMPLATE_VERSION, "specials": list(SPECIALS)}:
            raise UserError(f"{folder}/template.json is not template version {TEMPLATE_VERSION}; train the model again")
        return Tokenizer(core)


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` ids; the same texts give the same tokenizer.

    The merges are learnt from `TRAINING_CHARACTERS` of text, drawn with a fixed seed, when there is more than that
    (a quarter of the film reviews costs 0.3 % of compression and takes a fifth of the time).
    """
    if vocab_size < SMALLEST_BPE:
        raise UserError(f"a BPE vocabulary of {vocab_size} is too small; the least is {SMALLEST_BPE} (tags and bytes)")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_training_sample(texts), trainer)
    return Tokenizer(core)


def train_char(texts: Sequence[str]) -> Tokenizer:
    """One id for each character found in `texts`; any other character becomes its UTF-8 bytes, an id each."""
    characters = sorted(set().union(*map(set, texts)))
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {name: i for i, name in enumerate(names)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(list(SPECIALS))
    return Tokenizer(core)


def cached_tokenizer(kind: Literal["bpe", "char"], texts: Sequence[str], vocab_size: int, cache: Path) -> Tokenizer:
    """The tokenizer trained on `texts`, kept in `cache`/tokenizers under the hash of texts, kind and size.

    `vocab_size` is for BPE only: a character tokenizer has as many ids as it needs. The folder appears whole or not
    at all, so a killed run leaves nothing half written.
    """
    key = _digest([kind, str(vocab_size if kind == "bpe" else 0), f"template {TEMPLATE_VERSION}", *texts])
    folder = cache / "tokenizers" / key[:32]
    if folder.is_dir():
        return Tokenizer.load(folder)
    made = train_bpe(texts, vocab_size) if kind == "bpe" else train_char(texts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made.save(Path(scratch) / "new")
        try:
            os.replace(Path(scratch) / "new", folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, with the same tokenizer
                raise
    return made


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its answer; `ended` says whether the closing </answer> is there."""

    prompt: str
    answer: str
    ended: bool


def prompt_ids(tok: Tokenizer, prompt: str) -> list[int]:
    """<prompt> prompt </prompt> <answer>: what an answer is sampled from."""
    return [PROMPT, *tok.encode(prompt), PROMPT_END, ANSWER]


def example_ids(tok: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the whole example, and a role for each: 1 for the answer and its closing </answer>, else 0."""
    head = prompt_ids(tok, prompt)
    tail = [*tok.encode(answer), ANSWER_END]
    return head + tail, [0] * len(head) + [1] * len(tail)


def parse(tok: Tokenizer, ids: Ids) -> Example:
    """The inverse of `example_ids`; padding after the end is ignored. Raises ValueError for any other sequence."""
    row = [int(i) for i in ids]
    while row and row[-1] == PAD:
        row.pop()
    tags = [i for i in row if i < len(SPECIALS)]
    ended = tags[3:] == [ANSWER_END] and row[-1] == ANSWER_END
    if tags[:3] != [PROMPT, PROMPT_END, ANSWER] or row[0] != PROMPT or not (ended or len(tags) == 3):
        raise ValueError(f"not a prompt with an answer: {tok.show(row)[:80]!r}")
    middle = row.index(PROMPT_END)
    if row[middle + 1] != ANSWER:
        raise ValueError(f"text between </prompt> and <answer>: {tok.show(row)[:80]!r}")
    return Example(tok.decode(row[1:middle]), tok.decode(row[middle + 2 :]), ended)


def answer_text(tok: Tokenizer, ids: Ids) -> str:
    """The text of generated `ids` (what follows <answer>) up to the first </answer>, or all of it."""
    row = [int(i) for i in ids]
    return tok.decode(row[: row.index(ANSWER_END)] if ANSWER_END in row else row)


def _training_sample(texts: Sequence[str]) -> list[str]:
    if sum(map(len, texts)) <= TRAINING_CHARACTERS:
        return list(texts)
    pieces = [text[at : at + _PIECE] for text in texts for at in range(0, len(text), _PIECE)]
    random.Random(0).shuffle(pieces)
    sample, size = [], 0
    for piece in pieces:
        sample.append(piece)
        size += len(piece)
        if size >= TRAINING_CHARACTERS:
            break
    return sample


def _digest(texts: Iterable[str]) -> str:
    """sha256 of a list of texts; the lengths keep ["ab"] and ["a", "b"] apart."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
