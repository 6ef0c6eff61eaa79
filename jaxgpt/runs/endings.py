"""How a program ends where nothing is wrong with its code: in one line, not a traceback. Imports next to nothing, so
that this works from the first moment."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO, cast

from jaxgpt.errors import UserError, first_line

UNUSABLE = {  # a file or folder that this user can't use, which is no bug
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, or the terminal, is gone for good


class Stopped(BaseException):
    """The process was asked to stop. `code` is the exit status: 75 after SIGTERM (which launch scripts take as "start
    it again"), 130 after Ctrl-C."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class LostOutput(BrokenPipeError):  # noqa: N818
    """The output can't be written any more."""


STOPS = (KeyboardInterrupt, Stopped, BrokenPipeError)


def tell_next_start(stop: BaseException, words: str) -> None:
    """Have `plain_endings` add to one of STOPS what the same command will do.

    The first words count: the innermost knows best. (Not `add_note`, which JAX uses for its own advice.)"""
    if not hasattr(stop, "next_start"):
        setattr(stop, "next_start", words)  # noqa: B010  exceptions have no such attribute to type


class Siblings(Protocol):
    """The other processes of a run: see `runs.peers`."""

    def settle(self) -> None: ...  # noqa: D102
    def leave(self, status: int, *, together: bool) -> None: ...  # noqa: D102


class Ending:
    """Ends this program. Its `siblings`, if any, are told first; the process then ends at once, since JAX would wait
    for them."""

    def __init__(self) -> None:
        self.siblings: Siblings | None = None

    def end(self, line: str, status: int, *, together: bool = False, at_once: bool = False) -> NoReturn:
        """Print the line on stderr and exit. `together`: all siblings end here."""
        if line:
            _print_error(line)
        if self.siblings is not None:
            self.siblings.leave(status, together=together)
            at_once = True
        if at_once:
            _drop_unread_output()
            os._exit(status)
        sys.exit(status)


@contextlib.contextmanager
def plain_endings(
    suggest: Callable[[UserError], str] = lambda error: "", *, whole_process: bool = False
) -> Iterator[Ending]:
    """End the process with one line on stderr, not a traceback.

    Status 2 after a UserError (followed by what `suggest` returns), for a file that can't be used and for an array that
    doesn't fit in memory, 130 after Ctrl-C, 75 after SIGTERM, 141 when nothing reads the output any more (silently,
    unless a run was stopped; see `go_on_without_output`). `tell_next_start` adds what the same command will do.

    `whole_process`: the process then ends at once after Ctrl-C, while a background thread is alive (what still computes
    when Python shuts down would crash in C++), and without memory (JAX would raise the error again at exit)."""
    _check_output()
    ending = Ending()
    try:
        yield ending
        sys.stdout.flush()
        if ending.siblings is not None or (whole_process and any(one.daemon for one in threading.enumerate())):
            ending.end("", 0, together=True, at_once=True)
    except KeyboardInterrupt as stop:
        ending.end(f"interrupted{_next_start(stop)}", 130, at_once=whole_process)
    except Stopped as stop:
        ending.end(f"stopped: {stop}{_next_start(stop)}", stop.code, together=True)
    except LostOutput as stop:
        if stop.errno not in GONE:
            ending.end(f"error: can't write the output ({stop.strerror}){_next_start(stop)}", 2)
        said = _next_start(stop)
        ending.end(f"stopped: nothing reads the output any more{said}" if said else "", 141)
    except Exception as error:
        if ending.siblings is not None:  # the error may be the consequence of a sibling's death
            ending.siblings.settle()
        line = _in_one_line(error, suggest)
        if line:
            ending.end(line, 2, at_once=whole_process and _is_out_of_memory(error))
        if ending.siblings is None:
            raise
        sys.excepthook(*cast(Any, sys.exc_info()))
        ending.end("", 1)
    finally:
        _drop_unread_output()


def _in_one_line(error: Exception, suggest: Callable[[UserError], str]) -> str:
    """The message for an error that the user can fix; an empty string for a bug."""
    if isinstance(error, UserError):
        return f"error: {error}{suggest(error)}"
    if _is_out_of_memory(error):
        size = re.search(r"(\d+) bytes", str(error))
        what = f"for an array of {int(size[1]) / 1e9:,.1f} GB" if size else f"({first_line(error)})"
        return f"error: not enough memory {what}; use a smaller batch or model, or more devices"
    if not isinstance(error, OSError) or error.filename is None:
        return ""
    from jaxgpt.files import cache_root  # imported only now because it takes a while

    path = Path(os.fsdecode(error.filename))
    in_cache = path.is_relative_to(cache_root())
    if error.errno not in UNUSABLE and not in_cache:
        return ""
    advice = "set JAXGPT_CACHE to a folder that you may write to" if in_cache else "check the path"
    return f"error: can't use {path} ({error.strerror}); {advice}"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, NumPy or XLA (which has no type of its own for it) could not allocate an array."""
    if type(error).__name__ == "JaxRuntimeError":
        return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
    return isinstance(error, MemoryError)


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        print(line, file=sys.stderr, flush=True)


def _next_start(stop: BaseException) -> str:
    words = getattr(stop, "next_start", "")
    return f"; {words}" if words else ""


# ---- the output ----


class _Output:
    """A stream that may become unwritable. If it is `needed`, LostOutput is then raised; otherwise the rest is dropped,
    after `note`, if there is one, on stderr."""

    def __init__(self, stream: TextIO, *, needed: bool) -> None:
        self._stream, self.needed, self.note = stream, needed, ""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self.needed:
            raise LostOutput(error.errno, error.strerror) from None
        note, self.note = self.note, ""
        if note:
            _print_error(note.format(error.strerror))
        if error.errno in GONE:
            self.drop()

    def drop(self) -> None:
        """Discard everything from here on, including what is still buffered."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _check_output() -> None:
    """Raise LostOutput from now on when stdout can't be written; ignore it if stderr can't. A character that a
    terminal's encoding lacks is escaped."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:  # not in tests that capture it
        cast(TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
        sys.stdout = cast(TextIO, _Output(sys.stdout, needed=True))
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = cast(TextIO, _Output(sys.stderr, needed=False))


def go_on_without_output() -> None:
    """From here on, don't stop when the output can't be written (`| head`, a closed terminal, a full disk): a run's
    log.txt has all of it."""
    if isinstance(sys.stdout, _Output):
        sys.stdout.needed = False
        sys.stdout.note = "note: the output can't be written ({}); the run continues, and its log.txt has the rest"


def _drop_unread_output() -> None:
    """Flush the output, or discard it if nothing reads it: Python would print an error at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        if isinstance(sys.stdout, _Output):
            sys.stdout.drop()


def open_closed_streams() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that was closed (`>&-`). Otherwise the next file that is
    opened gets its number, and C libraries would print into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


# ---- signals ----


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


def take_hangup_as_sigterm() -> None:
    """Treat SIGHUP (a closed terminal) like SIGTERM, unless it is ignored (`nohup`)."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _pass_on)


def _pass_on(number: int, frame: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _quit(number: int, frame: Any) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)
