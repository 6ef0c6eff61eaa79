"""Conversations as token ids: our tags, or the chat template (Jinja) that a model was trained with.

    prompt_ids(tok, prompt)              what an answer is generated after
    example_ids(tok, prompt, answer)     the same with the answer, and a mask of what the model must sample
    chat_tokenizer(core, source, …)      a model's tokenizer with its own template

A conversation is written as one text and encoded in one call, so every piece gets the ids that it has in this context.
A Jinja template is rendered around placeholders for the messages and split there: it never sees what people write, and
only its own text holds control tokens (`Tokenizer.mark`). When it is read, the ids of a few conversations are compared
with those of the whole rendered text, which is what `apply_chat_template` of transformers gives. It is rendered in a
process of its own, under limits of time and memory.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.data import jinja_process
from jaxgpt.data.jinja_process import Message
from jaxgpt.data.tokenizer import Ids, Strip, Template, Tokenizer, control_tokens, find_control_token, prepended
from jaxgpt.errors import UserError, needs_extra, printable
from jaxgpt.structs import Batch

with needs_extra("data"):
    import tokenizers

Turn = tuple[str, str]  # a prompt and its answer

_P, _A, _P2, _A2, _P3 = (f"\u2060{name}\u2060" for name in ("one", "two", "three", "four", "five"))
_SPACE = "\n \n"  # around a placeholder, shows what a template strips
_SPACED_P, _SPACED_A = (f"{_SPACE}{placeholder}{_SPACE}" for placeholder in (_P, _A))
_THOUGHT = f"<think>\n{_P3}\n</think>"
# Everything that a template might change in a text.
_PUNCTUATION = """all signs:\t!"#$%&'()*+,-./0;<=>?@[\\]^_`{|}~ /think\n\n\n2 Letters"""
_PROBES: tuple[Turn, ...] = (
    ("Hello, who are you?", "I'm a model."),
    (" two  spaces\nand lines ", " they stay\n\nor go \n"),
    ("\n2+2=4 [x] (y) é中文🙂", "\n\tcode: `f(x)`."),
    ("...", "Ünï 12345"),
    (_PUNCTUATION, _PUNCTUATION),
    ("a long text, " * 100, "a long text, " * 100),
)
_PROBE_TEXTS = [text for turn in _PROBES for text in turn]
_CONVERSATIONS: tuple[tuple[str, ...], ...] = (  # all that are ever rendered
    *[(_P, _A, _P2, _A2, _P3)[:n] for n in (1, 2, 3, 5)],
    (_SPACED_P,),
    (_P, _SPACED_A),
    *[(_P, text, _P2) for text in (_SPACED_A, _THOUGHT + _A, _THOUGHT + _SPACED_A)],
    *[(prompt,) for prompt, _ in _PROBES],
    *_PROBES,
    *[tuple(_PROBE_TEXTS[:n]) for n in range(3, len(_PROBE_TEXTS), 2)],
)
SECONDS, MEMORY = 2.0, 512 * 2**20  # limits for rendering them all: processor time, and bytes


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its answer; `ended` says whether the end of the answer is present."""

    prompt: str
    answer: str
    ended: bool


# ---- to ids and back ----


def prompt_ids(tok: Tokenizer, prompt: str, history: Sequence[Turn] = ()) -> list[int]:
    """The ids that an answer to `prompt` is generated after; `history`: the earlier turns of the conversation."""
    return tok.encode(_prompt_text(tok, prompt, history))


def example_ids(tok: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt with its answer, and a role for each: 1 for all that the model must sample, which is the answer
    with its end; otherwise 0. Raises UserError if the model's template has no finished answers of this form."""
    template = tok.template
    if template.refused:
        raise UserError(f"answers can't be trained on or scored with this model's chat template: {template.refused}")
    context, rest = tok.encode_after(*_texts(tok, prompt, answer))
    return context + rest, [0] * len(context) + [1] * len(rest)


def parse(tok: Tokenizer, ids: Ids) -> Example:
    """The inverse of `example_ids`; padding after the end is ignored. Raises ValueError for any other sequence."""
    row, template = [int(i) for i in ids], tok.template
    while row and row[-1] == tok.pad:
        row.pop()
    before, between, opening, closing = map(
        tok.mark, (template.before, template.between, template.opening, template.closing)
    )
    start, middle, rest = tok.decode_marked(row).partition(between)
    prompt, answer = start.removeprefix(before), rest.removeprefix(opening).removesuffix(closing)
    if not middle or not start.startswith(before):
        raise ValueError(f"not a prompt with an answer: {tok.show(row)[:80]!r}")
    if tok.has_control_token(prompt + answer):
        raise ValueError(f"special tokens inside the text: {tok.show(row)[:80]!r}")
    return Example(prompt, answer, rest.endswith(closing))


