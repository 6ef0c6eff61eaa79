"""Checkpoints: what is saved is what was there, damage is named and passed over, and signals save."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from jaxgpt import losses, training
from jaxgpt.data import pipelines
from jaxgpt.data.tokenizer import Tokenizer, train_char
from jaxgpt.errors import UserError
from jaxgpt.models.sharding import MeshConfig, make_mesh, place_like, place_local_rows, replicate
from jaxgpt.runs import checkpoints, process, verify
from jaxgpt.runs.checkpoints import Checkpoints, SaveConfig
from jaxgpt.runs.endings import Stopped
from jaxgpt.runs.loop import Loop, LoopSettings
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import save_model
from jaxgpt.structs import Batch
from jaxgpt.training.guard import GuardConfig
from jaxgpt.training.step import make_nll, sharded_shapes
from tests.helpers import TINY, WALL_CLOCK, edit_record, params_of

TX = optax.adam(1e-2)
STEPS = 12
ONE = dataclasses.replace(TINY, layers=1)
STEP = jax.jit(training.make_train_step(make_nll(ONE), TX), donate_argnums=0)
FIRST = jax.jit(lambda: training.init_state(params_of(ONE), TX))


@dataclasses.dataclass(frozen=True)
class Settings(LoopSettings):
    log_every: int = 1
    save: SaveConfig = SaveConfig(every=3, keep=2)
    guard: GuardConfig = GuardConfig(patience=2)
    seed: int = 0


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_char(["abc"])


def fresh_state():
    mesh = make_mesh(devices=jax.devices()[:1])
    return replicate((FIRST(), jax.random.key(7)), mesh)


def batches_of(seed=0):
    return pipelines.windows(np.arange(400, dtype=np.int32) % 60, 16, 4, seed=seed)


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def train_run(folder: Path, tok: Tokenizer, until: int = STEPS, settings=None, batches=None, visit=None):
    """A little experiment; stops without a word after step `until`, as if killed. Returns its state."""
    settings = settings or Settings()
    done = []
    with (
        Run(folder, settings, "sft") as run,
        Loop(run, settings, tok, STEPS, batches or batches_of(), ONE.vocab) as loop,
    ):
        state, key = loop.restore(fresh_state(), fresh_state)
        for i, arrays in loop:
            if i > until:
                break
            done.append(i)
            state, metrics = STEP(state, Batch.of(arrays), jax.random.fold_in(key, i))
            if visit:
                visit(i)
            loop.record(i, (state, key), metrics)
    return done[0], (state, key)


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tok) -> Path:
    """A run killed after step 10, with checkpoints of steps 6 and 9."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train_run(folder, tok, until=10)
    return folder


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def test_going_on_gives_the_bits_of_a_run_that_was_not_stopped(run, tok, tmp_path):
    _, whole = train_run(tmp_path / "whole", tok)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed in the middle of a line
    first, state = train_run(run, tok)
    assert first == 10
    assert bits(state) == bits(whole)
    assert rows(run) == rows(tmp_path / "whole")
    assert "resumed after step 9 of 12" in (run / "log.txt").read_text()


def test_a_profile_is_of_the_steps_after_those_that_compile_and_changes_nothing(run, tok, tmp_path):
    """A resumed run traces steps of its own, into another folder, although the run began without --profile."""
    _, whole = train_run(tmp_path / "whole", tok, settings=Settings(profile=2))
    first, state = train_run(run, tok, settings=Settings(profile=5))
    assert first == 10 and bits(state) == bits(whole)
    assert rows(run) == rows(tmp_path / "whole")
    for folder, begin, said in (
        (tmp_path / "whole", 3, "profiled steps 3 to 4"),
        (run, 12, "profiled steps 12 to 12"),  # the last one
    ):
        assert said in (folder / "log.txt").read_text()
        (traces,) = (folder / "profile").iterdir()
        assert traces.name == str(begin)
        (trace,) = traces.rglob("*.xplane.pb")
        assert b"jit_step" in trace.read_bytes()


def test_a_checkpoint_holds_everything_and_plain_orbax_reads_it(run, tok):
    record = checkpoints.read_checkpoint(run / "checkpoints/9")
    assert record["step"] == 9 and record["tokenizer"] == tok.fingerprint and record["data"]["grain"]
    assert Tokenizer.load(run / "checkpoints/9").fingerprint == tok.fingerprint
    state, key = ocp.load(run / "checkpoints/9/state")
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(7)))
    assert int(state["step"]) == 9 and state["trainable"]["embed"]["tokens_VD"].shape == (64, 32)
    assert {one.name for one in (run / "checkpoints").iterdir()} == {"6", "9"}  # keep=2


