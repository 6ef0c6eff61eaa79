"""A study's results: points with intervals, tables, and one HTML page."""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.files import write_text
from jaxgpt.rlhf.intervals import Interval, crossed_interval
from jaxgpt.runs.report import CSS
from jaxgpt.study.task import Evaluation

MEASURES = {"gold": "gold reward", "proxy": "reward model h", "judge": "judge, P(positive)"}


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a method: its name ("beta 0.1"), and its runs, which differ only in their seed."""

    name: str
    runs: Sequence[Evaluation]

    def __getitem__(self, measure: str) -> Interval:
        """The mean over runs and prompts, with its 95 % interval."""
        return crossed_interval(np.stack([getattr(run, measure) for run in self.runs]))

    def run_means(self, measure: str) -> np.ndarray:
        """Each run's own mean, [R]."""
        return np.array([getattr(run, measure).mean() for run in self.runs])


PointsByMethod = Mapping[str, Sequence[Point]]


def read_points(found: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, list[Point]]:
    """The points of {method: {setting: [`Seen` as JSON, one per run]}}."""
    return {
        method: [Point(setting, [Evaluation.from_json(one) for one in row]) for setting, row in settings.items()]
        for method, settings in found.items()
    }


def collect_first_answers(methods: PointsByMethod) -> dict[str, list[str]]:
    """The answers of each point's first run, for `samples`; best-of-n has no texts of its own."""
    shown = {f"{name} {point.name}".strip(): point.runs[0].texts for name, row in methods.items() for point in row}
    return {name: texts for name, texts in shown.items() if texts}


def points_table(
    methods: PointsByMethod, measures: Sequence[str] = ("kl", "gold", "proxy", "judge", "length", "ended")
) -> str:
    """All points with their intervals, as HTML."""
    titles = {**MEASURES, "kl": "KL, nats", "length": "tokens", "ended": "ended"}
    rows = "".join(
        f"<tr><th>{html.escape(method)}</th><td>{html.escape(point.name)}</td>"
        + "".join(f"<td>{_cell(point, name)}</td>" for name in measures)
        + f"<td>{len(point.runs)}</td></tr>"
        for method, points in methods.items()
        for point in points
    )
    head = "".join(f"<th>{html.escape(titles.get(name, name))}</th>" for name in measures)
    return f"<table><thead><tr><th>method</th><th></th>{head}<th>runs</th></tr></thead><tbody>{rows}</tbody></table>"


def _cell(point: Point, name: str) -> str:
    if not all(np.isfinite(getattr(run, name)).all() for run in point.runs):
        return "–"
    one = point[name]
    digits = 1 if name == "length" else 2
    spread = "" if one.low == one.high else f" <small>[{one.low:.{digits}f}, {one.high:.{digits}f}]</small>"
    return f"{one.mean:.{digits}f}{spread}"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, as HTML."""
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table>"


def answers_html(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> str:
    """The same prompts answered by each policy, as HTML; every text is escaped."""
    parts = []
    for i, prompt in enumerate(prompts):
        said = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(texts[i])}</dd>" for name, texts in answers.items()
        )
        parts.append(f"<section><h3>{html.escape(prompt)}</h3><dl>{said}</dl></section>")
    return "".join(parts)


def write_page(folder: Path, title: str, said: str, parts: Sequence[tuple[str, str | Path]]) -> Path:
    """Write report.html from parts (heading, HTML or a picture in the folder, which is embedded). `said`: the
    introduction."""
    body = []
    for heading, part in parts:
        body.append(f"<h2>{html.escape(heading)}</h2>" if heading else "")
        if isinstance(part, Path):
            data = base64.b64encode(part.read_bytes()).decode()
            body.append(f'<figure><img alt="{html.escape(heading)}" src="data:image/png;base64,{data}"></figure>')
        else:
            body.append(part)
    path = folder / "report.html"
    write_text(path, PAGE.format(title=html.escape(title), css=CSS, said=html.escape(said), body="\n".join(body)))
    return path


def summarise_points(
    methods: PointsByMethod, measures: Sequence[str] = ("kl", "gold", "proxy", "judge", "length", "ended")
) -> Any:
    """All points as JSON: {method: [{"name", measure: {mean, low, high}}]}."""
    return {
        method: [
            {"name": point.name, **{name: dataclasses.asdict(point[name]) for name in measures}}
            for point in read_points
        ]
        for method, read_points in methods.items()
    }


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head><body>
<h1>{title}</h1>
<p>{said}</p>
{body}
</body></html>
"""