def answer_text(tok: Tokenizer, ids: Ids) -> str:
    """The text of generated `ids` up to the first end of an answer, or all of it."""
    row, template = [int(i) for i in ids], tok.template
    return without_opening(tok, tok.decode(row[: row.index(template.end)] if template.end in row else row))


def text_reward(reward_fn: Callable[[list[str], list[str]], Any], tok: Tokenizer) -> Callable[[Batch], Any]:
    """Adapt reward_fn(prompts, answers) -> scores to rows of token ids, for `ppo.host_iteration`."""

    def on_rows(rows: Batch) -> Any:
        prompts, answers = [], []
        for tokens_T, mask_T in zip(rows.tokens_BT, rows.mask_BT, strict=True):
            prompts.append(tok.decode(tokens_T[: int(np.argmax(mask_T))]))
            answers.append(answer_text(tok, tokens_T[mask_T]))
        return reward_fn(prompts, answers)

    return on_rows


def _texts(tok: Tokenizer, prompt: str, answer: str) -> tuple[str, str]:
    """What a model is given, and what it must sample."""
    template = tok.template
    said = tok.mark(template.opening) + _strip(answer, template.answer_strip) + tok.mark(template.closing)
    return _prompt_text(tok, prompt), said


def _prompt_text(tok: Tokenizer, prompt: str, history: Sequence[Turn] = ()) -> str:
    template = tok.template
    text = tok.mark(template.before)
    for earlier, answer in history:
        how, thinking = template.past_strip, answer.rpartition("</think>")
        if template.thinking_strip and thinking[1]:
            how, answer = template.thinking_strip, thinking[2]
        text += _strip(earlier, template.prompt_strip) + tok.mark(template.past)
        text += _strip(answer, how) + tok.mark(template.closing + template.turn)
    return text + _strip(prompt, template.prompt_strip) + tok.mark(template.between)


def without_opening(tok: Tokenizer, answer: str) -> str:
    """The text of a sampled answer without the template's own, such as an empty <think> block, before it."""
    opening = tok.template.opening
    return answer.removeprefix(tok.decode(tok.encode(tok.mark(opening)))) if opening else answer


def _strip(text: str, how: Strip) -> str:
    left, right = ({"": "", "\n": "\n", "space": None}[side] for side in how)
    return text.lstrip(left).rstrip(right)


# ---- a model's own template ----


def chat_tokenizer(
    core: tokenizers.Tokenizer, source: str, names: Mapping[str, str], separator: int | None, where: str
) -> Tokenizer:
    """The tokenizer of a model with the Jinja template `source`. `names`: the strings that templates refer to as
    bos_token, eos_token and the like. `where` is named in errors. Raises UserError if the template can't be split, if
    answers don't end with a control token, or, naming what differs, if its ids would not be those of the whole text."""
    try:
        tok = Tokenizer(core, _split(core, source, names, separator))
    except UserError as error:
        raise UserError(f"the chat template of {where} can't be used: {error}") from error
    except ValueError as error:  # Jinja's errors, and placeholders that don't occur exactly once
        raise UserError(f"the chat template of {where} can't be used: {printable(str(error))}") from error
    if difference := _first_difference(tok, core):
        raise UserError(f"the chat template of {where} can't be used: {difference}")
    return tok


@functools.lru_cache(maxsize=16)
def _render_all(source: str, names: tuple[tuple[str, str], ...]) -> Mapping[tuple[str, ...], tuple[str, str]]:
    """(text, error) for each of `_CONVERSATIONS`, one of the two empty; rendered in a process with limits
    (`data.jinja_process`). UserError if the template exceeds them."""
    with needs_extra("pretrained"):
        import jinja2  # noqa: F401

    conversations = [_messages(*texts) for texts in _CONVERSATIONS]
    job = {"source": source, "names": dict(names), "conversations": conversations, "seconds": SECONDS, "memory": MEMORY}
    command = [sys.executable, "-SP", jinja_process.__file__]  # starts in a fraction of the time without site
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            command, input=json.dumps(job).encode(), env=environment, capture_output=True, timeout=30 * SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"it takes more than {error.timeout:g} s to render") from None
    if hasattr(signal, "SIGPROF") and done.returncode == -signal.SIGPROF:
        raise UserError(f"it takes more than {SECONDS:g} s to render a few short conversations")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(printable(said[-1]) if said else f"rendering it ended with status {done.returncode}")
    return dict(zip(_CONVERSATIONS, map(tuple, json.loads(done.stdout)), strict=True))


