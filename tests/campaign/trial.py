"""One trial: a function in a process of its own, and what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engines.errors import FlexError

TYPED, ANSWERED, UNJUDGED, UNTYPED, HUNG, CRASHED, WRONG = KINDS = (
    *("typed", "answered", "unjudged"),
    *("untyped", "hung", "crashed", "wrong"),
)
FAULTS = frozenset({UNTYPED, HUNG, CRASHED, WRONG})
SECONDS = 30.0  # after which a trial hangs
MEMORY = 4 << 30  # bytes of address space that it may take beyond what it was born with


class Wrong(Exception):
    """Something was accepted and came out as what it is not."""


class Unjudged(Exception):
    """Something was accepted, and nobody else can tell whether rightly."""


@dataclass(frozen=True)
class Outcome:
    """kind: one of KINDS. detail: of an error its class and message. seconds: wall time."""

    kind: str
    detail: str
    seconds: float

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS


def trial(run: Callable[[Path], object], seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """What becomes of run(an empty folder) in a forked process, which may take `seconds` and `memory` bytes.

    Forked, so that what crashes, hangs or fills the memory takes nobody along; the parent must not have opened an
    engine, whose threads would stay behind.
    """
    reading, writing = os.pipe()
    folder, started = Path(tempfile.mkdtemp(prefix="trial-")), time.monotonic()
    child = os.fork()
    if not child:
        _be_the_child(run, folder, memory, writing)
    os.close(writing)
    try:
        said, left = b"", seconds
        while left > 0 and select.select([reading], [], [], left)[0]:
            if not (more := os.read(reading, 1 << 16)):
                break
            said += more
            left = seconds - (time.monotonic() - started)
        hung = time.monotonic() - started >= seconds
        if hung:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(reading)
        shutil.rmtree(folder, ignore_errors=True)
    took = time.monotonic() - started
    if hung:
        return Outcome(HUNG, f"no end within {seconds:.0f} s", took)
    if os.WIFSIGNALED(status):
        return Outcome(CRASHED, signal.Signals(os.WTERMSIG(status)).name, took)
    if not said:
        return Outcome(CRASHED, f"ended with status {os.waitstatus_to_exitcode(status)}", took)
    return Outcome(*json.loads(said), took)


def _be_the_child(run: Callable[[Path], object], folder: Path, memory: int, writing: int) -> None:
    try:
        with open(os.devnull, "r+b") as nowhere:
            for descriptor in (0, 1, 2):  # a panic of Rust prints, whoever catches it
                os.dup2(nowhere.fileno(), descriptor)
        with open("/proc/self/statm") as statm:
            born = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (born + memory, born + memory))
        os.chdir(folder)
        kind, detail = _outcome(run, folder)
        os.write(writing, json.dumps((kind, detail[:2000])).encode())
    finally:
        os._exit(0)


def _outcome(run: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    try:
        return ANSWERED, str(run(folder))
    except FlexError as error:
        problem = _unreadable(error)
        return (UNTYPED, problem) if problem else (TYPED, f"{type(error).__name__}: {error}")
    except Wrong as error:
        return WRONG, str(error)
    except Unjudged as error:
        return UNJUDGED, str(error)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" @ {Path(frame.filename).name}:{frame.lineno}" for frame in last)
        with contextlib.suppress(Exception):
            return UNTYPED, f"{type(error).__module__}.{type(error).__name__}: {str(error)[:500]}{where}"
        return UNTYPED, f"{type(error).__name__}{where}"


def _unreadable(error: FlexError) -> str | None:
    """What makes a typed error no error for people: it is long, or cannot be printed."""
    text = str(error)
    if len(text) > 6000:
        return f"{type(error).__name__} of {len(text)} characters: {text[:200]}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{type(error).__name__} that cannot be printed: {text[:200]!r}"
    return None