def test_what_is_saved_is_the_state_of_that_moment_though_the_next_step_reuses_its_buffers(tmp_path, tok):
    """The save is asynchronous and the step donates. On eight devices."""
    settings = Settings(save=SaveConfig(every=1, keep=99))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Run(tmp_path / "run", settings, "sft") as run:
        saves = Checkpoints(run, settings.save, tok, batches_of())
        state = replicate({"w": np.zeros((512, 512), np.float32)}, make_mesh())
        for i in range(1, 9):
            state = step(state)
            saves.save(i, state)
        saves.wait()
    for i in range(1, 9):
        loaded = ocp.load(tmp_path / f"run/checkpoints/{i}/state")
        np.testing.assert_array_equal(loaded["w"], float(i))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_another_mesh_takes_the_same_numbers(run, tok, shape):
    mesh = make_mesh(MeshConfig(*shape))
    shapes = sharded_shapes(mesh, FIRST)
    state, _ = checkpoints.load_state(run / "checkpoints/9", (shapes, replicate(jax.random.key(0), mesh)))
    there, _ = checkpoints.load_state(run / "checkpoints/9", fresh_state())
    assert bits(state) == bits(there)
    table = state.trainable["embed"]["tokens_VD"]
    assert not table.sharding.is_fully_replicated


def test_another_mesh_is_no_other_run_and_is_said(run, tok):
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    settings = Settings(mesh=MeshConfig(fsdp=4))
    shapes = (sharded_shapes(mesh, FIRST), replicate(jax.random.key(0), mesh))
    with Run(run, settings, "sft") as opened:
        saves = Checkpoints(opened, settings.save, tok, batches_of())
        state, _ = saves.load(saves.newest(shapes), shapes, STEPS)
    assert len(state.trainable["embed"]["tokens_VD"].sharding.device_set) == 4
    moved = "mesh data 1 x fsdp 1 x tensor 1 before, data 1 x fsdp 4 x tensor 1 now"
    assert (
        f"resumed after step 9 of 12; equal up to rounding, not bit for bit ({moved})" in (run / "log.txt").read_text()
    )
    assert json.loads((run / "settings.json").read_text())["settings"]["mesh"]["fsdp"] == 4


@pytest.mark.slow
def test_a_run_goes_from_one_device_to_other_meshes_with_the_same_numbers_and_says_so(tmp_path, tok):
    """One device, then parameters sharded over four, then layers over two; an untouched run beside it."""

    def train(folder: Path, until: int, config=MeshConfig(), count=1):  # noqa: B008
        mesh = make_mesh(config, jax.devices()[:count])
        shapes = (sharded_shapes(mesh, FIRST), replicate(jax.random.key(0), mesh))
        settings = Settings(mesh=config)
        with Run(folder, settings, "sft") as run, Loop(run, settings, tok, STEPS, batches_of(), ONE.vocab) as loop:
            state, key = loop.restore(shapes, lambda: place_like((FIRST(), jax.random.key(7)), shapes))
            for i, arrays in loop:
                if i > until:
                    break
                state, metrics = STEP(state, place_local_rows(Batch.of(arrays), mesh), jax.random.fold_in(key, i))
                loop.record(i, (state, key), metrics)
        assert json.loads((folder / "settings.json").read_text())["settings"]["mesh"]["fsdp"] == config.fsdp
        state.trainable["block_0"]["qkv"].pop("bias")  # the softmax doesn't see it: Adam follows the rounding there
        return state.trainable

    run = tmp_path / "run"
    train(run, 3)
    assert "fsdp 1 before" not in (run / "log.txt").read_text()
    moved = train(run, 6, MeshConfig(fsdp=4), 4)["embed"]["tokens_VD"]
    assert not moved.sharding.is_fully_replicated and moved.sharding.mesh.size == 4
    ended = train(run, STEPS, MeshConfig(tensor=2), 2)
    said = [line for line in (run / "log.txt").read_text().splitlines() if "resumed" in line]
    one, four, two = (f"mesh data 1 x fsdp {fsdp} x tensor {tensor}" for fsdp, tensor in ((1, 1), (4, 1), (1, 2)))
    for line, there, now in zip(said, (one, four), (four, two), strict=True):
        assert f"equal up to rounding, not bit for bit ({there} before, {now.removeprefix('mesh ')} now)" in line
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ended, train(tmp_path / "a", 99))
    for a, b in zip(rows(run), rows(tmp_path / "a"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"jax": "0.9.9"}, r"jax 0.9.9 before, [0-9.]+ now"),
        ({"optax": "0.1", "flax": "0.2"}, r"flax 0.2 before, .* now; optax 0.1 before, .* now"),
        ({"cpu": "Z80, 1 cores"}, "cpu Z80, 1 cores before, .* now"),
        ({"processes": "2"}, "processes 2 before, 1 now"),
        ({"devices": "4 x cpu"}, "devices 4 x cpu before, 8 x cpu now"),
        ({}, None),
    ],
)
def test_what_rounds_differently_is_on_record_and_said_when_resuming(run, tok, changed, said):
    path = run / "checkpoints/9/checkpoint.json"
    edit_record(path, lambda record: record["devices"].update(changed))
    train_run(run, tok, until=10)
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "resumed" in line]
    words = rf" \({said}\)" if said else ""
    rounding = "; equal up to rounding, not bit for bit" if said else ""
    assert re.fullmatch(rf"\S+ sft: resumed after step 9 of 12{rounding}{words}", line), line


