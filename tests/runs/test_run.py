"""The run folder: who may use it, what it records, and what a second start does."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import types
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxgpt.config import ModelConfig
from jaxgpt.data import formats
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root, write_json
from jaxgpt.runs import process, progress
from jaxgpt.runs import run as run_module
from jaxgpt.runs.run import Run, print_device, run_fingerprint
from jaxgpt.runs.saved_model import save_model
from jaxgpt.runs.verify import verify
from tests.data.test_votes_file import as_nobody

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Settings:
    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("pretrained",)
    run: Path = Path("runs/toy")
    pretrained: Path = Path("runs/pretrain")
    model: ModelConfig = ModelConfig()
    lr: float = 0.1
    fresh: bool = False


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.delenv("JAXGPT_WANDB", raising=False)


def finish(folder: Path, settings: Settings | None = None, stage: str = "sft", results=None, **more) -> Run:
    with Run(folder, settings or Settings(), stage, **more) as run:
        if not run.finished:
            run.finish(results or {"loss": 1.5})
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_is_not_repeated(tmp_path):
    folder = tmp_path / "deep" / "sft"
    first = finish(folder, results={"loss": jnp.float32(0.5), "curve": np.arange(3), "bad": float("nan"), "at": folder})
    before = files(folder)
    with Run(folder, Settings(), "sft") as run:
        assert run.finished
        assert run.results == first.results == {"loss": 0.5, "curve": [0, 1, 2], "bad": None, "at": str(folder)}
    assert files(folder) == before


def test_settings_are_on_record(tmp_path):
    finish(tmp_path, Settings(lr=0.25), inputs={"pretrain": "abc"})
    record = json.loads((tmp_path / "settings.json").read_text())
    assert record["stage"] == "sft" and record["inputs"] == {"pretrain": "abc"}
    assert record["settings"]["lr"] == 0.25 and record["settings"]["model"]["width"] == 128
    assert record["versions"]["jax"] == jax.__version__
    assert "fresh" not in record["settings"]  # a replay is not to replace the run


def test_an_unfinished_run_starts_again_and_keeps_foreign_files(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path, Settings(), "sft") as run:
        run.log(1, {"loss": 1.0})
        run.say("hello")
        (tmp_path / "model").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        _ = 1 / 0
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text()
    with Run(tmp_path, Settings(), "sft") as run:
        assert not run.finished and run.results == {}
        assert lines(tmp_path) == [] and not (tmp_path / "model").exists()
        assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"settings": Settings(lr=0.2)},
            r"a finished run with other settings \(lr: 0.1 before, 0.2 now\); restore them to read its results, choose "
            "another --run, or pass --fresh, which deletes it",
        ),
        ({"settings": Settings(model=ModelConfig(layers=3))}, r"\(model.layers: 4 before, 3 now\)"),
        ({"inputs": {"pretrain": "b"}}, r"\(made from another pretrain\)"),
        ({"inputs": {}}, r"\(made from another pretrain\)"),
        ({"stage": "ppo"}, r"holds a run of 'sft', not 'ppo'; choose another --run"),
        ({"stage": "ppo", "fresh": True}, r"holds a run of 'sft', not 'ppo'; choose another --run"),
    ],
)
def test_another_run_is_refused_and_untouched(tmp_path, change, message):
    finish(tmp_path, inputs={"pretrain": "a"})
    before = files(tmp_path)
    with pytest.raises(UserError, match=message):
        finish(tmp_path, **({"inputs": {"pretrain": "a"}} | change))
    assert files(tmp_path) == before


def test_fresh_replaces_a_run(tmp_path):
    finish(tmp_path, results={"loss": 1})
    run = finish(tmp_path, Settings(lr=0.2, fresh=True), results={"loss": 2}, fresh=True)
    assert run.results == {"loss": 2}
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["lr"] == 0.2


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UserError, match="is not empty and is not a run folder"):
            finish(tmp_path, fresh=fresh)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}
    with pytest.raises(UserError, match="is a file"):
        finish(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="can't write to the run folder"):
        finish(tmp_path / "thesis.tex" / "below")
    (tmp_path / "settings.json").write_text('{"editor": "vim"}')
    with pytest.raises(UserError, match="was not written by jaxgpt"):
        finish(tmp_path)


def test_two_processes_do_not_share_a_folder(tmp_path):
    with Run(tmp_path, Settings(), "sft") as run:
        run.log(1, {"loss": 1.0})
        with pytest.raises(UserError, match="in use by another process"):
            finish(tmp_path)
        assert len(lines(tmp_path)) == 1
        run.finish({})
    assert finish(tmp_path).finished


def test_the_fingerprint_follows_what_decides_the_result(tmp_path):
    def fingerprint(settings=None, stage="sft", inputs=None):
        return Run(tmp_path, settings or Settings(), stage, inputs).fingerprint

    same = [Settings(), Settings(run=Path("elsewhere")), Settings(pretrained=Path("elsewhere")), Settings(fresh=True)]
    assert len({fingerprint(settings) for settings in same}) == 1
    others = [
        fingerprint(),
        fingerprint(Settings(lr=0.2)),
        fingerprint(Settings(model=ModelConfig(layers=3))),
        fingerprint(stage="ppo"),
        fingerprint(inputs={"pretrain": "a"}),
        fingerprint(inputs={"pretrain": "b"}),
    ]
    assert len(set(others)) == len(others)
    assert (
        finish(tmp_path).fingerprint == run_fingerprint(tmp_path, "sft") == run_fingerprint(tmp_path) == fingerprint()
    )


def test_a_later_stage_needs_a_finished_run(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist .*; first run the experiment") as failed:
        run_fingerprint(tmp_path / "none", "sft")
    assert failed.value.experiment == ("sft", "--run", str(tmp_path / "none"))
    with Run(tmp_path / "half", Settings(), "sft"):
        pass
    with pytest.raises(UserError, match="half is not finished; first run the experiment"):
        run_fingerprint(tmp_path / "half", "sft")
    finish(tmp_path / "done")
    with pytest.raises(UserError, match="is a run of 'sft', but one of 'pretrain' is needed"):
        run_fingerprint(tmp_path / "done", "pretrain")
    (tmp_path / "done" / "done.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        run_fingerprint(tmp_path / "done", "sft")


def test_what_a_finished_run_wrote_is_compared_before_it_is_used(tmp_path):
    rows, metrics = tmp_path / "train.jsonl", tmp_path / "metrics.jsonl"
    with Run(tmp_path, Settings(), "sft") as run:
        rows.write_text('{"prompt": "a", "answers": ["b", "c"], "choice": 0}\n')
        run.log(1, {"loss": 2.0})
        run.finish({})
    whole, other = rows.read_text(), rows.read_text().replace("0", "1")
    formats.fingerprint(rows), run_fingerprint(tmp_path, "sft")
    rows.write_text(other)
    for use in (lambda: formats.fingerprint(rows), lambda: run_fingerprint(tmp_path, "sft")):
        with pytest.raises(UserError, match=r"train.jsonl is not what its run wrote"):
            use()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/train.jsonl").write_text(other)
    formats.fingerprint(tmp_path / "copy/train.jsonl")  # a change that is meant
    rows.write_text(whole)
    metrics.write_text(metrics.read_text().replace("2", "3"))
    run_fingerprint(tmp_path, "sft")  # no later stage reads metrics, but `verify` does
    (_, problem), *_ = verify(tmp_path)
    assert "metrics.jsonl is not what its run wrote" in problem


def test_a_damaged_settings_file_ends_no_run_that_another_record_knows(tmp_path):
    finish(tmp_path, results={"loss": 0.5})
    path = tmp_path / "settings.json"
    path.write_text(path.read_text().replace("0.1", "0.2"))
    assert finish(tmp_path).results == {"loss": 0.5}
    with pytest.raises(UserError, match="settings.json is damaged or was edited"):
        finish(tmp_path, dataclasses.replace(Settings(), lr=0.2))


def test_records_of_version_0_1_0_are_read(tmp_path):
    finish(tmp_path, results={"loss": 0.5})
    for name, added in (("settings.json", ["sha256"]), ("done.json", ["sha256", "files"])):
        record = json.loads((tmp_path / name).read_text())
        write_json(tmp_path / name, {key: value for key, value in record.items() if key not in added})
    assert finish(tmp_path).results == {"loss": 0.5} and run_fingerprint(tmp_path, "sft")


def test_a_run_that_finishes_while_another_one_starts_is_not_replaced(tmp_path, monkeypatch):
    """The second start looked into the folder before the first had finished, and locks it after."""
    with Run(tmp_path, Settings(), "sft") as first:
        first.log(1, {"loss": 1.0})
        second = Run(tmp_path, Settings(), "sft")
        take = second._folder_claim.take

        def finish_first() -> None:
            first.finish({"loss": 1.0})
            first._files.close()
            take()

        monkeypatch.setattr(second._folder_claim, "take", finish_first)
        with second:
            assert second.finished and second.results == {"loss": 1.0}


@pytest.mark.parametrize("name", ["lr[0.1]", "a*", "what?", "back\\slash", "line\nbreak", "\udcff"])
def test_a_path_that_models_cannot_be_stored_under_is_refused_before_work(tmp_path, name):
    for use in (lambda: finish(tmp_path / name / "x"), lambda: save_model(tmp_path / name, {}, ModelConfig())):
        with pytest.raises(UserError, match="models and checkpoints can't be stored under"):
            use()
    assert not list(tmp_path.iterdir())


def test_metrics_are_lines_of_json(tmp_path):
    with Run(tmp_path, Settings(), "sft") as run:
        run.log(np.int64(0), {"loss": jnp.float32(2.5), "kl": float("nan")})
        assert len(lines(tmp_path)) == 1  # flushed at once
        run.log(3, {"loss": float("-inf"), "kl": 1})
        run.finish({})
    first, second = lines(tmp_path)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 0, "loss": 2.5, "kl": None, "nonfinite": ["kl"]}
    assert second == {"step": 3, "loss": None, "kl": 1.0, "nonfinite": ["loss"]}
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes() and b"kl" in events.read_bytes()


def test_milestones_are_printed_and_kept(tmp_path, capsys):
    with Run(tmp_path, Settings(), "sft") as run:
        run.say("sample: [bold]not markup[/bold] :smile: " + "long " * 40)
        run.finish({})
    out = capsys.readouterr().out
    assert out == "sample: [bold]not markup[/bold] :smile: " + "long " * 40 + "\n"
    assert (tmp_path / "log.txt").read_text().endswith(out)


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Run(tmp_path, Settings(), "sft").progress(40, "sft") as bar:
        for step in range(40):
            clock[0] += 60.0 if step == 0 else 1.0  # the first update compiles
            bar.update(tokens=2000, **({"loss": jnp.float32(step)} if step % 10 == 0 else {}))
    assert capsys.readouterr().out.splitlines() == [
        "sft 1/40 (2%)  loss 0",
        "sft 11/40 (27%)  0:29 left · 2k tokens/s · loss 10",
        "sft 21/40 (52%)  0:19 left · 2k tokens/s · loss 20",
        "sft 31/40 (77%)  0:09 left · 2k tokens/s · loss 30",
        "sft 40/40 (100%)  in 1:39 · 2k tokens/s · loss 30",
    ]


def test_progress_on_a_terminal_fits_its_width(tmp_path):
    for width in (60, 100):
        with open(tmp_path / "screen", "w+") as screen:
            console = Console(file=screen, force_terminal=True, width=width, color_system=None)
            with progress.progress_bar(console, 800, "pretrain") as bar:
                for _ in range(3):
                    bar.update(100, tokens=100_000, loss=3.21, grad_norm=1.5, learning_rate=1e-3, entropy=4.5)
            screen.seek(0)
            drawn = re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", screen.read())
        visible = [text.rstrip() for text in drawn if text.strip()][-1]
        assert visible.startswith("pretrain") and "300/800 in 0:0" in visible
        assert len(visible) <= width


def test_wandb_is_used_when_asked_for(tmp_path, monkeypatch):
    logged: list = []
    session = types.SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: logged.append("finish")
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: logged.append(options["project"]) or session
    monkeypatch.setenv("JAXGPT_WANDB", "my-project")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Run(tmp_path / "a", Settings(), "sft") as run:
        run.log(1, {"loss": 2.0, "kl": float("nan")})
        run.finish({})
    assert logged == ["my-project", (1, {"loss": 2.0}), "finish"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(UserError, match=r"pip install 'jaxgpt\[wandb\]'"):
        finish(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_device_and_cache(monkeypatch, capsys, tmp_path):
    print_device()
    line = capsys.readouterr().out
    assert line.startswith("device: ") and line.endswith(f"jax {jax.__version__}\n") and line.count("\n") == 1
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("JAXGPT_CACHE")
    assert cache_root() == Path.home() / ".cache" / "jaxgpt"
    monkeypatch.setenv("JAXGPT_MALLOC", "0")
    assert process.configure_malloc() is False


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = inherited | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_prepared_process_keeps_compiled_programs(tmp_path):
    code = """
        from jaxgpt.runs.process import prepare_process
        prepare_process()
        import jax
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        hits = []
        jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
        program = jax.jit(lambda x: (x @ x).sum())
        for _ in range(2):
            print(float(program(jax.numpy.ones((64, 64)))), any(hits))
            jax.clear_caches()
    """
    child = python(code, JAXGPT_CACHE=str(tmp_path))
    assert child.communicate() == ("262144.0 False\n262144.0 True\n", "") and child.returncode == 0
    assert list((tmp_path / "xla").iterdir())


def test_a_killed_run_starts_again(tmp_path):
    code = f"""
        import dataclasses, time
        from pathlib import Path
        from jaxgpt.runs.run import Run
        @dataclasses.dataclass(frozen=True)
        class Settings:
            lr: float = 0.1
        with Run(Path({str(tmp_path)!r}), Settings(), "sft") as run:
            run.log(1, {{"loss": 1.0}})
            print("logged", flush=True)
            time.sleep(60)
    """
    child = python(code)
    assert child.stdout is not None and child.stdout.readline() == "logged\n"

    @dataclasses.dataclass(frozen=True)
    class Same:
        lr: float = 0.1

    with pytest.raises(UserError, match="in use"):
        Run(tmp_path, Same(), "sft").__enter__()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with Run(tmp_path, Same(), "sft") as run:
        assert not run.finished and lines(tmp_path) == []


@pytest.mark.slow
def test_several_processes_agree(tmp_path):
    code = """
        import dataclasses, os, sys
        from pathlib import Path
        import jax
        jax.distributed.initialize("localhost:" + os.environ["PORT"], 2, int(os.environ["RANK"]))
        import jax.numpy as jnp
        from jaxgpt.runs.saved_model import save_model
        from jaxgpt.config import ModelConfig
        from jaxgpt.errors import UserError
        from jaxgpt.runs.run import Run
        @dataclasses.dataclass(frozen=True)
        class Settings:
            lr: float = 0.1
        folder = Path(os.environ["FOLDER"])
        for _ in range(2):
            with Run(folder, Settings(), "sft") as run:
                print(run.finished, run.results, flush=True)
                if not run.finished:
                    run.log(1, {"loss": 1.0})
                    run.say("once")
                    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
                    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
                    w = jax.make_array_from_callback((4,), sharding, lambda i: jnp.arange(4.0)[i])
                    save_model(folder / "model", {"w": w}, ModelConfig())
                    run.finish({"loss": 1.0})
        try:
            Run(folder, Settings(0.2), "sft").__enter__()
        except UserError as error:
            print(str(error)[-60:])
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    children = [python(code, RANK=str(rank), PORT=port, FOLDER=str(tmp_path / "run")) for rank in range(2)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    first, second = ([line for line in out.splitlines() if "Gloo" not in line] for out, _ in outputs)
    said = ["once", f"sft: already done in {tmp_path / 'run'}"]  # by the first process alone
    assert [line for line in first if line in said] == said and [line for line in first if line not in said] == second
    assert second[1] == "True {'loss': 1.0}" and "--fresh" in second[2]
    assert len(lines(tmp_path / "run")) == 1
    from jaxgpt.runs.saved_model import load_model

    np.testing.assert_array_equal(load_model(tmp_path / "run").params["w"], np.arange(4.0))


def test_a_run_that_measured_nothing_gives_way_to_other_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mistyped"), Run(tmp_path / "run", Settings(), "toy"):
        raise UserError("a mistyped path, found before the first step")
    with Run(tmp_path / "run", Settings(lr=0.2), "toy") as run:
        run.log(1, {"loss": 1.0})
    with pytest.raises(UserError, match="other settings"), Run(tmp_path / "run", Settings(), "toy"):
        pass


def test_a_run_whose_folder_is_gone_does_not_write_into_a_new_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "gone" / "done.json", {})
    assert not (tmp_path / "gone").exists()


