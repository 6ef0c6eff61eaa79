"""The web pages in a real browser: Debian's chromium, driven by Playwright."""

import contextlib
import functools
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from experiments import label, ppo, reward, sft
from jaxgpt.config import ModelConfig, round_up
from jaxgpt.data import formats, votes
from jaxgpt.data.jsonl import write_rows
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.files import write_json
from jaxgpt.models import transformer
from jaxgpt.rlhf import reward as reward_model
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import load_language_model, save_model
from jaxgpt.web import label as label_page
from jaxgpt.web import server
from tests.helpers import params_of

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=30_000)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium; on Debian: apt install chromium", allow_module_level=True)
ROOT = Path(__file__).parents[2]
ONE_DEVICE = "--xla_backend_optimization_level=0"  # one device, as on a laptop; compiles quickly
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def open_page(browser, address: str, **options):
    """A page of a first-time visitor, which collects its errors in `problems`."""
    context = browser.new_context(reduced_motion="reduce", **options)  # no colour transitions
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda m: page.problems.append(m.text) if "Content Security Policy" in m.text else None)
    page.problems = []
    page.goto(address)
    return page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(module: str, *flags: str, port: int):
    """Start an experiment in a process of its own and wait until it answers; yields the process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE}
    command = [sys.executable, "-m", module, "--serve.port", str(port), *flags]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            assert process.poll() is None, process.stdout.read().decode()
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("GET", "/")
                assert connection.getresponse().status == 200
                break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def labelling(questions: Path, file: Path, port: int = 0, token: str = "", **who: float):
    """Serve the label page from a thread of this process; yields its port."""
    config = server.ServeConfig(port=port, token=token)
    bound, store = server.Server(config, token), votes.Store(file)
    for task in label.tasks_from_file(questions):
        store.add_task(task)
    app = label_page.application(store, label_page.LabelConfig(**who), config, token)
    thread = threading.Thread(target=bound.run, args=(app,), daemon=True)
    thread.start()
    try:
        yield bound.port
    finally:
        bound.stop()
        thread.join()


def begin(page, name: str) -> None:
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Begin").click()
    page.locator(".answer").first.wait_for()


def prompt(page) -> str:
    return page.locator("#prompt").inner_text()


def judged(page) -> int:
    return int(page.locator("#stats span").first.inner_text().split()[0])


def after(page, action, count: int | None = None) -> None:
    """Do something that saves a vote, and wait until the page counts it."""
    count = judged(page) + 1 if count is None else count
    action()
    expect(page.locator("#stats span").first).to_have_text(f"{count} done")


def violations(page) -> list:
    from axe_core_python.sync_playwright import Axe

    return [(found["id"], [node["html"] for node in found["nodes"]]) for found in Axe().run(page)["violations"]]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A finished run that holds a tiny untrained model."""
    folder = tmp_path_factory.mktemp("tiny") / "sft"
    tok = train_bpe(["first second third prompt number answer own"] * 20, 300)
    config = ModelConfig(layers=1, width=32, heads=2, block=128, vocab=round_up(tok.vocab_size))
    with Run(folder, sft.Settings(run=folder), stage="sft") as run:
        save_model(folder / "model", params_of(config, scale=1.0), config, tok)
        run.finish({})
    return folder


@pytest.fixture
def questions(tmp_path) -> Path:
    rows = (
        {"prompt": f"Prompt number {n}?", "answers": [f"first {n}", f"second {n} {HOSTILE}", f"third {n}"]}
        for n in range(24)
    )
    write_rows(tmp_path / "questions.jsonl", rows)
    return tmp_path / "questions.jsonl"


