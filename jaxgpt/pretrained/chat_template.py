"""A checkpoint's chat template (Jinja), converted to token ids once.

The template is rendered around placeholders for the texts and split at them; only what the template itself wrote is
encoded with special tokens. So no text can forge one, as it could if a rendered conversation were encoded as a whole.
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
    """The Template equivalent to `source`. `names`: bos_token, eos_token and the like, which templates refer to.
    Raises UserError if it can't be split, or answers don't end with a special token."""
    one, answer, two = _PLACEHOLDERS
    first = {"role": "user", "content": one}
    talk = [first, {"role": "assistant", "content": answer}, {"role": "user", "content": two}]
    try:
        before, between = _render(source, [first], names).split(one)
        spaced = _render(source, [{"role": "user", "content": f"  {one}\n\n"}], names)
        begun, rest = _render(source, talk, names).split(answer)
        after, last = rest.split(two)
    except Exception as error:  # Jinja's errors, and placeholders that don't occur exactly once
        raise UserError(f"the chat template of {where} can't be used ({type(error).__name__}: {error})") from error
    begin, middle, tail = (tuple(_encode(core, text)) for text in (before, between, after))
    added = core.get_added_tokens_decoder()
    if not tail or tail[0] not in added or not added[tail[0]].special:
        raise UserError(f"the chat template of {where} ends answers with {after[:20]!r}, which is not a special token")
    uniform = begun == before + one + between and last == between  # later turns are rendered like the first
    strip = spaced == before + one + between
    return Template(begin, middle, tail[0], separator, turn=tail[1:] if uniform else (), strip=strip)


def of_folder(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of a Hugging Face folder, if it has one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several named templates
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found


def _encode(core: tokenizers.Tokenizer, text: str) -> list[int]:
    core.encode_special_tokens = False
    return list(core.encode(text, add_special_tokens=False).ids)


def _render(source: str, messages: list[dict[str, str]], names: Mapping[str, str]) -> str:
    """Render as Hugging Face does, in a sandbox. A date that a template asks for is left out: it would change
    daily."""
    with needs_extra("pretrained"):
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source).render(messages=messages, add_generation_prompt=True, **names)