def test_every_version_that_a_run_records_is_compared_when_it_resumes(tmp_path, tok, monkeypatch):
    """Such as a GPU's driver, although no package has it."""
    ours = process.versions()
    monkeypatch.setattr(process, "versions", lambda: {**ours, "driver": "550.54"})
    train_run(tmp_path, tok, until=3)
    monkeypatch.setattr(process, "versions", lambda: {**ours, "driver": "580.65", "python": "3.0"})
    train_run(tmp_path, tok, until=4)
    line = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert line.endswith("equal up to rounding, not bit for bit (driver 550.54 before, 580.65 now)"), line


def test_a_refusal_says_how_to_keep_what_is_there(run, tok):
    """An unfinished run is never to be deleted; a finished one at last."""
    with pytest.raises(UserError) as error:
        train_run(run, tok, settings=Settings(seed=1))
    assert "holds an unfinished run with other settings (seed: 0 before, 1 now); restore them to resume it" in str(
        error.value
    )
    assert "--force" in str(error.value) and "--fresh" not in str(error.value)
    with pytest.raises(UserError) as error:
        train_run(run, tok, batches=batches_of(seed=5))
    assert "restore them" in str(error.value) and "--fresh" not in str(error.value)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def damage(kind: str, folder: Path) -> None:
    match kind:
        case "flipped bit":
            flip(largest(folder / "state"))
        case "truncated":
            os.truncate(largest(folder / "state"), 100)
        case "missing":
            largest(folder / "state").unlink()
        case "half-written":
            (folder / "checkpoint.json").unlink()
        case "torn record":
            os.truncate(folder / "checkpoint.json", 50)
        case "tokenizer":
            flip(folder / "tokenizer.json")
        case "another value":
            path = folder / "checkpoint.json"
            path.write_text(path.read_text().replace('"next_index": ', '"next_index": 1'))
        case "another name":
            path = folder / "checkpoint.json"
            path.write_text(path.read_text().replace("tokens_VD", "tokens_VE"))


