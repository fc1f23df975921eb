"""What a command line shows of a long task: its progress, a bar with the time left where rich is installed, plain lines
where it is not; and what the library logs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_EVERY = 5.0  # seconds between plain lines


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """The block gets a function to call with the part that is done, 0 .. 1. Shown on standard error: what a command
    prints may go to a file."""
    if quiet:
        yield lambda part: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        yield _plain(title)
        return
    columns = TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda part: bar.update(task, completed=part)
        bar.update(task, completed=1.0)


def _plain(title: str) -> Callable[[float], None]:
    started = last = time.monotonic()
    print(title, file=sys.stderr)

    def report(part: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY and part > 0:
            last = now
            left = (now - started) * (1 - part) / part
            print(f"{title}: {100 * part:.0f} %, about {left:.0f} s left", file=sys.stderr)

    return report


def print_log() -> None:
    """From now on, print what `engines` and `plugins` log, from INFO on, as plain lines: for command lines. Libraries
    leave what becomes of their log to the program."""
    for name in ("engines", "plugins"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _Printer) for handler in logger.handlers):
            logger.addHandler(_Printer())


class _Printer(logging.Handler):
    """To standard output, whatever that is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))
