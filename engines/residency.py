"""What of a model is in memory: all of it, all the time, or what only images need just while one is encoded."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Generic, TypeVar

from engines.memory import release_freed

ALL, SHARED = "all", "shared"
RESIDENCIES = (ALL, SHARED)
IMAGE_PARTS = ("vision", "pages")  # what runs once per image, of a bundle's parts

P = TypeVar("P")


class ImageParts(Generic[P]):
    """What runs a model's image parts, by name; P is the backend's own. Threads may hold a part at the same time: it is
    opened for the first of them and closed behind the last."""

    def __init__(
        self,
        residency: str,
        open_part: Callable[[str], P],
        do: Callable[[Callable[[], Any]], Any],
        names: Iterable[str] = IMAGE_PARTS,
    ) -> None:
        """`residency`: "all" opens them now, for good; "shared" while somebody holds one. `do`: does the opening and
        closing, when and in the thread that may ask the device. `names`: of what is opened, where that is less than a
        part."""
        self._open_part, self._do, self._stay = open_part, do, residency == ALL
        self._opened: dict[str, P] = {}
        self._holders = Counter[str]()
        self._changing = threading.RLock()
        for name in names if self._stay else ():
            self._open(name)

    def __getitem__(self, name: str) -> P:
        """A part that is open: held, or there for good. A reference must not outlive the holding."""
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        """Names of those that are open."""
        return iter(list(self._opened))

    @contextmanager
    def held(self, name: str) -> Iterator[float]:
        """Keep a part open for the block; gives the milliseconds that opening it took, 0 where it was open. Raises what
        opening does."""
        with self._changing:
            took = 0.0
            if name not in self._opened:
                started = perf_counter()
                self._open(name)
                took = 1000 * (perf_counter() - started)
            self._holders[name] += 1
        try:
            yield took
        finally:
            with self._changing:
                self._holders[name] -= 1
                if not self._stay and not self._holders[name]:
                    self._do(partial(self._close, name))

    def _open(self, name: str) -> None:
        self._opened[name] = self._do(partial(self._open_part, name))
        release_freed()

    def _close(self, name: str) -> None:
        del self._opened[name]
        release_freed()
