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


def first_line(error: BaseException, most: int = 500) -> str:
    """The first line of what an error says, at most `most` characters; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def printable(text: str, most: int = 200) -> str:
    """Untrusted text made safe for a one-line message: control characters are escaped, and long text is cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown if len(text) <= most else f"{shown} …"


def show_value(value: object) -> str:
    """A value from an untrusted file as part of a one-line message; of a list or an object, only the type."""
    plain = isinstance(value, str | int | float)
    return printable(repr(value), 60) if plain else f"of type {type(value).__name__}"
