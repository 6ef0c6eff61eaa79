"""The report's page and tables."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from jaxgpt.data.openings import Prompt
from jaxgpt.errors import UserError
from jaxgpt.rlhf.intervals import Interval
from jaxgpt.rlhf.judge import Judge
from jaxgpt.runs import pages, report
from tests.torture import doctor as crafted


def policy(name: str, gold: float, text: str = "a fine film") -> report.PolicyResults:
    rng = np.random.default_rng(int(10 * gold) + 5)
    numbers = {key: rng.random(6) for key in ("reward", "judge", "length", "ended", "opens", "pretrained_nll")}
    return report.PolicyResults(
        name=name,
        texts=[text] * 6,
        gold=gold + 0.1 * rng.random(6),
        **numbers,
        distinct_2=0.5,
        text_nats=Interval(4.0, 3.9, 4.1),
        kl=np.full(6, 3.0),
    )


def write(folder, policies) -> tuple[dict, str]:
    (folder / "stages").mkdir(parents=True)
    content = crafted.records("reward")
    content["done.json"]["results"] |= {"calibration": [{"predicted": 0.3, "observed": 0.25, "count": 10}]}
    crafted.write(folder / "stages/reward", content)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    prompts = [Prompt(f"<script>alert({i})</script>", "a") for i in range(6)]
    judge = Judge(None, Interval(0.75, 0.7, 0.8), 300)
    results = report.write_report(folder, report.read_stages(folder / "stages"), prompts, policies, judge, console)
    return results, console.export_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report's folder, results and table."""
    folder = tmp_path_factory.mktemp("report")
    return folder, *write(folder, [policy("SFT", 0.0, "<img src=x onerror=alert(1)>"), policy("PPO", 0.5)])


def test_text_of_models_and_people_is_never_html(written):
    page = (written[0] / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<script" not in page


def test_figures_and_numbers_are_all_there(written):
    folder, results, table = written
    for name in ("frontier", "scores", "training", "calibration"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    gain = results["policies"]["PPO"]["gold_gain_in_baseline_sd"]
    assert gain["low"] < gain["mean"] < gain["high"]
    assert results["policies"]["SFT"]["gold_gain_in_baseline_sd"]["mean"] == 0.0
    assert "PPO" in table and "…" not in table, "the table must fit 80 columns"


def test_the_page_opens_with_a_verdict_and_chooses_no_cherries(written, tmp_path):
    """Before the figures: the first three prompts, the median one and the one where PPO loses most."""
    page = (written[0] / "report.html").read_text()
    order = [
        "prefers PPO to SFT on 100% of 6",
        "all policies sampled",
        "fixed in advance",
        "The median prompt",
        "loses most",
        "All measures",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places) and page.index("data:image") > places[-1]
    bad = dataclasses.replace(policy("PPO", 0.5), gold=np.array([9.0, 9.0, 9.0, 9.0, -9.0, 9.0]))
    write(tmp_path, [policy("SFT", 0.0), bad])
    worst = (tmp_path / "report.html").read_text().split("loses most")[1]
    assert "alert(4)" in worst.split("<h2>")[0]


@pytest.mark.parametrize(
    ("gain", "judged", "says"),
    [
        (0.5, 0.4, ("on 100%", "judge finds its answers more positive")),
        (-0.5, -0.4, ("on 0% of 6 held-out prompts at", "judge finds its answers less positive")),
        (0.0, 0.0, ("on 50% of 6 held-out prompts, too few to say", "neither better nor worse")),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(gain, judged, says):
    base, noise = policy("SFT", 0.0), np.array([-0.1, 0.1, -0.1, 0.1, -0.1, 0.1])
    other = dataclasses.replace(base, name="PPO", gold=base.gold + gain + noise, judge=base.judge + judged + noise)
    rows = {one.name: report.summarise_policy(one, base) for one in (base, other)}
    text = report.verdict(rows, "PPO", 6).replace(", at a drift", " at a drift")
    assert all(part in text for part in says), text


def test_a_bound_is_shown_as_one():
    row = report.summarise_policy(
        dataclasses.replace(policy("best of 4", 0.2), kl=None, kl_bound=0.64), policy("SFT", 0.0)
    )
    assert report.format_value(row, "kl") == "≤ 0.64"
    assert report.format_value({"kl": None, "kl_bound": None}, "kl") == "–"


def test_a_baseline_that_always_scores_the_same_leaves_the_gain_open(tmp_path):
    flat = dataclasses.replace(policy("SFT", 0.0), gold=np.zeros(6))
    results, table = write(tmp_path, [flat, policy("PPO", 0.5)])
    assert results["policies"]["PPO"]["gold_gain_in_baseline_sd"] is None and "–" in table


def test_a_page_escapes_everything_but_html(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    table = pages.make_table(("<a>", "b"), [("<c>", pages.Html("<small>d</small>"))], named=True)
    answers = pages.make_section("<e>", [("<f>", "<g>")])
    parts = [("<h>", table), ("", answers), ('"i"', tmp_path / "a.png"), ("", "<j>")]
    text = pages.write_page(tmp_path, "<k>", "{l} <m>", parts).read_text()
    for letter in "acefghjkm":
        assert f"<{letter}>" not in text and f"&lt;{letter}&gt;" in text
    assert "<tr><th>&lt;c&gt;</th><td><small>d</small></td></tr>" in text
    assert '<img alt="&quot;i&quot;" src="data:image/png;base64,iVBORw==">' in text and "{l}" in text


def test_a_damaged_stage_is_named_before_anything_is_drawn(tmp_path):
    for name in ("metrics.jsonl", "done.json"):
        for stage in ("reward", "ppo"):
            crafted.write(tmp_path / name / stage, crafted.records(stage))
        (tmp_path / name / "ppo" / name).write_bytes(b"{")
        with pytest.raises(UserError, match=f"ppo/{name}.*; run that stage again with --fresh"):
            report.read_stages(tmp_path / name)


def test_a_figure_that_is_not_finite_is_null_in_the_report(tmp_path):
    """Squares of scores near the end of what a float holds overflow."""
    huge = dataclasses.replace(policy("PPO", 0.5), reward=np.array([-1e300, 1.0, 2.0, 3.0, 4.0, 5.0]))
    with np.errstate(over="ignore"):
        results, _ = write(tmp_path, [policy("SFT", 0.0), huge])
    assert results["policies"]["PPO"]["reward"]["low"] is None
