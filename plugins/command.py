"""How a command line that can fail ends: an error or an interruption is a message and an exit status."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from plugins.errors import FlexError

INTERRUPTED = 130  # 128 + SIGINT, what a shell says of a command that Ctrl-C ended
CUT_OFF = 141  # 128 + SIGPIPE, what a shell says of a command in `command | head` whose reader has left


def run(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """The exit status of a command: what `main` returns (None is 0), 1 after a FlexError, 130 after Ctrl-C.

    Standard output ends with it: it is flushed here, where a failure can still be told. Nobody reads on (`| head`): 141
    and not a word, as of any Unix tool. It cannot be written (a full disk): an error, 1. It is closed (`>&-`): nobody
    wants to read it, so it is no failure. What its encoding does not have is written as an escape, \\u2605.

    interrupted: what is said after Ctrl-C.
    """
    _prepare()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # for a closed one: print(file=None) would go to the other
        out, err = _Watched(sys.stdout or nowhere, quiet=False), _Watched(sys.stderr or nowhere, quiet=True)
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            return _status(main, interrupted, out)
        finally:
            sys.stdout, sys.stderr = before
            for each in (out, err):
                each.flush_or_discard()


def _status(main: Callable[[], int | None], interrupted: str, out: _Watched) -> int:
    """Of `run`, with standard output watched."""
    status = 0
    try:
        status = main() or 0
    except FlexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:  # argparse, after --help or a wrong option; rich, when its reader has left
        if not isinstance(error.code, int | None):
            raise
        status = error.code or 0
    except OSError as error:
        if error is not out.lost:
            raise  # of something else than standard output: a bug
    with suppress(OSError):
        out.flush()
    return status if out.lost is None else _told(out.lost)


class _Watched:
    """A standard stream that remembers what went wrong when it was written to."""

    def __init__(self, stream: TextIO, quiet: bool) -> None:
        """`quiet`: a failure is nobody's concern."""
        self.stream, self._quiet = stream, quiet
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """As of a file."""
        with self._watched():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of a file."""
        with self._watched():
            self.stream.flush()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error
            if not self._quiet:
                raise

    def flush_or_discard(self) -> None:
        """Let what cannot be written go nowhere: Python flushes once more at the end, and would print a traceback."""
        try:
            self.stream.flush()
        except (OSError, ValueError):  # ValueError: closed
            self.lost = self.lost or OSError(errno.EBADF, "closed")
        if self.lost:
            with suppress(OSError, ValueError):
                target = os.open(os.devnull, os.O_WRONLY)
                os.dup2(target, self.stream.fileno())
                os.close(target)


def _prepare() -> None:
    """Standard streams that take any text, and no file in the place of a closed one: what is opened next would get its
    number, and be written to by who prints to it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # None, or a test's own object, has none
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _told(lost: OSError) -> int:
    """The exit status after standard output was lost, and the message if it is one to tell."""
    if lost.errno == errno.EPIPE:
        return CUT_OFF
    print(f"error: standard output cannot be written: {lost.strerror or lost}", file=sys.stderr)
    return 1