DAMAGES = {
    "flipped bit": "is damaged",
    "truncated": "is damaged",
    "missing": "is missing",
    "half-written": "is unfinished",
    "torn record": "checkpoint.json",
    "tokenizer": "tokenizer.json is damaged",
    "another value": "checkpoint.json is damaged",
    "another name": "checkpoint.json is damaged",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(run, tok, kind, capsys, tmp_path):
    damage(kind, run / "checkpoints/9")
    assert verify.main([str(run)]) == 1
    told = capsys.readouterr().out
    assert "DAMAGED" in told and DAMAGES[kind] in told and "intact   " in told
    first, _ = train_run(run, tok, until=7)
    assert first == 7
    assert f"WARNING: skipped checkpoint 9: {run / 'checkpoints/9'}" in (run / "log.txt").read_text()


def test_a_run_without_an_intact_checkpoint_says_that_it_starts_again(run, tok):
    for step in ("6", "9"):
        damage("tokenizer", run / "checkpoints" / step)
    assert train_run(run, tok, until=1)[0] == 1
    assert "is intact: sft starts again from step 1" in (run / "log.txt").read_text()


def test_a_renamed_checkpoint_is_passed_over(run, tok):
    (run / "checkpoints/9").rename(run / "checkpoints/11")
    (run / "checkpoints/²").mkdir()  # a digit to Python, but no number
    first, _ = train_run(run, tok, until=7)
    assert first == 7
    assert "holds the checkpoint of step 9: it was renamed" in (run / "log.txt").read_text()


def test_only_whole_checkpoints_count_as_kept(run, tok):
    """Neither a later one that couldn't be used nor one whose save was not finished costs a whole one."""
    (run / "checkpoints/9").rename(run / "checkpoints/11")
    shutil.copytree(run / "checkpoints/6", run / "checkpoints/7")
    (run / "checkpoints/7/checkpoint.json").unlink()
    assert train_run(run, tok, until=10)[0] == 7
    assert {one.name for one in (run / "checkpoints").iterdir()} == {"6", "9", "11"}
    checkpoints.read_checkpoint(run / "checkpoints/6"), checkpoints.read_checkpoint(run / "checkpoints/9")


def test_another_runs_checkpoint_is_refused_unless_forced(run, tok, tmp_path):
    train_run(tmp_path / "other", tok, until=10, settings=Settings(seed=1))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other/checkpoints", run / "checkpoints")
    with pytest.raises(UserError, match=r"other inputs \(run \w{12} before, \w{12} now\)"):
        train_run(run, tok)
    assert train_run(run, tok, until=10, settings=Settings(force=True))[0] == 10


def test_metrics_altered_before_the_checkpoint_are_said(run, tok):
    path = run / "metrics.jsonl"
    assert not any(problem for _, problem in verify.verify(run))
    path.write_text(path.read_text().replace('"step": 2', '"step": 1'))
    problems = {place: problem for place, problem in verify.verify(run) if problem}
    assert list(problems) == [path] and "(other bytes)" in problems[path]
    assert train_run(run, tok, until=10)[0] == 10
    assert "metrics.jsonl has changed since the checkpoint was saved (other bytes)" in (run / "log.txt").read_text()


def test_nothing_is_saved_into_a_folder_that_was_moved(tmp_path, tok):
    run = tmp_path / "run"

    def move(step: int) -> None:
        if step == 5:
            while not (run / "checkpoints/3/checkpoint.json").exists():
                time.sleep(0.01)
            run.rename(tmp_path / "moved")

    with pytest.raises(UserError, match="was moved, deleted or taken over"):
        train_run(run, tok, visit=move)
    assert not run.exists()
    assert train_run(tmp_path / "moved", tok)[0] == 4  # after the checkpoint of step 3


def test_a_folder_that_is_moved_in_the_middle_of_a_save_is_called_so(tmp_path, tok, monkeypatch):
    sync = checkpoints.sync_folder

    def moved(folder: Path) -> None:
        sync(folder)
        (tmp_path / "run").rename(tmp_path / "moved")

    monkeypatch.setattr(checkpoints, "sync_folder", moved)
    with pytest.raises(UserError, match="^the run folder .* was moved, deleted or taken over"):
        train_run(tmp_path / "run", tok, until=7)
    assert not (tmp_path / "run").exists() and not (tmp_path / "moved/checkpoints/3/checkpoint.json").exists()


@pytest.mark.slow
def test_without_any_good_checkpoint_the_run_starts_again(run, tok, tmp_path):
    for step in ("6", "9"):
        damage("flipped bit", run / "checkpoints" / step)
    first, state = train_run(run, tok)
    _, whole = train_run(tmp_path / "whole", tok)
    assert first == 1 and bits(state) == bits(whole) and rows(run) == rows(tmp_path / "whole")


def test_every_parameter_that_differs_is_named(run, tok):
    settings = Settings()
    with Run(run, settings, "sft") as opened, pytest.raises(UserError) as error:
        other = dataclasses.replace(ONE, width=48)
        state = jax.eval_shape(lambda: training.init_state(params_of(other), TX))
        Loop(opened, settings, tok, STEPS, batches_of(), ONE.vocab).restore((state, jax.random.key(0)), fresh_state)
    named = str(error.value).splitlines()[1:]
    assert "  0/trainable/embed/tokens_VD is float32[64,32], not float32[64,48]" in named
    assert len(named) == 3 * len(jax.tree.leaves(state.trainable))  # parameters and two moments of Adam


def test_other_data_or_another_tokenizer_is_refused_unless_forced(run, tok):
    other = train_char(["xyz"])
    with pytest.raises(UserError, match=r"other inputs \(tokenizer \w{12} before, \w{12} now\); .*--force"):
        train_run(run, other)
    with pytest.raises(UserError, match=r"other inputs \(data \w{12} before, \w{12} now\)"):
        train_run(run, tok, batches=batches_of(seed=5))
    first, _ = train_run(run, tok, until=10, batches=batches_of(seed=5), settings=Settings(force=True))
    assert first == 10 and "the data has changed since the checkpoint" in (run / "log.txt").read_text()


def test_another_seed_is_refused_with_the_difference_unless_forced(run, tok):
    with pytest.raises(UserError, match=r"seed: 0 before, 1 now"):
        train_run(run, tok, settings=Settings(seed=1))
    first, _ = train_run(run, tok, until=10, settings=Settings(seed=1, force=True))
    assert first == 10 and "resuming with other settings (seed: 0 before, 1 now)" in (run / "log.txt").read_text()


def test_saving_more_or_less_often_is_no_other_run(run, tok):
    assert train_run(run, tok, until=10, settings=Settings(save=SaveConfig(every=1, keep=1)))[0] == 10


def test_fresh_forgets_the_checkpoints(run):
    with Run(run, Settings(), "sft", fresh=True):
        assert not (run / "checkpoints").exists() and (run / "metrics.jsonl").read_text() == ""


def test_a_finished_run_keeps_no_checkpoints(run):
    with Run(run, Settings(), "sft") as opened:
        opened.finish({})
    assert not (run / "checkpoints").exists()


# ---- signals ----


def test_sigterm_saves_after_the_step_and_asks_to_be_started_again(tmp_path, tok, capsys):
    with pytest.raises(Stopped, match="saved after step 5 of 12") as stop:
        train_run(tmp_path, tok, visit=lambda i: i == 5 and os.kill(os.getpid(), signal.SIGTERM))
    assert stop.value.code == 75 and " 5/12 (41%)" in capsys.readouterr().out, "the last step counts on the bar"
    assert train_run(tmp_path, tok, until=6)[0] == 6


def test_a_closed_terminal_saves_as_sigterm_does_but_not_under_nohup(tmp_path, tok):
    def hang_up(i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        train_run(tmp_path / "nohup", tok, until=3, visit=hang_up)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(Stopped, match="saved after step 2 of 12") as stop:
            train_run(tmp_path / "run", tok, visit=hang_up)
        assert stop.value.code == 75 and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_quits_at_once(tmp_path, tok):
    with pytest.raises(Stopped) as stop:
        train_run(tmp_path / "once", tok, visit=lambda i: i == 5 and signal.raise_signal(signal.SIGINT))
    assert stop.value.code == 130 and train_run(tmp_path / "once", tok, until=6)[0] == 6

    def twice(i):
        if i == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "twice", tok, visit=twice)
    assert signal.getsignal(signal.SIGTERM) == before
    assert train_run(tmp_path / "twice", tok, until=4)[0] == 4


# ---- the guard's patience ----


@pytest.mark.parametrize("where", [4, STEPS - 1])
def test_a_run_of_bad_batches_ends_with_the_last_one_on_disk(tmp_path, tok, where):
    class Poisoned:
        def __init__(self):
            self.count = 0

        def __next__(self):
            self.count += 1
            bad = self.count >= where
            return {"tokens": np.full((2, 4), self.count), "value": np.full(3, np.nan if bad else 1.0)}

        def get_state(self):
            return {"fingerprint": "f", "count": self.count}

        def set_state(self, state):
            self.count = state["count"]

    def loss(params, batch, key):
        return losses.reduce(params["w"] * batch), {}

    settings = Settings()
    step = jax.jit(training.make_train_step(loss, TX), donate_argnums=0)
    with (
        Run(tmp_path, settings, "sft") as run,
        pytest.raises(UserError, match="2 updates in a row were skipped") as stopped,
    ):
        state = training.init_state({"w": jnp.ones(3)}, TX)
        with Loop(run, settings, tok, STEPS, Poisoned(), 64) as loop:
            for i, arrays in loop:
                state, metrics = step(state, jnp.asarray(arrays["value"], jnp.float32), None)
                loop.record(i, state, metrics)
    assert "not finite: grad_norm, loss; the parameters are unchanged" in str(stopped.value)
    (bad,) = tmp_path.glob("bad_batch_*.npz")
    stored = np.load(bad, allow_pickle=False)
    np.testing.assert_array_equal(stored["tokens"], where + 1)
    assert np.isnan(stored["value"]).all() and np.isfinite(np.asarray(state.trainable["w"])).all()


@pytest.mark.parametrize("wrong", [{"every": -1}, {"keep": 0}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SaveConfig(**wrong)


def test_verify_says_when_there_is_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        verify.main([str(tmp_path)])
    assert "no run, saved model or checkpoint" in capsys.readouterr().err


def test_a_models_flipped_bit_is_found(tmp_path, capsys):
    save_model(tmp_path / "model", {"w": np.ones(99, np.float32)}, TINY)
    assert verify.main([str(tmp_path)]) == 0
    flip(largest(tmp_path / "model/params"))
    assert verify.main([str(tmp_path)]) == 1
