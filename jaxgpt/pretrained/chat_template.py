"""A checkpoint's chat template (Jinja), converted to token ids once.

The template is rendered with placeholders for the messages and split at them, and only the template's own text may
contain special tokens. So no message can forge one, as it could if a rendered conversation were encoded as a whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.data.tokenizer import Template
from jaxgpt.errors import UserError, needs_extra

with needs_extra("pretrained"):
    import tokenizers

_PLACEHOLDERS = ("\u2060prompt one\u2060", "\u2060answer one\u2060", "\u2060prompt two\u2060")


def read(core: tokenizers.Tokenizer, source: str, names: Mapping[str, str], separator: int, where: str) -> Template:
    """The `Template` equivalent to the Jinja template `source`. `names`: the strings that templates refer to as
    bos_token, eos_token and the like. `where` is named in errors. Raises UserError if the template can't be split, or
    if answers don't end with a special token."""
    prompt, answer, next_prompt = _PLACEHOLDERS
    first = {"role": "user", "content": prompt}
    conversation = [first, {"role": "assistant", "content": answer}, {"role": "user", "content": next_prompt}]
    try:
        before, between = _render(source, [first], names).split(prompt)
        spaced = _render(source, [{"role": "user", "content": f"  {prompt}\n\n"}], names)
        to_answer, rest = _render(source, conversation, names).split(answer)
        after, to_next_answer = rest.split(next_prompt)
    except Exception as error:  # Jinja's errors, and placeholders that don't occur exactly once
        raise UserError(f"the chat template of {where} can't be used ({type(error).__name__}: {error})") from error
    before_ids, between_ids, after_ids = (tuple(_encode(core, text)) for text in (before, between, after))
    added = core.get_added_tokens_decoder()
    if not after_ids or after_ids[0] not in added or not added[after_ids[0]].special:
        raise UserError(f"the chat template of {where} ends answers with {after[:20]!r}, which is not a special token")
    first_turn = before + prompt + between
    uniform = to_answer == first_turn and to_next_answer == between  # later turns are rendered like the first
    turn = after_ids[1:] if uniform else ()
    return Template(before_ids, between_ids, after_ids[0], separator, turn=turn, strip=spaced == first_turn)


def of_folder(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of a Hugging Face folder, if it has one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several named templates
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found


def _encode(core: tokenizers.Tokenizer, text: str) -> list[int]:
    core.encode_special_tokens = False
    return list(core.encode(text, add_special_tokens=False).ids)


def _render(source: str, messages: list[dict[str, str]], names: Mapping[str, str]) -> str:
    """Render as Hugging Face does, in a sandbox, but without `strftime_now`: with today's date in it, a template
    would change daily."""
    with needs_extra("pretrained"):
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source).render(messages=messages, add_generation_prompt=True, **names)
