"""The guard in front of every page, through a real server and real sockets; and fifty annotators at once."""

import http.client
import itertools
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from experiments.label import reward_runs
from jaxgpt.data import votes
from jaxgpt.errors import UserError
from jaxgpt.web import label, server
from tests.data.test_votes import task_of, vote_of

STATIC = Path(server.__file__).parent / "static"


class Site:
    """A label page on a free port, in a thread."""

    def __init__(
        self, folder: Path, tasks: int = 5, token: str = "", host: str = "127.0.0.1", repeat: float = 0, **serve: Any
    ) -> None:
        self.store = votes.Store(folder / "votes.sqlite")
        for number in range(tasks):
            self.store.add_task(task_of(number))
        config = server.ServeConfig(host=host, port=0, token=token, **serve)
        self.bound = server.Server(config, token)
        self.host = f"127.0.0.1:{self.bound.port}"
        app = label.application(self.store, label.LabelConfig(overlap=0, repeat=repeat), config, token)
        self.thread = threading.Thread(target=self.bound.run, args=(app,), daemon=True)
        self.thread.start()

    def send(self, method: str, path: str, body: Any = None, timeout: float = 30, **headers: str | None) -> Any:
        """(status, headers, JSON or text) of a request as our page makes it, with `headers` changed (None: without)."""
        own = {"Host": self.host, "Origin": f"http://{self.host}", "Content-Type": "application/json"}
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.bound.port, timeout=timeout)
        connection.connect()
        # In one piece: if a body arrives after its headers were refused, the server resets the connection.
        wire = bytearray()
        connection.send = wire.extend
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in own.items():
            if value is not None:
                connection.putheader(name, value)
        if data is not None and "Content-Length" not in own:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        connection.sock.sendall(wire)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = "json" in (answer.getheader("content-type") or "")
        return answer.status, answer.headers, json.loads(content) if is_json else content.decode()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.bound.stop()


ME = {"annotator": "ada"}


def test_our_own_page_may(site):
    status, headers, page = site.send("GET", "/", Origin=None)
    assert status == 200 and "<title>" in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    status, headers, found = site.send("POST", "/api/next", ME)
    assert status == 200 and found["task"]["prompt"] == "prompt 0"
    assert "access-control-allow-origin" not in headers and "content-security-policy" in headers


def test_every_answer_carries_the_policy(site):
    policy = {
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    }
    others = {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    for method, path, body, changed in (
        ("GET", "/", None, {}),
        ("GET", "/label.js", None, {}),
        ("GET", "/none", None, {}),
        ("POST", "/api/next", ME, {}),
        ("POST", "/api/next", ME, {"Origin": "http://evil.example"}),
        ("POST", "/api/next", ME, {"Host": "evil.example"}),
        ("POST", "/api/next", b"x" * (server.MAX_BODY_BYTES + 1), {}),
    ):
        _, headers, _ = site.send(method, path, body, **changed)
        assert set(headers["content-security-policy"].split("; ")) == policy, (path, changed)
        assert {name: headers[name] for name in others} == others, (path, changed)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),  # DNS rebinding
        ({"Host": "127.0.0.1.evil.example"}, 400),
        ({"Host": "["}, 400),
        ({"Host": None}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),  # a sandboxed frame, a file
        ({"Origin": None}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another page of this machine
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Content_Type": "text/plain"}, 415),  # what a form can send without a preflight
        ({"Content_Type": None}, 415),
        ({"Content_Length": str(10**9)}, 413),
        ({"Content_Length": "x"}, 400),
    ],
)
def test_others_may_not(site, headers, status):
    before = site.store.count()
    assert site.send("POST", "/api/next", ME, **headers)[0] == status
    assert site.store.count() == before


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/static/label.html",
        "/label.py",
        "/%00",
        "/api/",
        "/api/../label.js/..",
        "/votes.sqlite",
        "/api/next/../../etc/passwd",
        "/shared.js%2f..%2f..%2fserver.py",
    ],
)
def test_no_path_reaches_the_file_system(site, path):
    for method in ("GET", "POST"):
        status, _, content = site.send(method, path, {} if method == "POST" else None)
        assert status in (403, 404, 405) and "root:" not in str(content), (method, path, status)


