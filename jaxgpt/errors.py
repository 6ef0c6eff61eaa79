"""Mistakes that a user can mend."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in settings, data or files: one line that says what is wrong, where, and what to do.

    `experiment`: the experiment that would help, with its flags: ("sft", "--run", "runs/sft"). The command line knows
    where experiments are and adds the whole command; the library doesn't.
    """

    def __init__(self, message: str, *, experiment: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.experiment = experiment


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of packages that only an extra installs: UserError says which when one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "jaxgpt"):
            raise
        raise UserError(f'{package} is not installed; pip install "jaxgpt[{extra}]" brings it') from error
