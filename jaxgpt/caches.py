"""Folders of made data that are verified at every use, rebuilt when damaged, and done without where they can't be
written."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxgpt.errors import UserError
from jaxgpt.files import check_files, create_folder, read_record, sha256_of_folder, warn_once, write_record

T = TypeVar("T")
_HASHES = "sha256.json"  # in each cached folder: its name, and the hashes of its other files
_scratch: dict[Path, tempfile.TemporaryDirectory[str]] = {}  # temporary folders that replace unwritable ones


def cached(folder: Path, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[Path, T], None]) -> T:
    """What `make` returns, cached in `folder`, which `write` fills and `read` reads.

    A damaged folder is rebuilt, with a warning. If the folder can't be written, there is a warning and no cache."""
    with contextlib.suppress(FileNotFoundError):  # another process has just removed a damaged one
        if _is_intact(folder):
            return read(folder)
    made = make()
    try:
        _fill(folder, lambda new: write(new, made))
    except OSError as error:
        warn_unwritable(folder, error)
    return made


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fill` if it isn't yet. If it can't be written, a temporary folder, removed when the process
    ends."""
    if _is_intact(folder):
        return folder
    if folder in _scratch:
        return Path(_scratch[folder].name)
    try:
        _fill(folder, fill)
        return folder
    except OSError as error:
        place = _replace_unwritable(folder, error)
        fill(place)
        return place


def writable_folder(folder: Path) -> Path:
    """`folder`, created if missing. If it can't be written, a temporary folder, removed when the process ends."""
    if folder in _scratch:
        return Path(_scratch[folder].name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        return _replace_unwritable(folder, error)


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    with create_folder(folder) as new:
        fill(new)
        write_record(new / _HASHES, {"folder": folder.name, "files": sha256_of_folder(new)})


def _is_intact(folder: Path) -> bool:
    """Whether a cached folder holds what was written there. A damaged one is removed."""
    if not os.path.lexists(folder):
        return False
    try:
        record = read_record(folder / _HASHES, ("folder", "files"), "")
        check_files(folder, record["files"], "")
        if record["folder"] == folder.name:  # the name says what it was made from
            return True
    except (UserError, OSError):
        pass
    warn_once(f"{folder} is damaged or was written by an older version; it is rebuilt")
    with (
        contextlib.suppress(OSError),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside,
    ):
        os.replace(folder, Path(aside) / "damaged")  # in one step: another process may be rebuilding it
    return False


def _replace_unwritable(folder: Path, error: OSError) -> Path:
    warn_unwritable(folder, error)
    _scratch[folder] = tempfile.TemporaryDirectory(prefix="jaxgpt.")
    return Path(_scratch[folder].name)


def warn_unwritable(path: Path, error: OSError) -> None:
    """Warn that a cache can't be written, and why."""
    warn_once(
        f"can't write to {path} ({error.strerror or error}), so it is rebuilt at each start; "
        "set JAXGPT_CACHE to a folder that you may write to, or free some space"
    )