def test_only_pages_are_gotten_and_only_calls_change(site):
    assert site.send("GET", "/api/next")[0] == 405
    assert site.send("POST", "/", {})[0] == 405
    assert site.send("PUT", "/api/vote", {})[0] == 405
    assert site.send("OPTIONS", "/api/vote")[0] in (403, 405)  # no preflight is ever granted


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "isn't JSON"),
        (b"\xff", "isn't JSON"),
        (b"[" * 20_000, "isn't JSON"),
        (b'{"annotator": NaN}', "isn't JSON"),
        ([], "JSON object"),
        ({}, "field 'annotator' is missing"),
        ({"annotator": 3}, "wrong type"),
        ({"annotator": "  "}, "1 to 64"),
        ({"annotator": "x" * 65}, "1 to 64"),
        ({"annotator": "\ud800"}, "surrogate"),
        ({**ME, "id": "1"}, "is missing"),
        ({**ME, "id": "1", "task": "x", "kind": "tie", "tiers": [[0, 1]], "shown": [0, 1]}, "no task"),
        ({**ME, "id": "1", "task": "x", "kind": "tie", "tiers": [0], "shown": [0, 1]}, "lists"),
        ({**ME, "id": "1", "task": "x", "kind": "tie", "tiers": [[0, True]], "shown": [0, 1]}, "whole numbers"),
        ({**ME, "id": "1", "task": "x", "kind": "tie", "tiers": [[]], "shown": [0, 1]}, "exactly once"),
    ],
)
def test_what_is_wrong_with_a_vote_is_said(site, body, says):
    status, _, found = site.send("POST", "/api/vote", body)
    assert status == 400 and says in found["error"], found
    assert site.store.count() == 0


def test_a_body_is_small_however_it_is_sent(site):
    assert site.send("POST", "/api/next", b"x" * (server.MAX_BODY_BYTES + 1))[0] == 413
    with socket.create_connection(("127.0.0.1", site.bound.port), timeout=20) as raw:  # chunked: no length is declared
        raw.sendall(
            f"POST /api/next HTTP/1.1\r\nHost: {site.host}\r\nOrigin: http://{site.host}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        answer = b""
        for _ in range(20):
            try:
                raw.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
            except OSError:
                break
        answer = raw.recv(200)
    assert b" 413 " in answer


def test_slow_clients_stall_nobody(site, monkeypatch):
    """Two hundred connections that send a little and wait, some in their headers and some in their body."""
    slow = []
    for n in range(200):
        raw = socket.create_connection(("127.0.0.1", site.bound.port))
        raw.sendall(b"POST /api/next HTTP/1.1\r\nHost: " + site.host.encode())
        if n % 2:
            raw.sendall(
                f"\r\nOrigin: http://{site.host}\r\nContent-Type: application/json\r\n"
                "Content-Length: 20\r\n\r\n{".encode()
            )
        slow.append(raw)
    for _ in range(10):
        assert site.send("POST", "/api/next", ME, timeout=5)[0] == 200
    for raw in slow:
        raw.close()


def test_slow_clients_are_sent_away(site, monkeypatch):
    monkeypatch.setattr(server, "BODY_TIMEOUT", 0.2)
    silent, half = (socket.create_connection(("127.0.0.1", site.bound.port)) for _ in range(2))
    half.sendall(
        f"POST /api/next HTTP/1.1\r\nHost: {site.host}\r\nOrigin: http://{site.host}\r\n"
        "Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{".encode()
    )
    for raw in (half, silent):
        raw.settimeout(60)
    assert b" 408 " in half.recv(1000)
    assert silent.recv(1000) == b""  # closed


def test_one_address_may_call_only_so_often(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "BURST", 20.0)
    monkeypatch.setattr(server, "CALLS_PER_SECOND", 0.001)
    crowded = Site(tmp_path)
    found = [crowded.send("POST", "/api/next", ME)[0] for _ in range(25)]
    assert found == [200] * 20 + [429] * 5
    crowded.bound.stop()


def test_one_address_does_not_use_up_the_calls_of_another(monkeypatch):
    monkeypatch.setattr(server, "BURST", 2.0)
    guard = server.Guard(None, frozenset({"here"}), "")
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"here")]}
    for address in ("10.0.0.1", "10.0.0.2"):
        for _ in range(2):
            guard._check({**scope, "client": (address, 1)})
        with pytest.raises(server.RequestRefused, match="too many calls"):
            guard._check({**scope, "client": (address, 2)})


