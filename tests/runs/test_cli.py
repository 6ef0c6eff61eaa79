"""The command line: where values come from, and what an error prints."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

import jaxgpt.runs.cli
from jaxgpt.config import ModelConfig, Range, check_settings
from jaxgpt.errors import UserError
from jaxgpt.files import read_json, write_json, write_text
from jaxgpt.runs.cli import cli, parse, settings_from_json, settings_to_json


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train something. Command: python experiments/toy.py."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ()
    run: Path = Path("runs/toy")  # the run folder
    model: ModelConfig = ModelConfig()
    learning_rate: float = 1
    kind: Literal["bpe", "char"] = "bpe"
    sources: tuple[str, ...] = ("a", "b")
    seed: int | None = None
    fast: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate > 10:
            raise UserError(f"learning_rate is {self.learning_rate}; choose at most 10")


PRESETS = {"small": Settings(learning_rate=0.5), "large": Settings(model=ModelConfig(layers=12), fast=True)}
OTHER = Settings(Path("x y"), ModelConfig(width=8, heads=2), 0.25, "char", (), 3, True)


def ask(*argv: Any) -> Settings:
    return parse(Settings, PRESETS, [str(word) for word in argv])


def test_flags_change_the_defaults():
    assert ask() == Settings()
    argv = ["--run", "x y", "--model.width", 8, "--model.heads=2", "--learning_rate", 0.25, "--kind", "char"]
    assert ask(*argv, "--sources", "--seed", 3, "--fast") == OTHER


def test_flags_change_a_preset():
    assert ask("--preset", "large") == PRESETS["large"]
    assert ask("--preset=large", "--no-fast", "--model.width", 256) == Settings(model=ModelConfig(layers=12, width=256))


@pytest.mark.parametrize("name", ["fresh", "force"])
def test_a_settings_file_can_not_replace_a_run(tmp_path, name):
    @dataclasses.dataclass(frozen=True)
    class Replacing:
        fresh: bool = False
        force: bool = False

    path = tmp_path / "s.json"
    write_json(path, {name: True})
    with pytest.raises(UserError, match=f"{name} is True, but a settings file may not set it"):
        parse(Replacing, {}, ["--settings", str(path)])
    write_json(path, {name: False})
    assert parse(Replacing, {}, ["--settings", str(path)]) == Replacing()


def test_a_settings_file_is_replayed(tmp_path):
    alone, run = tmp_path / "alone.json", tmp_path / "run"
    write_json(alone, settings_to_json(OTHER))
    run.mkdir()
    write_json(run / "settings.json", {"stage": "toy", "settings": settings_to_json(OTHER), "inputs": {}})
    assert ask("--settings", alone) == ask("--settings", run) == ask("--settings", run / "settings.json") == OTHER
    assert ask("--seed", 4, "--settings", alone) == dataclasses.replace(OTHER, seed=4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning-rate", "3"], "unknown option --lerning-rate; did you mean --learning-rate?"),
        (["--lerning_rate=3"], "unknown option --lerning_rate; did you mean --learning-rate?"),
        (["--layers", "3"], "unknown option --layers; did you mean --model.layers?"),
        (["--no-fsat"], "unknown option --no-fsat; did you mean --no-fast?"),
        (["--zzz"], "unknown option --zzz; --help lists the options"),
        (["small"], "unexpected argument 'small'; options start with --, and --help lists them"),
        (["--preset", "smal"], "unknown preset 'smal' (presets: small, large); did you mean small?"),
        (["--preset", "--fast"], "--preset needs a value"),
        (["--settings"], "--settings needs a value"),
        (["--preset", "small", "--settings", "x"], "--preset and --settings both choose the starting values; give one"),
        (["--settings", "/nowhere.json"], "/nowhere.json does not exist"),
        (["--learning-rate", "11"], "learning_rate is 11.0; choose at most 10"),
        (["--model.width", "3"], "model.width 3 is not a multiple of heads 4"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(pytest.fail, Settings, PRESETS, argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_nested_setting_is_found_by_its_last_name():
    @dataclasses.dataclass(frozen=True)
    class Optimizer:
        lr: float = 0.1

    @dataclasses.dataclass(frozen=True)
    class Nested:
        optimizer: Optimizer = Optimizer()

    with pytest.raises(UserError, match="unknown option --lr; did you mean --optimizer.lr?"):
        parse(Nested, {}, ["--lr", "3"])
    assert parse(Nested, {}, ["--optimizer.lr", "3"]) == Nested(Optimizer(3.0))


def test_a_value_of_the_wrong_type_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        ask("--seed", "many")
    assert stop.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_help_shows_options_presets_and_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli(pytest.fail, Settings, PRESETS, ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for text in ("python experiments/toy.py", "--preset {small,large}", "the run folder", "--kind {bpe,char}"):
        assert text in out
    assert out.startswith("usage: python -m _pytest.outcomes [-h]")  # where this test's main is
    assert "--learning-rate 0.5" in out and "--model.layers 12 --fast True" in out  # what the presets change


def test_cli_prepares_the_process_then_returns_what_main_returns(monkeypatch):
    calls = []
    monkeypatch.setattr(jaxgpt.runs.cli, "prepare_process", lambda: calls.append("prepare"))
    assert cli(lambda settings: calls.append(settings.seed) or 7, Settings, {}, ["--seed", "5"]) == 7
    assert calls == ["prepare", 5]


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("no such data; name another"), 2), (KeyboardInterrupt(), 130)]
)
def test_failures_of_main(monkeypatch, capsys, error, status):
    def main(settings):
        raise error

    monkeypatch.setattr(jaxgpt.runs.cli, "prepare_process", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli(main, Settings, PRESETS, [])
    assert stop.value.code == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(error) in err


@pytest.mark.parametrize("running", ["experiments/dpo.py", "experiments/studies/imdb.py"])
def test_an_error_that_names_an_experiment_ends_in_its_command(monkeypatch, capsys, running):
    def main(settings):
        raise UserError("runs/a b holds no model", experiment=(settings.kind, "--run", "runs/a b"))

    @dataclasses.dataclass(frozen=True)
    class Settings:
        kind: str = "sft"

    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setattr(jaxgpt.runs.cli, "prepare_process", lambda: None)
    monkeypatch.setattr(sys, "executable", str(root / ".venv/bin/python"))
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(root / running))
    for kind, command in {"sft": "\n  try: .venv/bin/python -m experiments.sft --run 'runs/a b'", "none": ""}.items():
        with pytest.raises(SystemExit):
            cli(main, Settings, {}, ["--kind", kind])
        assert capsys.readouterr().err == f"error: runs/a b holds no model{command}\n"


@pytest.mark.parametrize(
    ("ok", "refused", "words"),
    [
        (Range(1), 0, "at least 1"),
        (Range(above=1), 1, "above 1"),
        (Range(0, below=1), 1.0, "at least 0 and below 1"),
        (Range(0, 2), math.nan, "at least 0 and at most 2"),
        (Range(0), math.inf, "at least 0"),
        (Range(), -math.inf, "any finite number"),
    ],
    ids=str,
)
def test_one_range_serves_every_way_in_and_the_help(capsys, ok, refused, words):
    @dataclasses.dataclass(frozen=True)
    class Inner:
        rates: Annotated[tuple[float, ...], ok]
        rate: Annotated[float | None, ok] = None

        def __post_init__(self) -> None:
            check_settings(self)

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner((0.5,) if 0.5 in ok else (1.5,))

    for wrong, name in (({"rate": refused}, "rate"), ({"rates": (refused,)}, "rates")):
        finite = "" if math.isfinite(refused) or ok == Range() else "finite and "
        message = f"{name} is {float(refused)}; it must be {finite}{words}"
        with pytest.raises(UserError) as error:
            Inner(**{"rates": (), **wrong})
        assert str(error.value).replace(f"{refused};", f"{float(refused)};") == message
        if math.isfinite(refused):  # JSON has no other numbers
            with pytest.raises(UserError, match=re.escape(f"here: inner.{message}")):
                settings_from_json(Outer, {"inner": json.loads(json.dumps({"rates": [], **wrong}))}, "here")
        with pytest.raises(UserError) as error:
            parse(Outer, {}, [f"--inner.{name}", str(refused)])
        assert str(error.value) == f"inner.{message}"
    with pytest.raises(SystemExit):
        parse(Outer, {}, ["--help"])
    assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(jaxgpt.runs.cli, "prepare_process", lambda: None)
    with pytest.raises(ZeroDivisionError):
        cli(lambda settings: 1 / 0, Settings, PRESETS, [])


def test_settings_round_trip_through_json():
    for settings in (Settings(), OTHER, *PRESETS.values()):
        text = json.dumps(settings_to_json(settings))
        again = settings_from_json(Settings, json.loads(text))
        assert again == settings
        assert json.dumps(settings_to_json(again)) == text  # 1 and 1.0 are written the same way
    assert settings_from_json(Settings, {}) == Settings()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"modle": {}}, "here: unknown setting modle; did you mean model?"),
        ({"model": {"layres": 3}}, "here: unknown setting model.layres; did you mean layers?"),
        ({"model": 3}, "here: model must be an object, not 3"),
        ({"model": {"layers": "3"}}, "here: model.layers must be a whole number, not '3'"),
        ({"seed": 1.5}, "here: seed must be a whole number, not 1.5"),
        ({"seed": True}, "here: seed must be a whole number, not True"),
        ({"learning_rate": True}, "here: learning_rate must be a number, not True"),
        ({"learning_rate": float("nan")}, "here: learning_rate must be a number, not nan"),
        ({"learning_rate": None}, "here: learning_rate must be a number, not None"),
        ({"fast": 1}, "here: fast must be true or false, not 1"),
        ({"kind": "chat"}, "here: kind is 'chat'; choose one of bpe, char; did you mean char?"),
        ({"kind": []}, "here: kind is []; choose one of bpe, char"),
        ({"sources": "ab"}, "here: sources must be a list, not 'ab'"),
        ({"sources": ["a", 1]}, "here: sources[1] must be text, not 1"),
        ({"run": 3}, "here: run must be a path, not 3"),
        ({"run": "a\0b"}, "here: run must be a path, not 'a\\x00b'"),
        ({"run": "a\ud800b"}, "here: run must be a path, not 'a\\ud800b'"),
        ([], "here: the top level must be an object, not []"),
        ({"learning_rate": 11}, "here: learning_rate is 11.0; choose at most 10"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_name(data, message):
    with pytest.raises(UserError) as error:
        settings_from_json(Settings, data, where="here")
    assert str(error.value) == message


def test_other_types():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        size: tuple[int, float]
        names: dict[str, int] = dataclasses.field(default_factory=dict)

    assert settings_from_json(Pair, {"size": [1, 2], "names": {"a": 1}}) == Pair((1, 2.0), {"a": 1})
    for data, part in (
        ({}, "size is missing"),
        ({"size": [1]}, "list of 2"),
        ({"size": [1, 2], "names": {"a": ""}}, "names"),
    ):
        with pytest.raises(UserError, match=part):
            settings_from_json(Pair, data)
    with pytest.raises(UserError, match="finite"):
        settings_to_json(Pair((1, float("inf"))))
    with pytest.raises(TypeError):
        settings_to_json({"a": object()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{\n"a": }', ":2: not valid JSON"),
        (b"\xff", "not UTF-8 text (byte 0)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", ":1: not valid JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_script_prints_its_mistake_without_a_traceback(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(
        '"""Toy.\n\nCommand: python toy.py\n"""\nimport dataclasses\nfrom jaxgpt.runs.cli import cli\n\n'
        "@dataclasses.dataclass(frozen=True)\nclass Settings:\n    steps: int = 1\n\n"
        "cli(lambda settings: print('steps', settings.steps), Settings, {})\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "JAXGPT_CACHE": str(tmp_path), "PATH": ""}

    program = f"""
