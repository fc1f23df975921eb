"""The one stream that a model works in, and whose turn it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engines.cuda import Cuda


class _Spent(threading.local):
    """Milliseconds the device has worked for the calling thread."""

    ms = 0.0


class Queue:
    """Runs of all parts follow each other in one stream, so that they can work in the same memory. Threads take turns:
    what one of them fills for a run, asks for and reads, no other touches meanwhile; between turns the stream is empty.

    stream: for what is asked for inside a turn.
    """

    def __init__(self, cuda: Cuda) -> None:
        """`cuda`: whose stream it is."""
        self.stream = cuda.stream()
        self._cuda, self._events = cuda, (cuda.event(), cuda.event())
        self._lock, self._spent = threading.RLock(), _Spent()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The calling thread's turn on the device, for as long as the block lasts; inside a turn, part of it."""
        with self._lock:
            self._cuda.make_current()
            yield

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A turn that ends when what the block has asked of the stream is done; the device's time is counted."""
        start, end = self._events
        with self.turn():
            start.record(self.stream)
            try:
                yield
            except BaseException:
                self.stream.wait()  # what was asked for before still reads the step's numbers
                raise
            end.record(self.stream)
            end.wait()
            self._spent.ms += end.since(start)

    def spent(self) -> float:
        """Milliseconds the device has worked for the calling thread, since it last asked."""
        spent, self._spent.ms = self._spent.ms, 0.0
        return spent
