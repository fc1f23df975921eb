"""Images that were asked about, kept encoded for their next question: the latest, up to so many bytes."""

from __future__ import annotations

import hashlib
import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import PIL.Image

from engines.errors import BackendError, OptionError, PromptError
from runtime.engine import Engine
from runtime.image import FORMATS
from runtime.serve.errors import ApiError
from runtime.serve.metrics import Metrics
from runtime.view import ImageView

_log = logging.getLogger(__name__)
_PIXEL = 4  # bytes of a pixel, as Pillow keeps RGB


@dataclass(eq=False)
class _Kept:
    """A view, the bytes it had when its latest user left, how many use it, and whether one of them saw it fail."""

    view: ImageView
    bytes: int = 0
    users: int = 0
    failed: bool = False


class Views:
    """The views of one engine, by the SHA-256 of their image's bytes. Any thread may borrow any of them.

    The bound holds for what is kept; of what is in use, for what the largest view so far tells of the next one's size.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, limit: int, pixels: int) -> None:
        """`limit`: bytes kept at most. `pixels`: of one image, at most."""
        self._engine, self._metrics, self._limit, self._pixels = engine, metrics, limit, pixels
        self._kept: dict[bytes, _Kept] = {}  # the latest is last
        self._largest, self._changing = 0, threading.Lock()

    @contextmanager
    def borrow(self, image: bytes | None) -> Iterator[tuple[ImageView, bool]]:
        """The view of an encoded image, or of none, where a conversation's cache is all there is to keep; and whether
        it was there before. Afterwards the view is kept, if the block ends well; one that was there also when a
        question was refused. ImageError, ApiError (413) for an image that is none or has too many pixels."""
        key = b"" if image is None else hashlib.sha256(image).digest()
        with self._changing:
            entry = self._kept.pop(key, None)
            known = entry is not None
            if image is not None:
                (self._metrics.view_hits if known else self._metrics.view_misses).inc()
            if entry is None:
                entry = self._opened(image)
            entry.users += 1
            self._kept[key] = entry
            self._count()
        try:
            yield entry.view, known and image is not None
        except BaseException as error:
            if not (known and isinstance(error, PromptError | OptionError)):  # a refused question costs no image
                entry.failed = True
            if isinstance(error, MemoryError | BackendError):  # what is kept may be what is missing
                self.close()
            raise
        finally:
            with self._changing:
                self._left(key, entry)

    def close(self) -> None:
        """Free all that nobody uses."""
        with self._changing:
            self._evict(-1)
            self._count()

    def _opened(self, image: bytes | None) -> _Kept:
        self._evict(self._limit - self._largest)
        if image is not None:
            _require_pixels(image, self._pixels)
        return _Kept(self._engine.image(image))

    def _left(self, key: bytes, entry: _Kept) -> None:
        """One user fewer."""
        entry.users -= 1
        entry.bytes = _bytes_of(entry.view)
        self._largest = max(self._largest, entry.bytes)
        large = entry.bytes > self._limit
        if entry.failed or large:  # who asks from now on gets a fresh one
            if self._kept.get(key) is entry:
                del self._kept[key]
            if not entry.users:
                entry.view.close()
        if large and not entry.failed:
            _log.warning("an encoded image of %d bytes is not kept: --view-bytes is %d", entry.bytes, self._limit)
            self._metrics.view_evictions.inc()
        self._evict(self._limit)
        self._count()

    def _evict(self, most: int) -> None:
        """Free the oldest that nobody uses until at most so many bytes are left, or none of them."""
        total = self._total()
        for key, entry in list(self._kept.items()):
            if total <= most:
                break
            if not entry.users:
                del self._kept[key]
                total -= entry.bytes
                entry.view.close()
                self._metrics.view_evictions.inc()

    def _total(self) -> int:
        for entry in self._kept.values():
            if not entry.users:  # slots put something aside for an image after its latest user has left
                entry.bytes = _bytes_of(entry.view)
        return sum(entry.bytes for entry in self._kept.values())

    def _count(self) -> None:
        self._metrics.view_bytes.set(self._total())
        self._metrics.view_entries.set(len(self._kept))


def _bytes_of(view: ImageView) -> int:
    """What a view holds: what is encoded, and the image itself."""
    width, height = view.size or (0, 0)
    return view.nbytes + width * height * _PIXEL


def _require_pixels(image: bytes, most: int) -> None:
    """ApiError (413) for an image that says it has more pixels. What its header cannot tell, reading it will."""
    try:
        with PIL.Image.open(io.BytesIO(image), formats=[known for known in FORMATS if known in PIL.Image.OPEN]) as file:
            width, height = file.size
    except Exception:  # whatever Pillow makes of a damaged header: load_image says it better
        return
    if width * height > most:
        raise ApiError(
            413, f"the image has {width} x {height} pixels; expected at most {most}", code="too_many_pixels",
            fix="shrink it first: the model sees it at its own resolution anyway",
        )  # fmt: skip