def test_two_people_label_the_server_is_killed_and_a_reward_model_learns(browser, questions, tmp_path, tiny_run):
    file, port = tmp_path / "votes.sqlite", free_port()
    flags = ("--answers", str(questions), "--votes", str(file))
    flags += ("--assignment.overlap", "0.5", "--assignment.repeat", "0")
    address = f"http://127.0.0.1:{port}/"
    chosen: dict[str, str] = {}  # prompt: the text that ada liked best
    with served("experiments.label", *flags, port=port) as process:
        ada, bob = (open_page(browser, address) for _ in range(2))
        begin(ada, "ada"), begin(bob, "bob")
        assert prompt(ada) != prompt(bob)
        for n in range(5):  # by keys
            chosen[prompt(ada)] = ada.locator(".answer .words").nth(n % 3).inner_text()
            after(ada, lambda n=n: ada.keyboard.press(str(n % 3 + 1)))
        for n in range(3):  # by mouse: the button, and the card itself
            chosen[prompt(ada)] = ada.locator(".answer .words").nth(n).inner_text()
            after(
                ada,
                ada.get_by_role("button", name=f"Answer {n + 1} is the best").click
                if n
                else ada.locator(".answer").nth(n).click,
            )
        taken = prompt(ada)
        after(ada, lambda: ada.keyboard.press("x"))
        after(ada, lambda: ada.keyboard.press("u"), 8)
        assert prompt(ada) == taken  # here it is again
        assert judged(ada) == 8
        for key in "tsx":
            after(bob, lambda key=key: bob.keyboard.press(key))

        process.send_signal(signal.SIGKILL)
        process.wait()
        chosen[prompt(ada)] = ada.locator(".answer .words").nth(1).inner_text()
        ada.keyboard.press("2")  # while the server is gone
        expect(ada.locator("#message")).to_contain_text("No connection")
    with served("experiments.label", *flags, port=port):
        expect(ada.locator("#stats span").first).to_have_text("9 done")  # kept and sent again
        bob.close()
        bob = open_page(browser, address)
        begin(bob, "bob")
        assert judged(bob) == 3  # continues where he stopped

        ada.keyboard.press("r")  # a ranking with a tie
        order = [ada.locator(".answer .words").nth(i).inner_text() for i in (2, 0, 1)]
        ranked = prompt(ada)
        ada.keyboard.press("3"), ada.keyboard.press("1"), ada.keyboard.press("=")
        after(ada, lambda: ada.keyboard.press("2"))
        own, before = prompt(ada), ada.locator(".answer .words").all_inner_texts()
        ada.keyboard.press("w")  # her own answer
        ada.get_by_label("Answer", exact=True).fill(f"ada's own {HOSTILE}")
        ada.get_by_role("button", name="Add").click()
        expect(ada.locator(".answer")).to_have_count(4)
        there = ada.locator(".answer .words").all_inner_texts()
        assert [text for text in there if not text.startswith("ada's own")] == before
        after(ada, ada.locator(".answer", has_text="ada's own").click)
        chosen[own] = f"ada's own {HOSTILE}"
        while ada.locator(".answer").count():  # the rest: whatever says "first"
            words = [ada.locator(".answer .words").nth(i).inner_text() for i in range(3)]
            best = next(i for i, text in enumerate(words) if text.startswith("first"))
            last, count = prompt(ada), judged(ada) + 1
            ada.keyboard.press(str(best + 1))
            expect(ada.locator("#stats span").first).to_have_text(f"{count} done")
            if ada.locator("#task").is_hidden() or prompt(ada) == last:
                break
        assert ada.title() == bob.title() == "Which answer is best? · jaxgpt"  # nothing hostile ran
        assert ada.problems == bob.problems == [] and ada.locator(".answer img, .answer script").count() == 0

    store = votes.Store(file)
    mine = {store.task(vote.task).prompt: vote for vote in store.votes("ada")}
    for text, best in chosen.items():
        vote = mine[text]
        assert vote.kind == "favourite" and store.task(vote.task).answers[vote.tiers[0][0]].text == best
        assert vote.seconds is not None and sorted(vote.shown) == list(range(len(vote.shown)))
    texts = [answer.text for answer in store.task(mine[ranked].task).answers]
    assert [sorted(texts[i] for i in tier) for tier in mine[ranked].tiers] == [[order[0]], sorted(order[1:])]
    assert [vote.kind for vote in store.votes("bob")] == ["tie", "skip", "bad"]
    assert store.task(mine[own].task).answers[3].origin == {"by": "ada", "edited": None}

    count, _ = formats.write(tmp_path / "out.jsonl", formats.verdicts_in(store), "trl")
    assert count > 30
    store.close()
    settings = reward.Settings(
        run=tmp_path / "reward",
        model=tiny_run,
        preferences=Path(f"{file}:train"),
        heldout=Path(f"{file}:heldout"),
        batch=8,
        epochs=2,
        warmup=1,
        reference_samples=8,
    )
    assert 0 <= reward.main(settings)["accuracy"] <= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_label_page_is_accessible_and_fits_a_phone(browser, questions, tmp_path, scheme):
    with labelling(questions, tmp_path / "v.sqlite") as port:
        page = open_page(browser, f"http://127.0.0.1:{port}/", color_scheme=scheme)
        assert violations(page) == []
        begin(page, "ada")
        assert violations(page) == []
        page.keyboard.press("r"), page.keyboard.press("1")
        assert violations(page) == []
        page.keyboard.press("r"), page.keyboard.press("w")
        assert violations(page) == []
        page.keyboard.press("Escape"), page.keyboard.press("?")
        assert violations(page) == []
        page.keyboard.press("Escape")
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        sizes = page.eval_on_selector_all("button", "all => all.map(b => b.offsetHeight).filter(h => h)")
        assert min(sizes) >= 44  # large enough for a finger
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        last, tools = (page.locator(name).last.bounding_box() for name in (".answer", "#tools"))
        assert last["y"] + last["height"] <= tools["y"]  # the buttons don't cover the last answer
        assert violations(page) == []


