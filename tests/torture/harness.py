"""What every kind of torture uses: a case is held if the program gives the right answer, or one line on what is wrong.

A kind is an endless generator of outcomes: "" for a case that was held, otherwise what happened, with all that it takes
to see it again. `python -m tests.torture` draws from it with a seed; a traceback is an outcome like any other.
"""

import random
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.errors import UserError

Outcomes = Generator[str]


class Kind(NamedTuple):
    """`outcomes(rng, folder)` may use the empty `folder`. `cases`: how many of them `make torture` runs. `quick`: cheap
    enough for the minute that CI spends."""

    outcomes: Callable[[random.Random, Path], Outcomes]
    cases: int = 2000
    quick: bool = True


def held(call: Callable[[], Any], expected: Any, names: str = "") -> str:
    """The outcome of a call that must return `expected`, or raise a UserError of few lines that names `names`."""
    try:
        found = call()
    except UserError as error:
        return "" if names in str(error) else f"the message does not name {names}: {error}"
    except Exception:
        return traceback.format_exc(limit=-3)
    return "" if found == expected else f"silently other content: {found!r:.300}"


def flip_bit(rng: random.Random, path: Path) -> str:
    """Flip one bit of a file, in place; returns which, for the outcome."""
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} of {path.name}"


def spoil(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of a file replaced, removed, doubled or put in; or its end cut off."""
    found = bytearray(data)
    pieces = [
        b"\n",
        b'"',
        b"NaN",
        b"1e999",
        b"\xef\xbb\xbf",
        b"\\ud800",
        b"}{",
        b"\0",
        b"-1",
        b"null",
        b"[]",
        b"9" * 5000,
    ]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(4):
            case 0:
                found[at : at + rng.randrange(4)] = rng.choice(pieces)
            case 1:
                found[at : at + 1] = rng.randbytes(rng.randrange(4))
            case 2:
                found[at:at] = found[at : at + rng.randrange(40)]
            case _:
                del found[at : at + rng.choice([1, 2, 10, len(found)])]
    return bytes(found)
