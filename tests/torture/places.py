"""Paths of any characters, folders that are moved or taken away, file systems without locks, and other users' files."""

import contextlib
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.files import sha256_of_folder, write_json
from jaxgpt.runs import claim
from jaxgpt.runs.checkpoints import Checkpoints, SaveConfig
from jaxgpt.runs.claim import Claim
from jaxgpt.runs.run import Run
from jaxgpt.runs.saved_model import load_model, save_model
from tests.torture.harness import Kind, Outcomes
from tests.torture.records import CONFIG, STATE, Settings, batches, resumed, stopped_run, tokenizer

CHARACTERS = [*map(chr, range(1, 127)), *"é日本🙂\u2028\u200f\u00a0", "[0-9]", "{a,b}", "..", "%2F", "$HOME", "\udcff"]
NOBODY = 65534


def any_path(rng: random.Random, folder: Path) -> Outcomes:
    """A model is stored under any path, beside folders that a pattern would match, or refused before anything is."""
    params = {"w": np.arange(3.0)}
    while True:
        name = "".join(rng.choices(CHARACTERS, k=rng.randint(1, 4))).replace("/", "").replace("m", "") or "a"
        place = folder / "models" / f"m{name}n"
        save_model(folder / "models" / "mmn", {"w": np.zeros(3)}, CONFIG)  # what a pattern could match as well
        try:
            with Run(place, Settings(Path("x")), "sft") as run:
                save_model(place / "model", params, CONFIG)
                run.finish({})
            good = np.array_equal(load_model(place).params["w"], params["w"])
            yield "" if good else f"{name!r}: other parameters"
        except UserError:
            yield "" if not place.exists() else f"{name!r}: refused after {sorted(place.iterdir())}"
        except Exception as error:
            yield f"{name!r}: {error!r}"
        shutil.rmtree(folder / "models")


def folders_taken_away(rng: random.Random, folder: Path) -> Outcomes:
    """The folder of a run is moved, deleted, or replaced by another one while the run works in it."""
    other, folder = stopped_run(folder / "other", lr=0.2), folder / "work"
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        place, moved = folder / "run", folder / "moved"
        change = rng.choice(["move", "delete", "replace by an empty one", "replace by another run"])
        when = rng.randint(1, 3)
        kept: dict[str, str] = {}
        try:
            with Run(place, Settings(place), "sft") as run:
                saves = Checkpoints(run, SaveConfig(keep=9), tokenizer(), batches())
                for step in range(1, 4):
                    run.log(step, {"loss": 1.0})
                    saves.save(step, STATE)
                    if step == when:
                        saves.wait()
                        place.rename(moved)
                        if change == "delete":
                            shutil.rmtree(moved)
                        elif "empty" in change:
                            place.mkdir()
                        elif "another" in change:
                            shutil.copytree(other, place)
                        kept = sha256_of_folder(folder)
                    if rng.random() < 0.5:  # as at the end of a run, and as rollouts are
                        save_model(place / "model", {"w": np.arange(3.0)}, CONFIG)
                        write_json(place / "rows.json", {})
                saves.wait()
                run.finish({})
            yield f"{change} after step {when}: finished as if nothing had happened"
        except UserError as error:
            found = sha256_of_folder(folder)
            logs = {name for name in found if name.endswith(("log.txt", "metrics.jsonl"))}  # still open
            logs |= {name for name in found if "/tensorboard/" in name}
            changed = {name for name in found.keys() | kept.keys() if found.get(name) != kept.get(name)} - logs
            named = "was moved, deleted or taken over" in str(error)
            yield "" if named and not changed else f"{change} after step {when}: {error}; changed: {sorted(changed)}"
        except Exception as error:
            yield f"{change} after step {when}: {error!r}"


@contextlib.contextmanager
def no_locks() -> Iterator[None]:
    with (
        mock.patch.object(fcntl, "flock", side_effect=OSError("no locks")),
        mock.patch.object(claim, "BEAT", 0.05),
        mock.patch.object(claim, "PATIENCE", 0.6),
    ):
        yield