def test_everything_is_reached_by_the_tab_key(browser, questions, tmp_path):
    with labelling(questions, tmp_path / "v.sqlite") as port:
        page = open_page(browser, f"http://127.0.0.1:{port}/")
        begin(page, "ada")
        seen = set()
        for _ in range(30):
            page.keyboard.press("Tab")
            seen.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
        wanted = {f"Answer {n} is the best" for n in (1, 2, 3)} | {"tie", "bad", "skip", "rank", "write", "undo"}
        assert wanted <= seen
        page.get_by_role("button", name="Answer 2 is the best").focus()
        after(page, lambda: page.keyboard.press("Enter"))


def test_a_key_that_is_held_and_a_double_click_vote_once(browser, questions, tmp_path):
    file = tmp_path / "v.sqlite"
    with labelling(questions, file, repeat=0) as port:
        page = open_page(browser, f"http://127.0.0.1:{port}/")
        begin(page, "ada")
        for _ in range(10):
            page.keyboard.down("1")
            page.wait_for_timeout(30)
        page.keyboard.up("1")
        expect(page.locator("#stats span").first).to_have_text("1 done")
        for count, name in ((2, "Answer 2 is the best"), (3, "Skip")):
            box = page.get_by_role("button", name=name).bounding_box()
            page.mouse.move(box["x"] + 9, box["y"] + 9)
            for click in (1, 2):
                page.mouse.down(click_count=click), page.mouse.up(click_count=click)
                page.wait_for_timeout(300)
            expect(page.locator("#stats span").first).to_have_text(f"{count} done")
        assert votes.Store(file).count() == 3


def test_undo_within_a_ranking_takes_back_a_place_and_escape_ends_it(browser, questions, tmp_path):
    file = tmp_path / "v.sqlite"
    with labelling(questions, file) as port:
        page = open_page(browser, f"http://127.0.0.1:{port}/")
        begin(page, "ada")
        after(page, lambda: page.keyboard.press("1"))
        page.keyboard.press("r"), page.keyboard.press("1"), page.keyboard.press("u"), page.keyboard.press("3")
        assert page.locator(".answer .place").all_inner_texts() == ["", "", "place 1"]
        page.keyboard.press("Escape")
        assert page.locator("#rank").get_attribute("aria-pressed") == "false" and judged(page) == 1
        page.keyboard.press("r"), page.keyboard.press("2")
        words = page.locator(".answer .words").nth(1).inner_text()
        after(page, lambda: page.keyboard.press("Enter"))
    store = votes.Store(file)
    vote = store.votes()[-1]
    assert vote.kind == "ranking" and store.task(vote.task).answers[vote.tiers[0][0]].text == words