def test_elsewhere_than_here_a_token_is_demanded(tmp_path):
    assert server.ServeConfig().required_token() == "" and len(server.ServeConfig(host="0.0.0.0").required_token()) > 30
    assert server.ServeConfig(host="0.0.0.0").required_token() != server.ServeConfig(host="0.0.0.0").required_token()
    open_site = Site(tmp_path, token="secret-word", host="0.0.0.0", names=("lab.local",))
    send = open_site.send
    assert open_site.bound.address.endswith("/#token=secret-word")
    assert send("GET", "/")[0] == 200  # the page itself holds nothing
    assert send("POST", "/api/next", ME)[0] == 401
    assert send("POST", "/api/next", ME, Authorization="Bearer wrong")[0] == 401
    assert send("POST", "/api/next", ME, Authorization="Bearer \xe9")[0] == 401
    assert send("POST", "/api/next", ME, Authorization="Bearer secret-word")[0] == 200
    there = {"Host": "lab.local:80", "Origin": "http://lab.local:80", "Authorization": "Bearer secret-word"}
    assert send("POST", "/api/next", ME, **there)[0] == 200
    assert send("POST", "/api/next", ME, **(there | {"Host": "other.local"}))[0] == 400
    open_site.bound.stop()


def test_a_server_s_thread_makes_no_loggers(monkeypatch):
    """Code that iterates over all loggers meanwhile, as pytest does, would fail."""
    monkeypatch.setattr(logging.root.manager, "loggerDict", {})
    bound = server.Server(server.ServeConfig(port=0), "")
    before = set(logging.root.manager.loggerDict)
    bound.stop()
    bound.run(server.application("label", {}, server.ServeConfig(), ""))
    assert set(logging.root.manager.loggerDict) == before


def test_the_reward_models_of_two_databases_in_one_folder_are_told_apart(tmp_path):
    for name in ("a-reward-3", "a-reward-20", "b-reward-7", "a-reward-b-reward-9", "a-reward-x", "reward-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").touch()
    (tmp_path / "a-reward-40").mkdir()  # never finished
    found = {count: run.name for count, run in reward_runs(tmp_path / "a.sqlite").items()}
    assert found == {3: "a-reward-3", 20: "a-reward-20"}
    assert set(reward_runs(tmp_path / "b.sqlite")) == {7} and reward_runs(tmp_path / "c.sqlite") == {}


def test_a_port_in_use_is_named(site):
    with pytest.raises(UserError, match=f"can't serve on 127.0.0.1:{site.bound.port}.*--serve.port"):
        server.Server(server.ServeConfig(port=site.bound.port), "")


def test_answers_come_blind_shuffled_and_alike_for_the_same_person(tmp_path):
    blind = Site(tmp_path, tasks=1)
    task = votes.Task("p", tuple(votes.Answer(str(i), origin={"model": "runs/secret"}) for i in range(9)))
    for store in (blind.store,):
        store.add_task(task)
    orders = {}
    for who in ("ada", "bob", "eve", "ada"):
        blind.store._leases.clear()
        blind.store.vote(votes.Vote(f"{who}0", task_of(0).id, who, "skip", ((0, 1, 2),), (0, 1, 2)))
        found = blind.send("POST", "/api/next", {"annotator": who})[2]["task"]
        assert "secret" not in json.dumps(found)
        order = tuple(answer["index"] for answer in found["answers"])
        assert orders.setdefault(who, order) == order and sorted(order) == list(range(9))
    assert len(set(orders.values())) == 3
    blind.bound.stop()


