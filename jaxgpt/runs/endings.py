"""How a program ends where nothing is wrong with its code: in one line, not a traceback. Imports next to nothing, so
that this works from the first moment."""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from jaxgpt.errors import UserError

UNUSABLE = {  # a file or folder that this user can't use, which is no bug
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


class Stopped(Exception):  # noqa: N818  not an error
    """The process was asked to stop. `code` is the exit status: 75 after SIGTERM (which launch scripts take as "start
    it again"), 130 after Ctrl-C."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


STOPS = (KeyboardInterrupt, Stopped, BrokenPipeError)


def tell_next_start(stop: BaseException, words: str) -> None:
    """Have `plain_endings` add to one of STOPS what the same command will do.

    The first words count: the innermost knows best. (Not `add_note`, which JAX uses for its own advice.)"""
    if not hasattr(stop, "next_start"):
        setattr(stop, "next_start", words)  # noqa: B010  exceptions have no such attribute to type


@contextlib.contextmanager
def plain_endings(
    suggest: Callable[[UserError], str] = lambda error: "", *, whole_process: bool = False
) -> Iterator[None]:
    """End the process with one line on stderr, not a traceback.

    Status 2 after a UserError (followed by what `suggest` returns) or for a file that can't be used, 130 after Ctrl-C,
    75 after SIGTERM, 141 when nothing reads the output any more (silently, unless a run was stopped).
    `tell_next_start` adds what the same command will do.

    `whole_process`: the process then ends at once after Ctrl-C, and while a background thread is alive: what still
    computes when Python shuts down would crash in C++."""
    try:
        yield
        sys.stdout.flush()
        if whole_process and any(thread.daemon for thread in threading.enumerate()):
            _end("", 0, at_once=True)
    except UserError as error:
        _end(f"error: {error}{suggest(error)}", 2)
    except Stopped as stop:
        _end(f"stopped: {stop}{_next_start(stop)}", stop.code)
    except KeyboardInterrupt as stop:
        _end(f"interrupted{_next_start(stop)}", 130, at_once=whole_process)
    except BrokenPipeError as stop:
        if not _drop_unread_output():
            raise
        _end(f"stopped: nothing reads the output any more{_next_start(stop)}" if _next_start(stop) else "", 141)
    except OSError as error:
        from jaxgpt.files import cache_root  # takes longer to import than all above

        if error.filename is None:
            raise
        path = Path(os.fsdecode(error.filename))
        in_cache = path.is_relative_to(cache_root())
        if error.errno not in UNUSABLE and not in_cache:
            raise
        advice = "set JAXGPT_CACHE to a folder that you may write to" if in_cache else "check the path"
        _end(f"error: can't use {path} ({error.strerror}); {advice}", 2)
    finally:
        _drop_unread_output()


def _end(line: str, status: int, *, at_once: bool = False) -> NoReturn:
    if line:
        print(line, file=sys.stderr, flush=True)
    if at_once:
        _drop_unread_output()
        os._exit(status)
    sys.exit(status)


def _next_start(stop: BaseException) -> str:
    words = getattr(stop, "next_start", "")
    return f"; {words}" if words else ""


def _drop_unread_output() -> bool:
    """Whether the program that read stdout has ended (`| head`). What is left is dropped: otherwise Python would
    complain about it at exit."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    try:
        output = sys.stdout.fileno()
    except OSError:  # a test's
        return False
    poll = select.poll()
    poll.register(output, 0)  # reports only errors
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def quit_at_ctrl_c() -> None:
    """Have Ctrl-C end a program with one line and status 130 until `raise_at_ctrl_c`.

    Otherwise it would end in a traceback out of whatever is being imported. `jaxgpt.runs` calls this, and the packages
    of programs import that. Does nothing unless `python -m` is looking up a program."""
    starting = sys.argv[:1] == ["-m"]  # as Python documents
    if starting and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def raise_at_ctrl_c() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, so that `finally` and `with` clean up."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _quit(number: int, frame: Any) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)