def test_a_start_over_that_is_killed_at_any_moment_can_be_repeated(tmp_path, monkeypatch):
    """settings.json, by which the folder is known, is never missing; nothing left is taken for the new run's."""

    class Killed(BaseException):
        pass

    finish(tmp_path / "old", results={"loss": 1})
    for name in ("model", "checkpoints/9", ".model.old", ".critic.new"):
        (tmp_path / "old" / name).mkdir(parents=True)
    other = Settings(lr=0.2)
    for moment in range(99):
        folder = tmp_path / str(moment)
        subprocess.run(["cp", "-r", tmp_path / "old", folder], check=True)
        calls = iter(range(moment))

        def killed(path: Path, remove=run_module.remove, calls=calls) -> None:
            if os.path.lexists(path) and next(calls, None) is None:
                raise Killed
            remove(path)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(run_module, "remove", killed)
            finish(folder, other, fresh=True, results={"loss": 2})
            break
        (folder / ".settings.json.abcdefgh").write_text("{")  # what a kill while it is written leaves
        assert finish(folder, other, fresh=True, results={"loss": 3}).results == {"loss": 3}
    assert moment > 5
    assert not {".model.old", ".critic.new", "model", "checkpoints"} & set(os.listdir(folder))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".settings.json.abcdefgh").write_text("{")
    finish(tmp_path / "new")


