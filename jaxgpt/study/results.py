"""A study's results: points with what their seeds and prompts say about them, as JSON, as a table and as answers side
by side."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.rlhf.intervals import SeedSummary, summarise_seeds
from jaxgpt.runs.pages import Html, make_section, make_table
from jaxgpt.study.task import Evaluation

MEASURES = {"gold": "gold reward", "proxy": "reward model h", "judge": "judge, P(positive)"}
SHOWN = ("kl", "gold", "proxy", "judge", "length", "ended")


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a method: its name ("beta 0.1"), and its runs, which differ only in their seed."""

    name: str
    runs: Sequence[Evaluation]

    def __getitem__(self, measure: str) -> SeedSummary:
        """The mean over runs and prompts, each seed's own, and their range or interval."""
        return summarise_seeds(self._values(measure))

    def gain(self, start: "Point", measure: str) -> SeedSummary:
        """The mean difference from another setting on the same prompts, paired by seed; without as many runs (best-of-n
        has one), of the mean over runs."""
        own_SN, before_SN = self._values(measure), start._values(measure)
        if len(own_SN) != len(before_SN):
            own_SN, before_SN = own_SN.mean(0, keepdims=True), before_SN.mean(0, keepdims=True)
        return summarise_seeds(own_SN - before_SN)

    def _values(self, measure: str) -> np.ndarray:
        return np.stack([getattr(run, measure) for run in self.runs])

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


def points_table(methods: PointsByMethod, measures: Sequence[str] = SHOWN) -> Html:
    """All points, as HTML (`intervals.HOW_TO_READ`); and what each one's gold reward gains over the start's, where that
    is among them."""
    titles = {**MEASURES, "kl": "KL, nats", "length": "tokens", "ended": "ended"}
    start = _start(methods)
    rows = (
        (
            method,
            point.name,
            *(_cell(point, name) for name in measures),
            *([Html(point.gain(start, "gold").text(2))] if start else []),
            str(len(point.runs)),
        )
        for method, points in methods.items()
        for point in points
    )
    gain = ["gold gain over the start, paired"] if start else []
    return make_table(("method", "", *(titles.get(name, name) for name in measures), *gain, "seeds"), rows, named=True)


def say_points(say: Callable[[str], None], methods: PointsByMethod) -> None:
    """Each point's measures, a line each."""
    for method, points in methods.items():
        for point in points:
            values = (f"{name} {point[name].text(2)}" for name in SHOWN)
            say(f"{' '.join((method, point.name)).strip()}: {', '.join(values)}")


def describe_bands(methods: PointsByMethod) -> str:
    """What the bands or bars around these points are."""
    found = {point["gold"].spread: None for points in methods.values() for point in points}
    return f"bands: {' or '.join(found)}"


def _start(methods: PointsByMethod) -> Point | None:
    return next(iter(methods.get("start", ())), None)


def _cell(point: Point, name: str) -> Html:
    if not all(np.isfinite(getattr(run, name)).all() for run in point.runs):
        return Html("–")
    mean, _, rest = point[name].text(1 if name == "length" else 2).partition(" ")
    return Html(f"{mean} <small>{rest}</small>" if rest else mean)


def answers_html(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Html:
    """The same prompts answered by each policy, as HTML; every text is escaped."""
    return Html(
        "".join(
            make_section(prompt, ((name, texts[i]) for name, texts in answers.items()))
            for i, prompt in enumerate(prompts)
        )
    )


def summarise_points(methods: PointsByMethod, measures: Sequence[str] = SHOWN) -> Any:
    """All points as JSON: {method: [{"name", measure: `SeedSummary`, "gold_gain": over the point "start"}]}."""
    start = _start(methods)
    return {
        method: [
            {
                "name": point.name,
                **{name: dataclasses.asdict(point[name]) for name in measures},
                **({"gold_gain": dataclasses.asdict(point.gain(start, "gold"))} if start else {}),
            }
            for point in points
        ]
        for method, points in methods.items()
    }