def leases(rng: random.Random, folder: Path) -> Outcomes:
    """Several claims on one folder without locks: one at most holds it, and when it ends the next one can."""
    while True:
        claims = [Claim(folder, lambda text: None) for _ in range(rng.randint(2, 4))]
        holders: list[Claim] = []

        def try_to(one: Claim, delay: float, holders: list[Claim] = holders) -> None:
            time.sleep(delay)
            with contextlib.suppress(UserError):
                one.take()
                holders.append(one)

        with no_locks():
            threads = [threading.Thread(target=try_to, args=(one, rng.uniform(0, 0.2))) for one in claims]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            holding = [one for one in holders if outcome(one.check) == ""]
            yield "" if len(holding) == 1 else f"{len(holding)} of {len(claims)} hold the folder"
            for one in holders:
                one.release()
            if rng.random() < 0.5:  # as a process leaves it that was killed on another machine
                (folder / ".lock").write_text(json.dumps({"id": "x", "host": "elsewhere", "pid": 1, "beat": 3}))
            later = Claim(folder, lambda text: None)
            yield outcome(later.take)
            later.release()


def outcome(call) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def names_that_are_no_steps(rng: random.Random, folder: Path) -> Outcomes:
    """Folders and files among the checkpoints that are none."""
    run = stopped_run(folder / "run")
    while True:
        name = rng.choice(["²", "٣", "09", "0", "-1", "1e9", "9 ", "9.old", "٩", "1" * 200, " 12", "+12", "1_2"])
        other = run / "checkpoints" / name
        other.mkdir() if rng.random() < 0.7 else other.touch()
        found = resumed(run)
        yield "" if found == (9, 9) else f"{name!r}: resumed after {found}"
        other.rmdir() if other.is_dir() else other.unlink(missing_ok=True)


AS_NOBODY = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from tests.torture.records import Settings
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_model
from jaxgpt.runs.endings import plain_endings
def act():
    run = Path(sys.argv[1])
    if sys.argv[2] == "run":
        with Run(run, Settings(run), "sft") as one:
            print("finished" if one.finished else "began anew")
    else:
        run_fingerprint(run, "sft")
        load_model(run)
        print("finished")
act()  # imports what this user may not be able to read
print("as nobody:")
os.setgid(65534)
os.setuid(65534)
with plain_endings():
    act()
"""


def files_of_others(rng: random.Random, folder: Path) -> Outcomes:
    """Parts of a finished run that another user may not read: one line, and nothing changes."""
    folder.chmod(0o755)
    while True:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        with Run(run, Settings(run), "sft") as made:
            made.log(1, {"loss": 1.0})
            save_model(run / "model", {"w": np.arange(3.0)}, CONFIG)
            made.finish({})
        before = sha256_of_folder(run)
        parts = [run, *run.rglob("*")]
        hidden = rng.sample(parts, rng.randint(1, 2))
        for path in hidden:
            path.chmod(0)
        action = rng.choice(["run", "load"])
        found = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(run), action],
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAXGPT_CACHE": "/tmp/jaxgpt-nobody"},
        )
        for path in hidden:
            path.chmod(0o755)
        names = ", ".join(str(path.relative_to(folder)) for path in hidden)
        said = found.stderr.strip()
        told = found.stdout.partition("as nobody:")[2].strip()
        good = (found.returncode, told.endswith("finished")) == (0, True) or (
            found.returncode == 2 and "Traceback" not in said and said.startswith("error:") and said.count("\n") <= 1
        )
        good = good and sha256_of_folder(run) == before
        yield "" if good else f"chmod 0 {names}, {action}: exit {found.returncode}, {found.stdout}{said[-1500:]}"


KINDS = {
    "models under any path": Kind(any_path, 1000),
    "run folders moved, deleted or replaced while running": Kind(folders_taken_away, 200),
    "claims on file systems without locks": Kind(leases, 100),
    "names among the checkpoints that are no steps": Kind(names_that_are_no_steps, 200),
    "files that another user may not read": Kind(files_of_others, 40, quick=False),
}
