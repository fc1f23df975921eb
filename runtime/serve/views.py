"""Images that were asked about, kept encoded for their next question: the latest, up to so many bytes."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import PIL.Image

from engines.errors import BackendError
from runtime.engine import Engine
from runtime.image import FORMATS
from runtime.serve.errors import ApiError
from runtime.serve.metrics import Metrics
from runtime.view import ImageView

_log = logging.getLogger(__name__)
_PIXEL = 4  # bytes of a pixel, as Pillow keeps RGB


class Views:
    """The views of one engine, by the SHA-256 of their image's bytes. For one thread.

    The bound holds for what is kept, and for the one in use as far as the largest view so far tells its size.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, limit: int, pixels: int) -> None:
        """`limit`: bytes kept at most. `pixels`: of one image, at most."""
        self._engine, self._metrics, self._limit, self._pixels = engine, metrics, limit, pixels
        self._kept: dict[bytes, tuple[ImageView, int]] = {}  # with its bytes; the latest is last
        self._total = self._largest = 0

    @contextmanager
    def borrow(self, image: bytes | None) -> Iterator[tuple[ImageView, bool]]:
        """The view of an encoded image, or of none, where a conversation's cache is all there is to keep; and whether
        the image was encoded before. Afterwards the view is kept, if the block ends well. ImageError, ApiError (413)
        for an image that is none or has too many pixels."""
        key = b"" if image is None else hashlib.sha256(image).digest()
        kept = key in self._kept
        if image is not None:
            (self._metrics.view_hits if kept else self._metrics.view_misses).inc()
        if kept:
            view, size = self._kept.pop(key)
            self._total -= size
        else:
            self._evict(self._limit - self._largest)
            if image is not None:
                _require_pixels(image, self._pixels)
            view = self._engine.image(image)
        try:
            yield view, kept and image is not None
        except BaseException as error:
            view.close()
            if isinstance(error, MemoryError | BackendError):  # what is kept may be what is missing
                self._evict(-1)
            self._count()
            raise
        self._keep(key, view)

    def close(self) -> None:
        """Free all."""
        self._evict(-1)
        self._count()

    def _keep(self, key: bytes, view: ImageView) -> None:
        size = _bytes_of(view)
        self._largest = max(self._largest, size)
        if size > self._limit:
            _log.warning("an encoded image of %d bytes is not kept: --view-bytes is %d", size, self._limit)
            view.close()
            self._metrics.view_evictions.inc()
        else:
            self._evict(self._limit - size)
            self._kept[key] = view, size
            self._total += size
        self._count()

    def _evict(self, most: int) -> None:
        """Free the oldest until at most so many bytes are left, or none."""
        while self._kept and self._total > most:
            view, size = self._kept.pop(next(iter(self._kept)))
            view.close()
            self._total -= size
            self._metrics.view_evictions.inc()

    def _count(self) -> None:
        self._metrics.view_bytes.set(self._total)
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