def test_fresh_replaces_a_run_whose_settings_file_is_damaged_or_lost(tmp_path):
    path = tmp_path / "settings.json"
    for spoil in (lambda: path.write_text("{"), path.unlink):
        finish(tmp_path, Settings(lr=0.3), fresh=True)
        spoil()
        with pytest.raises(UserError, match=r"not valid JSON|is not a run folder"):
            finish(tmp_path)
        with pytest.raises(UserError, match=r"not valid JSON|is not a run folder"):
            finish(tmp_path, stage="ppo", fresh=True)  # done.json says that it is a run of another stage
        assert finish(tmp_path, fresh=True, results={"loss": 2}).results == {"loss": 2}
        path.unlink()
        assert finish(tmp_path).results == {"loss": 2}  # done.json says whose it is


def test_nothing_is_written_into_a_run_that_took_the_place_of_this_one(tmp_path):
    """Neither a model nor rows: they would replace the other's."""
    place = tmp_path / "run"
    params = {"w": np.arange(3.0)}
    finish(tmp_path / "other", Settings(lr=0.2))
    with pytest.raises(UserError, match="was moved, deleted or taken over"), Run(place, Settings(), "sft") as run:
        place.rename(tmp_path / "moved")
        for write in (lambda: save_model(place / "model", params, ModelConfig()), lambda: run.finish({})):
            with pytest.raises(UserError, match="was moved, deleted or taken over"):
                write()
            assert not place.exists()
        (tmp_path / "other").rename(place)
        before = files(place)
        with pytest.raises(UserError, match="was moved, deleted or taken over"):
            write_json(place / "train.jsonl", {})
        save_model(place / "model", params, ModelConfig())
    assert files(place) == before
    save_model(place / "model", params, ModelConfig())  # now that no run of this process works there


