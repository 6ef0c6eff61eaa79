"""Renders chat templates (Jinja); run as a program, it renders untrusted ones under limits.

Jinja's sandbox keeps a template from running code, but not from looping forever or filling the memory: one `*`, `join`
or `center` is enough. So `data.templates` runs this file as a separate process with limits on time and memory, which
can open no file or connection. It imports nothing else of jaxgpt.
"""

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]
LONGEST = 100_000  # characters in a rendered conversation


def render(source: str, messages: Sequence[Message], names: Mapping[str, str], *, ask: bool) -> str:
    """Render a Jinja template as transformers does, in a sandbox; `ask` adds the generation prompt. There is no
    `strftime_now`, `random` or `lipsum`: a template must always give the same text."""
    settings = {"tools": None, "documents": None, "add_generation_prompt": ask}
    return str(_compile(source).render(messages=list(messages), **{**names, **settings}))


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what is trained on; here it is replaced by its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(x: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    del environment.filters["random"], environment.globals["lipsum"]
    return environment.from_string(source)


def _limit(seconds: float, memory: int) -> None:
    """From here on, limit processor time and memory, and allow no new file, connection or program."""
    import html  # noqa: F401  load every module now: no file can be opened later

    import jinja2.debug  # noqa: F401

    render("{{ '\\n' ~ messages | pprint | wordwrap }}", [], {}, ask=True)

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # kills the process, in the middle of whatever it does
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def main() -> None:
    """Read a job from stdin; write a list with [text, ""] or ["", error] for each conversation."""
    job = json.load(sys.stdin)
    done: list[list[str]] = []
    _limit(job["seconds"], job["memory"])
    for messages in job["conversations"]:
        if done and done[0][1]:  # if the first fails, the others are not needed
            done.append(done[0])
            continue
        try:
            text = render(job["source"], messages, job["names"], ask=len(messages) % 2 == 1)
            if len(text) > LONGEST:
                raise ValueError(f"it writes more than {LONGEST:,} characters")
            text.encode()
            done.append([text, ""])
        except MemoryError:
            sys.exit(f"it takes more than {job['memory'] >> 20} MB of memory")
        except Exception as error:  # whatever Jinja, or Python on its behalf, raises
            done.append(["", f"{type(error).__name__}: {str(error)[:1000]}"])
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    main()
