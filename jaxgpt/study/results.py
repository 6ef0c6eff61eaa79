"""A study's results: points with intervals, as JSON, as a table and as answers side by side."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.rlhf.intervals import Interval, crossed_interval
from jaxgpt.runs.pages import Html, make_section, make_table
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
) -> Html:
    """All points with their intervals, as HTML."""
    titles = {**MEASURES, "kl": "KL, nats", "length": "tokens", "ended": "ended"}
    rows = (
        (method, point.name, *(_cell(point, name) for name in measures), str(len(point.runs)))
        for method, points in methods.items()
        for point in points
    )
    return make_table(("method", "", *(titles.get(name, name) for name in measures), "runs"), rows, named=True)


def _cell(point: Point, name: str) -> Html:
    if not all(np.isfinite(getattr(run, name)).all() for run in point.runs):
        return Html("–")
    one = point[name]
    digits = 1 if name == "length" else 2
    spread = "" if one.low == one.high else f" <small>[{one.low:.{digits}f}, {one.high:.{digits}f}]</small>"
    return Html(f"{one.mean:.{digits}f}{spread}")


def answers_html(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Html:
    """The same prompts answered by each policy, as HTML; every text is escaped."""
    return Html(
        "".join(
            make_section(prompt, ((name, texts[i]) for name, texts in answers.items()))
            for i, prompt in enumerate(prompts)
        )
    )


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