def test_metrics_that_another_process_wrote_are_not_vouched_for(tmp_path):
    with Run(tmp_path, Settings(), "sft") as run:
        run.log(1, {"loss": 2.0})
        with (tmp_path / "metrics.jsonl").open("a") as other:
            other.write('{"step": 1, "time": 1.0, "loss": 3.0}\n')
        run.log(2, {"loss": 1.0})
        run.finish({})
    run_fingerprint(tmp_path, "sft")
    (_, problem), *_ = verify(tmp_path)
    assert "metrics.jsonl is not what its run wrote" in problem


def test_a_full_disk_at_the_end_is_one_line(tmp_path, monkeypatch):
    with Run(tmp_path, Settings(), "sft") as run:
        monkeypatch.setattr(run_module, "write_record", full_disk)
        with pytest.raises(UserError, match=r"can't write to .* \(No space left on device\); free some space"):
            run.finish({})
    assert not (tmp_path / "done.json").exists()


def full_disk(*words: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_finished_run_whose_record_is_a_link_to_nothing_is_not_repeated(tmp_path):
    """As in a checkout whose large files were not fetched."""
    finish(tmp_path)
    (tmp_path / "done.json").unlink()
    (tmp_path / "done.json").symlink_to("annex/objects/done.json")
    with pytest.raises(UserError, match="done.json does not exist"):
        finish(tmp_path)


def test_verify_tells_what_it_could_not_read_and_lets_a_finished_runs_checkpoints_be(tmp_path, monkeypatch):
    finish(tmp_path / "run")
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)  # killed while it removed them
    assert [problem for _, problem in verify(tmp_path)] == [""]
    walk = os.walk

    def closed(root, onerror):
        onerror(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "other")))
        return walk(root)

    monkeypatch.setattr(os, "walk", closed)
    assert dict(verify(tmp_path))[tmp_path / "other"] == "it can't be read (Permission denied)"


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("named", ["sft", "sft/model", "link"])
def test_a_run_never_starts_over_in_the_folder_that_it_starts_from(tmp_path, named, fresh):
    """It would remove its model before it reads it."""
    folder = tmp_path / "sft"
    with Run(folder, Settings(), "sft") as run:
        save_model(folder / "model", {"w": jnp.ones(2)}, ModelConfig())
        run.finish({})
    (tmp_path / "link").symlink_to(folder)
    before = files(folder)
    settings = Settings(pretrained=tmp_path / named, fresh=fresh)
    with pytest.raises(UserError, match=r"pretrained .* lies in the run's own folder .*; choose another --run"):
        finish(folder, settings, inputs={"pretrained": run_fingerprint(folder)})
    assert files(folder) == before


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_checkpoints_that_cant_be_read_are_not_taken_for_none(mode):
    """With none, the advice would be to delete the run and start again."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        with as_nobody():
            with Run(Path(folder), Settings(), "sft") as run:
                run.log(1, {"loss": 2.0})
            step = Path(folder) / "checkpoints/1"
            step.mkdir(parents=True)
            (step / "checkpoint.json").touch()
            step.parent.chmod(mode)
            try:
                with pytest.raises(PermissionError, match="checkpoints"):
                    finish(Path(folder), Settings(lr=0.2))
            finally:
                step.parent.chmod(0o755)
        assert (step / "checkpoint.json").exists()


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_what_a_link_in_the_folder_points_to_is_left_as_it_is(tmp_path, name, link):
    """Such as a backup made with `cp -al`, or a file that a stranger's folder points to."""
    folder, other = tmp_path / "run", tmp_path / "other"
    with Run(folder, Settings(), "sft") as run:
        run.log(1, {"loss": 2.0})
        (folder / "checkpoints/1").mkdir(parents=True)
        (folder / "checkpoints/1/checkpoint.json").touch()
        position = run.position()
    (folder / name).rename(other)
    link(other, folder / name)
    before = other.read_bytes()
    with Run(folder, Settings(), "sft") as run:
        run.rewind(position)
        run.log(2, {"loss": 1.0})
        run.say("resumed")
        assert [line["step"] for line in lines(folder)] == [1, 2]
        run.finish({})
    assert other.read_bytes() == before and (folder / name).read_bytes().startswith(before)


def test_a_file_in_place_of_the_curves_folder_is_named(tmp_path):
    with Run(tmp_path, Settings(), "sft"):
        (tmp_path / "checkpoints/1").mkdir(parents=True)
        (tmp_path / "checkpoints/1/checkpoint.json").touch()
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match="tensorboard is not a folder; remove it"), Run(tmp_path, Settings(), "sft"):
        pass
    assert (tmp_path / "tensorboard").read_text() == "mine"
    (tmp_path / "tensorboard").unlink()
    with Run(tmp_path, Settings(), "sft") as run:
        run.log(1, {"loss": 2.0})


@pytest.mark.parametrize("name", ["settings.json", "done.json", "checkpoints/3/checkpoint.json"])
def test_a_pipe_in_the_folder_keeps_nobody_waiting(tmp_path, name):
    with Run(tmp_path, Settings(), "sft") as run:
        run.log(1, {"loss": 2.0})
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name.startswith("checkpoints"):
        (tmp_path / "settings.json").write_text("damaged")
    with pytest.raises(UserError, match=name if not name.startswith("checkpoints") else "settings.json"):
        finish(tmp_path)