def test_a_vote_waits_for_the_page_that_has_the_new_token(browser, questions, tmp_path):
    port, file = free_port(), tmp_path / "v.sqlite"
    with labelling(questions, file, port, "old"):
        page = open_page(browser, f"http://127.0.0.1:{port}/#token=old")
        begin(page, "ada")
    page.keyboard.press("1")
    with labelling(questions, file, port, "new"):
        expect(page.locator("#message")).to_contain_text("token included")
        page.goto("about:blank"), page.goto(f"http://127.0.0.1:{port}/#token=new")
        expect(page.locator("#stats span").first).to_have_text("1 done")
    assert votes.Store(file).count() == 1


def test_a_stranger_s_page_can_neither_read_nor_write(browser, questions, tmp_path):
    """A page of another site, in the same browser, posts to our server."""
    file = tmp_path / "v.sqlite"
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "index.html").write_text("<title>evil</title>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(evil))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        with labelling(questions, file) as port:
            page = open_page(browser, f"http://127.0.0.1:{stranger.server_port}/")
            task = next(iter(votes.Store(file).tasks()))
            vote = {
                "annotator": "evil",
                "id": "1",
                "task": task,
                "kind": "skip",
                "tiers": [[0, 1, 2]],
                "shown": [0, 1, 2],
            }
            for mode, kind in (("no-cors", "text/plain"), ("cors", "application/json")):
                outcome = page.evaluate(
                    """([port, mode, kind, vote]) => fetch(`http://127.0.0.1:${port}/api/vote`, {method: "POST", mode,
                         headers: {"content-type": kind}, body: JSON.stringify(vote)}).then(r => r.status, e => -1)""",
                    [port, mode, kind, vote],
                )
                assert outcome in (-1, 0)  # refused, or opaque
            framed = page.evaluate(
                """port => new Promise(done => { const f = document.createElement("iframe");
                     f.onload = () => { try { done(f.contentDocument ? "empty" : "shut"); } catch { done("shut"); } };
                     f.src = `http://127.0.0.1:${port}/`; document.body.append(f); })""",
                port,
            )
            assert framed in ("empty", "shut")
            assert votes.Store(file).count() == 0
        stranger.shutdown()


# ---- models side by side ----


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_run) -> dict[str, Path]:
    """A reference, a policy with a critic and kept rollouts, and a reward model, all tiny and untrained."""
    root = tmp_path_factory.mktemp("models")
    loaded = load_language_model(tiny_run)
    ppo_run = root / "ppo"
    with Run(ppo_run, ppo.Settings(run=ppo_run), stage="ppo") as run:
        save_model(ppo_run / "model", params_of(loaded.config, 1, scale=1.5), loaded.config, loaded.tokenizer)
        head = transformer.init_scalar_head(jax.random.key(2), loaded.config.width)
        save_model(ppo_run / "critic", {"value_head": head}, loaded.config)
        figures = {name: [0.5, -1.0, 0.25] for name in ("logp", "ref_logp", "ratio", "advantage", "value", "return")}
        one = {
            "prompt": f"<prompt>{HOSTILE}</prompt><answer>",
            "tokens": ["fi", HOSTILE, "</answer>"],
            "score": 1.5,
            "ended": True,
            **figures,
        }
        (ppo_run / "rollouts").mkdir()
        write_json(ppo_run / "rollouts/000014.json", {"iteration": 14, "beta": 0.1, "answers": [one]})
        run.finish({})
    judge = reward_model.init(jax.random.key(3), loaded.params, loaded.config.width)
    save_model(root / "reward/model", judge, loaded.config, loaded.tokenizer)
    return {"sft": tiny_run, "ppo": ppo_run, "reward": root / "reward"}


@pytest.fixture(scope="module")
def side_by_side(models, tmp_path_factory):
    """The port of the chat page, and its votes."""
    port, file = free_port(), tmp_path_factory.mktemp("votes") / "votes.sqlite"
    flags = (
        "--models",
        models["sft"],
        models["ppo"],
        "--reference",
        models["sft"],
        "--reward",
        models["reward"],
        "--ppo",
        models["ppo"],
        "--votes",
        file,
    )
    with served("experiments.chat_web", *map(str, flags), port=port):
        yield port, file