def test_a_written_answer_joins_at_a_random_place_and_moves_no_other(tmp_path):
    site = Site(tmp_path, tasks=2, repeat=1.0)
    site.store.add_task(votes.Task("p", tuple(votes.Answer(str(i)) for i in range(4)), doubt=1.0))
    places = []
    for n in range(12):
        who = f"annotator {n}"
        site.store._leases.clear()
        found = site.send("POST", "/api/next", {"annotator": who})[2]["task"]
        before = [answer["index"] for answer in found["answers"]]
        data = {"annotator": who, "task": found["id"], "id": who, "text": f"by {who}"}
        found = site.send("POST", "/api/answer", data)[2]["task"]
        after = [answer["index"] for answer in found["answers"]]
        assert [index for index in after if index != 4 + n] == before
        places.append(after.index(4 + n))
    assert len(set(places)) > 4
    site.bound.stop()


def test_a_written_answer_moves_no_other_when_asked_again_and_the_vote_holds_the_order(tmp_path):
    site = Site(tmp_path, tasks=3, repeat=1.0)
    shown = []
    for n in range(3):  # the third is one of the first two
        task = site.send("POST", "/api/next", ME)[2]["task"]
        order = [answer["index"] for answer in task["answers"]]
        if n == 2:
            data = {**ME, "task": task["id"], "id": "own", "text": "own"}
            more = [answer["index"] for answer in site.send("POST", "/api/answer", data)[2]["task"]["answers"]]
            assert [index for index in more if index != 3] == order
            order = more
        vote = {**ME, "id": str(n), "task": task["id"], "kind": "favourite", "tiers": [order[:1], order[1:]]}
        assert site.send("POST", "/api/vote", {**vote, "shown": order})[0] == 200
        shown.append(tuple(order))
    assert [vote.shown for vote in site.store.votes()] == shown and site.store.votes()[2].again
    site.bound.stop()


def test_every_order_of_answers_is_as_likely():
    orders = [tuple(label.insertion_shuffle(3, str(seed))) for seed in range(6000)]
    assert all(abs(orders.count(order) - 1000) < 150 for order in itertools.permutations(range(3)))


def test_the_page_counts_progress_speed_and_agreement(tmp_path):
    store = votes.Store(tmp_path / "votes.sqlite")
    for number in range(4):
        store.add_task(task_of(number))
    for number, seconds in enumerate((1.0, 3.0, 100.0)):
        store.vote(vote_of(task_of(number), seconds=seconds))
    store.vote(vote_of(task_of(0), annotator="bob", seconds=9.0))
    found = label.LabelStatistics(store, every=0).of("ada")
    assert [found[name] for name in ("mine", "all", "waiting", "seconds", "with_myself")] == [3, 4, 1, 3.0, None]
    assert (found["with_others"]["pairs"], found["with_others"]["same"]) == (1, 1)
    store.vote(vote_of(task_of(1), best=2, id_="again"))
    assert label.LabelStatistics(store, every=0).of("ada")["with_myself"]["same"] == 0
    assert [label.LabelStatistics(store, overlap=1).of(who)["waiting"] for who in ("ada", "bob", "eve")] == [1, 3, 4]


def test_scripts_make_no_html_and_load_nothing_from_elsewhere():
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", text), path
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|<style|\sstyle=", text), path


def test_fifty_annotators_at_once_lose_and_double_nothing(tmp_path):
    crowd = Site(tmp_path, tasks=80)
    sent: list[str] = []
    waits: list[float] = []

    def annotate(n: int) -> None:
        who = f"annotator {n}"
        found = crowd.send("POST", "/api/next", {"annotator": who})[2]
        while found["task"]:
            task = found["task"]
            shown = [answer["index"] for answer in task["answers"]]
            vote = {
                "id": f"{n}-{task['id']}",
                "task": task["id"],
                "annotator": who,
                "kind": "favourite",
                "tiers": [[shown[0]], shown[1:]],
                "shown": shown,
                "seconds": 1.0,
            }
            for _ in range(2):  # every vote is sent twice, as after a broken connection
                started = time.monotonic()
                while (answer := crowd.send("POST", "/api/vote", vote))[0] == 429:
                    time.sleep(0.1)
                assert answer[0] == 200, answer[2]
                waits.append(time.monotonic() - started)
            sent.append(vote["id"])
            found = answer[2]

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(annotate, range(50)))
    kept = [vote.id for vote in crowd.store.votes()]
    assert sorted(kept) == sorted(sent) and len(set(kept)) == len(kept)
    assert {vote.task for vote in crowd.store.votes()} == set(crowd.store.tasks())
    crowd.bound.stop()
