"""Checks for untrusted tokenizers: ids, what lengthens a text, and a trial encoding."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxgpt.data.tokenizer import tokenizer_errors
from jaxgpt.errors import UserError, needs_extra, show_value

with needs_extra("pretrained"):
    import tokenizers

SAMPLE = "Hello, who are you?\n\t don't  2+2=4 é中文🙂 \u0301\xa0"
MOST_GROWTH = 256  # largest factor by which a tokenizer may lengthen a text


@contextlib.contextmanager
def reading_tokenizer(what: str) -> Iterator[None]:
    """`tokenizer_errors` without the report that the tokenizers package prints when it panics. Anything else that is
    written to stderr meanwhile comes at the end. For one thread at a time."""
    panicked = False
    with tempfile.TemporaryFile() as held:
        try:
            shown = os.dup(2)
        except OSError:  # closed
            shown = os.open(os.devnull, os.O_WRONLY)
        os.dup2(held.fileno(), 2)
        try:
            with tokenizer_errors(what):
                yield
        except UserError as error:
            panicked = type(error.__cause__).__name__ == "PanicException"
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
            held.seek(0)
            if not panicked:
                os.write(2, held.read())


def check_parts(record: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a parsed tokenizer.json has bad ids, makes texts far longer, or has dropout."""
    model = record.get("model")
    model = model if isinstance(model, dict) else {}
    vocab, added = model.get("vocab"), record.get("added_tokens")
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    check_ids(ids, len(vocab) if isinstance(vocab, list) else 0, where)
    if model.get("dropout"):
        raise UserError(f"{where}: model.dropout is {model['dropout']!r:.20}, so ids would be random; set it to null")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name))) > 64:
            raise UserError(f"{where}: model.{name} has more than 64 characters; download it again")
    _check_merges(model, where)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (growth := _growth(record.get(part))) > MOST_GROWTH:
            raise UserError(
                f"{where}: {part} can make a text {growth:.3g} times as long (limit {MOST_GROWTH}); download it again"
            )


def _check_merges(model: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a merge's second token lacks the prefix that it should have: the tokenizers package cuts it
    off unseen, and where that fails it can end the whole process."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        pair = merge if isinstance(merge, list) else str(merge).split(" ")
        if pair and not str(pair[-1]).startswith(prefix):
            raise UserError(
                f"{where}: model.continuing_subword_prefix is {show_value(prefix)}, but the second token of the merge "
                f"{show_value(' '.join(map(str, pair)))} doesn't begin with it; download it again"
            )


def check_ids(ids: Sequence[Any], others: int, where: str) -> None:
    """Raise UserError for ids that are not whole numbers or are far larger than the number of tokens: the tokenizers
    package allocates tables up to the largest id. `others`: how many tokens there are besides `ids`."""
    most = 2 * (len(ids) + others) + 1000
    for i in ids:
        if type(i) is not int or not 0 <= i <= most:
            raise UserError(f"{where}: a token's id is {show_value(i)}, not a whole number from 0 to {most}")


def _growth(part: Any) -> float:
    """About how many times longer a part of a tokenizer.json can make a text."""
    inner = part if isinstance(part, list) else list(part.values()) if isinstance(part, dict) else []
    product = math.prod(map(_growth, inner), start=1.0)
    if not isinstance(part, dict):
        return product
    match part:
        case {"type": "ByteLevel"}:
            return 2 * product
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return product * max(1, len(new) / len(old))
        case {"type": "Replace", "content": str(new)} | {"type": "Prepend", "prepend": str(new)}:
            return product * (1 + len(new))
        case {"type": "TemplateProcessing", "special_tokens": dict(tokens)}:
            ids = (len(token["ids"]) for token in tokens.values() if isinstance(token, dict) and "ids" in token)
            return product * (1 + max(ids, default=0) * (len(part.get("single", [])) + len(part.get("pair", []))))
    return product


def check_tokenizer(core: tokenizers.Tokenizer, where: str) -> None:
    """Raise UserError if two tokens have the same id, or if a short text can't be encoded and decoded."""
    with reading_tokenizer(f"the tokenizer of {where} is unusable"):
        vocab = core.get_vocab()
        if len(set(vocab.values())) < len(vocab):
            names: dict[int, str] = {}
            for token, i in vocab.items():
                if i in names:
                    raise UserError(
                        f"the tokenizer of {where} gives the id {i} to two tokens, {names[i]!r:.40} and {token!r:.40}; "
                        "download it again"
                    )
                names[i] = token
        core.decode(core.encode(SAMPLE).ids)