def test_models_answer_side_by_side_and_every_token_can_be_looked_at(browser, models, side_by_side):
    port, file = side_by_side
    page = open_page(browser, f"http://127.0.0.1:{port}/", color_scheme="dark")
    expect(page.locator("#summary")).to_contain_text("sft, ppo")
    page.locator("summary").click()
    page.get_by_label("Tokens", exact=True).fill("16")
    page.get_by_label("Seed").fill("3")
    assert violations(page) == []
    page.get_by_label("Prompt").fill(f"first {HOSTILE}")
    page.keyboard.press("Enter")
    page.locator(".tokens").nth(1).wait_for(timeout=120_000)
    assert page.locator(".turn .prompt .words").inner_text() == f"first {HOSTILE}"
    facts = page.locator(".facts").nth(1).inner_text()
    assert "KL" in facts and "reward" in facts and page.locator(".trace").count() == 1  # the critic is ppo's
    tokens = page.locator(".tokens").nth(1).locator("span")
    page.locator(".tokens").nth(1).locator("span:not(:empty)").first.hover()
    figures = page.locator("#figures")
    expect(figures).to_contain_text("probability")
    expect(figures).to_contain_text("critic's value")
    before = figures.inner_text()
    page.locator(".tokens").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert figures.inner_text() != before
    legends = []
    for name in ("p", "kl", "log_ratio", "entropy"):
        page.locator("#paint").select_option(name)
        painted = tokens.evaluate_all("all => all.filter(t => t.style.backgroundColor).length")
        assert painted > 0, name
        legends.append(page.locator("#legend").inner_text())
    assert "improbable" in legends[0] and "red: below 0" in legends[2].replace("\n", " ")
    page.locator("#paint").select_option("")
    expect(page.locator("#legend")).to_be_empty()
    assert violations(page) == []
    page.on("dialog", lambda dialog: dialog.accept("ada"))
    message, bad = page.locator("#message"), page.get_by_role("button", name="All bad")
    for picked in (page.get_by_role("button", name="The answer of sft is the best"), bad):
        picked.click()
        expect(message).to_contain_text("Saved: 1 vote by ada.")
        expect(picked).to_have_attribute("aria-pressed", "true")
        expect(page.get_by_role("button", name="The answer of ppo is the best")).to_be_disabled()
        picked.click()
        expect(message).to_have_text("Vote taken back: 0 votes by ada.")
    page.get_by_role("button", name="The answer of ppo is the best").click()
    expect(message).to_contain_text("Saved: 1 vote by ada.")
    expect(bad).to_be_disabled()
    assert violations(page) == []
    text = re.sub(r"</?(prompt|answer)>", "", "".join(tokens.all_inner_texts()))  # saved answers have no tags
    page.get_by_label("Prompt").fill("second")
    page.get_by_role("button", name="Send").click()
    page.locator(".tokens").nth(3).wait_for(timeout=120_000)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".turn")).to_have_count(2)
    page.locator(".tokens").nth(3).wait_for(timeout=120_000)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert sum(page.locator(name).bounding_box()["height"] for name in ("header", "footer")) < 250
    assert page.get_by_label("Token colour").is_visible() and violations(page) == []
    assert page.problems == [] and page.title() == "Models side by side · jaxgpt"
    store = votes.Store(file)
    (vote,) = store.votes("ada")
    rows = store._rows("SELECT kind FROM votes ORDER BY number")
    assert [kind for (kind,) in rows] == ["favourite", "undo", "bad", "undo", "favourite"] and not vote.again
    task = store.task(vote.task)
    best = task.answers[vote.tiers[0][0]]
    assert task.prompt == f"first {HOSTILE}" and best.origin["model"] == str(models["ppo"]) and best.text in text


def test_rollouts_of_ppo_are_shown_token_by_token(browser, side_by_side):
    port, _ = side_by_side
    page = open_page(browser, f"http://127.0.0.1:{port}/")
    page.get_by_role("tab", name="PPO rollouts").click()
    token = page.locator(".rollout .tokens span").nth(1)
    assert token.inner_text() == HOSTILE
    token.hover()
    for name in ("advantage -1.000", "log π, nats", "log ρ, nats", "ratio after the update", "value", "return"):
        expect(page.locator("#figures")).to_contain_text(name)
    assert page.locator(".rollout .trace").count() == 3
    expect(page.locator("#legend")).to_contain_text("red: below 0")
    page.locator("#paint").select_option("ratio")
    expect(page.locator("#legend")).to_contain_text("blue: ≥ 1.2")
    assert violations(page) == [] and page.problems == []
    assert page.locator(".rollout img").count() == 0


