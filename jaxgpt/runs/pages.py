"""A run's results as one HTML page: texts are escaped, pictures embedded, and nothing is loaded from elsewhere."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxgpt.files import write_text


class Html(str):
    """Text that is HTML already; every other text is escaped."""

    __slots__ = ()


def escape(text: str) -> str:
    """The text as HTML."""
    return text if isinstance(text, Html) else html.escape(text)


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]], named: bool = False) -> Html:
    """A table; if `named`, the first cell of a row is its name."""
    titles = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(_cell(text, named and i == 0) for i, text in enumerate(row))}</tr>" for row in rows)
    return Html(f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>")


def _cell(text: str, heads: bool) -> str:
    return f"<th>{escape(text)}</th>" if heads else f"<td>{escape(text)}</td>"


def make_section(heading: str, entries: Iterable[tuple[str, str]]) -> Html:
    """A heading, and below it the (name, text) entries: a prompt and its answers."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries)
    return Html(f"<section><h3>{escape(heading)}</h3><dl>{items}</dl></section>")


def embed_picture(path: Path, alt: str, caption: str = "") -> Html:
    """A PNG file inside the page; `alt` stands for it where it can't be seen."""
    data = base64.b64encode(path.read_bytes()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{below}</figure>')


def write_page(folder: Path, title: str, intro: str, parts: Sequence[tuple[str, str | Path]]) -> Path:
    """Write report.html from parts (heading, text, `Html` or a picture's path); a heading may be empty."""
    body = []
    for heading, part in parts:
        body.append(f"<h2>{escape(heading)}</h2>" if heading else "")
        body.append(embed_picture(part, heading) if isinstance(part, Path) else escape(part))
    path = folder / "report.html"
    write_text(path, PAGE.format(title=escape(title), css=CSS, intro=escape(intro), body="\n".join(body)))
    return path


CSS = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .82rem; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
tbody th { text-align: left; } figure { margin: 1.5rem 0; } img { max-width: 100%; background: white; }
figcaption, small { opacity: .75; } section { border-top: 1px solid #8884; } h3 { font-size: 1rem; }
dl { display: grid; grid-template-columns: 11rem 1fr; gap: .25rem 1rem; } dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head><body>
<h1>{title}</h1>
<p>{intro}</p>
{body}
</body></html>
"""