def _render(source: str, names: Mapping[str, str], texts: Sequence[str]) -> str:
    """The text of one of `_CONVERSATIONS`. Raises ValueError with what is wrong with the template."""
    text, wrong = _render_all(source, tuple(names.items()))[tuple(texts)]
    if wrong:
        raise ValueError("it writes today's date, so its ids change daily" if "strftime_now" in wrong else wrong)
    return text


def _messages(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _split(core: tokenizers.Tokenizer, source: str, names: Mapping[str, str], separator: int | None) -> Template:
    """The parts of a Jinja template. Raises ValueError, or Jinja's own errors, if it can't be split."""

    def rendered(*texts: str) -> str:
        return _render(source, names, texts)

    controls = control_tokens(core)
    asked = rendered(_P)
    before, between = asked.split(_P)
    to_answer, after = rendered(_P, _A).split(_A)
    found = find_control_token(controls, after)
    if found is None:
        raise ValueError(f"it ends answers with {after[:20]!r}, without a special token")
    end, stop = found
    template = Template(
        before,
        between,
        closing=after[:stop],
        end=end,
        separator=end if separator is None else separator,
        begin=prepended(core),
        opening=to_answer.removeprefix(asked),
        prompt_strip=_stripped(lambda text: rendered(text).removeprefix(before).removesuffix(between), _P),
        jinja=source,
        names=dict(names),
    )
    with contextlib.suppress(ValueError):  # Jinja's errors: a template of one turn
        template = _with_turns(template, controls, rendered)
    if not to_answer.startswith(asked):
        shown = to_answer.removeprefix(before + _P)
        why = f"it asks for an answer after {between!r} but writes a finished one after {shown!r}"
        return dataclasses.replace(template, opening="", refused=why)
    strip = _stripped(lambda text: rendered(_P, text).removeprefix(to_answer).removesuffix(after), _A)
    return dataclasses.replace(template, answer_strip=strip)


def _with_turns(template: Template, controls: Mapping[int, str], rendered: Callable[..., str]) -> Template:
    """The template with what stands around earlier turns, unless later turns are written differently from the first."""
    before, between, closing = template.before, template.between, template.closing
    to_past, rest = rendered(_P, _A, _P2).split(_A)
    past, turn = to_past.removeprefix(before + _P), rest.removeprefix(closing).removesuffix(_P2 + between)
    if find_control_token(controls, past) is None:
        return template
    if rendered(_P, _A, _P2, _A2, _P3) != "".join(
        [before, _P, past, _A, closing, turn, _P2, past, _A2, closing, turn, _P3, between]
    ):
        return template
    put = lambda text: rendered(_P, text, _P2).removeprefix(to_past).removesuffix(rest)  # noqa: E731
    dropped = _P3 not in put(_THOUGHT + _A)
    thinking_strip = _stripped(lambda text: put(_THOUGHT + text), _A) if dropped else ()
    return dataclasses.replace(
        template, past=past, turn=turn, past_strip=_stripped(put, _A), thinking_strip=thinking_strip
    )


def _stripped(put: Callable[[str], str], placeholder: str) -> Strip:
    """What is removed at either side of a text that is put into a template."""
    left, right = put(f"{_SPACE}{placeholder}{_SPACE}").split(placeholder)
    kinds = {_SPACE: "", _SPACE[1:]: "\n", "": "space"}
    if left not in kinds or right[::-1] not in kinds:
        raise ValueError(f"it writes {left!r} and {right!r} for {_SPACE!r} at the sides of a text")
    return kinds[left], kinds[right[::-1]]


def _first_difference(tok: Tokenizer, core: tokenizers.Tokenizer) -> str:
    """What tells our ids of a few conversations from those of the rendered text, encoded as a whole; "" if nothing."""
    template = tok.template
    core.encode_special_tokens = False
    for i, (prompt, answer) in enumerate(_PROBES):
        history = _PROBES[:i] if template.turn else ()
        said = [text for turn in history for text in turn]
        found = {"the prompt": (prompt_ids(tok, prompt, history), [*said, prompt])}
        if not template.refused:
            found["the answer"] = tok.encode("".join(_texts(tok, prompt, answer))), [prompt, answer]
        for what, (ids, texts) in found.items():
            text = _render(template.jinja, template.names, texts)
            expected = core.encode(text, add_special_tokens=False).ids
            expected = expected if len(texts) % 2 else expected[: len(ids)]
            if ids != expected:
                at = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), -1)
                ours, theirs = tok.show(ids[at:][:3]), tok.show(expected[at:][:3])
                return f"{what} {texts[-1][:60]!r} has {theirs!r} at token {at}, where its parts give {ours!r}"
    return ""
