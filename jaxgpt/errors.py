"""Mistakes that a user can mend."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in settings, data or files: one line that says what is wrong, where, and what to do."""


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