# ---- a person as the reward ----


def test_a_person_is_the_reward_of_ppo_and_a_killed_loop_asks_for_no_rating_twice(
    browser, tiny_run, questions, tmp_path
):
    port, run = free_port(), tmp_path / "rated"
    flags = (
        "--model",
        str(tiny_run),
        "--run",
        str(run),
        "--prompts",
        str(questions),
        "--iterations",
        "2",
        "--batch",
        "4",
        "--ppo.new-tokens",
        "8",
    )
    with served("experiments.rate", *flags, port=port):
        page = open_page(browser, f"http://127.0.0.1:{port}/")
        expect(page.locator("#count")).to_have_text("0 of 4 in this round", timeout=120_000)
        assert violations(page) == []
        for n in range(2):
            page.keyboard.press(str(n + 1))
            expect(page.locator("#count")).to_have_text(f"{n + 1} of 4 in this round")
    with served("experiments.rate", *flags, port=port) as process:
        expect(page.locator("#count")).to_have_text("2 of 4 in this round", timeout=120_000)
        page.keyboard.press("5")
        expect(page.locator("#count")).to_have_text("3 of 4 in this round")
        page.get_by_role("button", name="4 stars: good").click()
        expect(page.locator("#about")).to_have_text("round 2 of 2", timeout=120_000)
        for n in range(4):
            expect(page.locator("#count")).to_have_text(f"{n} of 4 in this round", timeout=120_000)
            page.keyboard.press("3")
        expect(page.locator("#message")).to_have_text("The run is done. Thank you!", timeout=120_000)
        assert process.wait(timeout=120) == 0
        page.wait_for_timeout(1500)  # and it stays, though the server is gone
        expect(page.locator("#message")).to_have_text("The run is done. Thank you!")
        said = process.stdout.read().decode()
    assert "the loop waited" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[-1]["score"] <= 0 and all(line["seconds_waited"] > 0 for line in lines)
    assert json.loads((run / "done.json").read_text())["results"]["seconds_waited"] > 0


# ---- answers made in the background ----


def test_answers_are_made_ahead_and_a_reward_model_picks_what_it_is_least_sure_of(models, tmp_path, monkeypatch):
    words = [f"first number {n}" for n in range(60)]
    write_rows(tmp_path / "prompts.jsonl", ({"prompt": text} for text in words))
    settings = label.Settings(
        votes=tmp_path / "votes.sqlite",
        models=(models["sft"], models["ppo"]),
        prompts=str(tmp_path / "prompts.jsonl"),
        candidates=3,
        prefetch=40,
        new_tokens=6,
        retrain=20,
    )
    store = votes.Store(settings.votes)
    maker = label.AnswerGenerator(settings, store)
    worker = threading.Thread(target=maker.run, daemon=True)
    worker.start()
    while store.count_unvoted() < 40:
        assert worker.is_alive(), maker.state
        time.sleep(0.2)
    for task in store.tasks().values():
        assert 2 <= len(task.answers) <= 3 and task.doubt == 0
        assert {answer.origin["model"] for answer in task.answers} <= {str(models["sft"]), str(models["ppo"])}
        assert all({"checkpoint", "temperature", "seed"} <= answer.origin.keys() for answer in task.answers)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    for task in list(store.tasks().values()):
        rest = tuple(range(1, len(task.answers)))
        store.vote(votes.Vote(task.id, task.id, "ada", "favourite", ((0,), rest), (0, *rest)))
    deadline = time.monotonic() + 300
    while not any(task.doubt > 0 for task in store.tasks().values()):
        assert time.monotonic() < deadline and worker.is_alive(), maker.state
        time.sleep(0.5)
    maker.stop.set()
    worker.join(60)
    doubts = [task.doubt for task in store.tasks().values() if task.doubt > 0]
    assert all(0 < doubt <= 1 + 1e-6 for doubt in doubts)
    assert store.next_task("bob")[0].doubt == max(doubts)
