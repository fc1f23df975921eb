"""Which thread asks a device: on the CPU whoever wants something, on CUDA one for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Thread:
    """Does work in the thread that asks for it."""

    def do(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises."""
        return work()


class OneThread(Thread):
    """Does all work in one thread, one piece after the other.

    ONNX Runtime keeps CUDA graphs, and handles of cuBLAS and cuDNN, by the thread that runs a session: another thread
    would record every graph again, and whoever has ended leaves his behind. While a graph is recorded nobody in the
    process may ask CUDA for memory, or the recording fails; and a graph works in the arena's memory as it was when it
    was recorded, which another run at the same time would use, too.
    """

    def __init__(self, name: str) -> None:
        """`name`: of the thread, which starts with the first work."""
        self._name, self._own, self._starting = name, threading.local(), threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def do(self, work: Callable[[], T]) -> T:
        """See Thread.do. Who is interrupted while it waits, by Ctrl-C, waits for the end of the work all the same:
        nothing changes behind the back of whoever goes on."""
        if getattr(self._own, "here", False):
            return work()
        executor = self._started()
        try:
            return executor.submit(self._marked, work).result()
        except BaseException:
            executor.submit(int).result()  # comes after the work
            raise

    def _started(self) -> ThreadPoolExecutor:
        with self._starting:
            if self._executor is None:
                executor = ThreadPoolExecutor(1, self._name)
                executor.submit(int).result()  # interrupted while its thread starts, it would start another one
                self._executor = executor
            return self._executor

    def _marked(self, work: Callable[[], T]) -> T:
        self._own.here = True
        return work()


CUDA = OneThread("onnxruntime-cuda")


def thread_of(device: str) -> Thread:
    """Of "cpu" or "cuda"."""
    return CUDA if device == "cuda" else Thread()
