"""Errors the user can fix."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """An error in settings, data or files that the user can fix: one line saying what is wrong, where, and what to do.

    `experiment`: the experiment that would help, with its flags: ("sft", "--run", "runs/sft"). The command line knows
    where experiments are and adds the full command; the library doesn't.
    """

    def __init__(self, message: str, *, experiment: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.experiment = experiment


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Wrap imports of packages that only an extra installs: UserError names the extra if a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "jaxgpt"):
            raise
        raise UserError(f'{package} is not installed; run pip install "jaxgpt[{extra}]"') from error


def printable(text: str, most: int = 200) -> str:
    """A stranger's text as part of a one-line message: without line breaks or control characters, and not long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown if len(text) <= most else f"{shown} …"