import runpy, sys
for word in ("--steps=4", "--help", "--step=4"):  # the last one ends the process
    sys.argv = ["toy.py", word]
    try:
        runpy.run_path({str(script)!r}, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    device, said, *help_ = done.stdout.splitlines()
    assert device.startswith("device: cpu") and said == "steps 4" and "Command: python toy.py" in "".join(help_)
    assert (done.returncode, done.stderr) == (2, "error: unknown option --step; did you mean --steps?\n")


def test_deterministic_reaches_xla_before_a_device_is_used_and_the_users_own_flags_win(tmp_path):
    """XLA writes down the options it compiled with, where they aren't its defaults."""
    program = """
import dataclasses, os, jax
from jaxgpt.runs.cli import cli

@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 1

def main(settings):
    print(jax.jit(lambda x: x + settings.steps)(2))
    print(os.environ["NCCL_NVLS_ENABLE"], jax.config.jax_persistent_cache_enable_xla_caches)

cli(main, Settings, {})
"""
    environment = {
        **{"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu", "PATH": ""},
        **{"JAXGPT_CACHE": str(tmp_path), "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_gpu_shard_autotuning=true"},
    }
    command = [sys.executable, "-c", program, "--deterministic", "--steps", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["5", "0 none"], done.stderr
    (options,) = (path.read_text() for path in tmp_path.glob("*jit__lambda.debug_options"))
    assert "xla_gpu_deterministic_ops: true" in options and "xla_gpu_enable_triton_gemm: false" in options
    assert "xla_gpu_shard_autotuning: false" not in options
