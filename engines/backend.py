"""What every backend is, whatever runs the graphs: the protocols `Model` and `Decoder`, and what goes in and out.

`Array` is the backend's own tensor type, resident on its device: what one method gives, another takes, and nobody in
between looks inside. A backend satisfies the protocols by having their methods; engines/open.py opens the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Generic, Protocol, TypeVar

import numpy as np

from engines.bundle.geometry import Geometry
from engines.checks import require_integer, shown
from engines.errors import BackendError
from engines.residency import RESIDENCIES

Array = TypeVar("Array")
MAX_SLOTS, MAX_CHUNK = 256, 1 << 20


@dataclass(frozen=True)
class Opening:
    """What opens a bundle's model, and the defaults.

    backend: one of engines.bundle.kinds.BACKENDS, None = what the bundle was built for. device: "cpu" or "cuda", None =
    "cpu" for ONNX Runtime, "cuda" for TensorRT, which knows no other. threads: of one operator on the CPU, None = every
    core this process may use. slots: requests that share decode steps; 1 = each has steps of its own. prefill_chunk:
    tokens of a prompt in one run, with several slots, between two steps that others wait for, and on ONNX Runtime's CPU
    with the residency "shared", where scratch memory is that of so many. residency: "all", the parts that encode images
    stay in memory; "shared", each is opened for an image, one after the other, and closed before the image's question
    is decoded: a new image costs opening them again, and what follows has their memory. ONNX Runtime's CPU then makes
    no float32 copy of a tower that is stored in 16 bits, and gives a prompt's scratch memory back. None = what the
    bundle was built for.
    """

    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    slots: int = 1
    prefill_chunk: int = 256
    residency: str | None = None

    def __post_init__(self) -> None:
        for name, most in (("slots", MAX_SLOTS), ("prefill_chunk", MAX_CHUNK)):
            value = getattr(self, name)
            checked = require_integer(value, f"{name}={shown(value)}", 1, most, error=BackendError)
            object.__setattr__(self, name, checked)
        if self.residency is not None and self.residency not in RESIDENCIES:
            raise BackendError(f"residency={shown(self.residency)}", expected=f"one of {list(RESIDENCIES)}, or None")


@dataclass(frozen=True, eq=False)
class Image(Generic[Array]):
    """What the decoder needs to know of B images (one per row), resident on the device. Equal to itself alone."""

    features: Array  # [B, T, hidden]
    pages: dict[str, Array]  # what the decoder takes about hi-res pages, by name; lazily projected pages change in it
    begin: np.ndarray  # [B] int64: position of image token 0
    margins: np.ndarray  # [B, 2] int64: rows, columns of the map zeroed at each end
    # Held by a run that may take pages away, of page slots, which a run of another decoder may be reading.
    turn: Lock = field(default_factory=Lock)


@dataclass(frozen=True)
class Step:
    """What one decoder run says about the last token of each row. Arrays are copies.

    `fetch`: gives the logits; where they lie on a device, only until the decoder's next run.
    """

    fetch: Callable[[], np.ndarray]
    token: np.ndarray  # [B] int64: the largest logit
    pages: np.ndarray  # [B, M, pages] int64, best first
    page_count: np.ndarray  # [B, M] int64; the first page_count entries of `pages` are selected
    # [B, R, 2] int64, with page slots alone: how many pages each reading layer let go, and projected for another time.
    turnover: np.ndarray | None = None

    @cached_property
    def logits(self) -> np.ndarray:
        """[B, vocab] float32, fetched when first asked for."""
        return self.fetch()

    def cells(self) -> np.ndarray:
        """The selection as a mask: bool [B, M, pages]."""
        return chosen_pages(self.pages, self.page_count)

    def rows(self, which: slice) -> Step:
        """What it says of these rows; the logits are fetched with those of all."""
        turnover = None if self.turnover is None else self.turnover[which]
        return Step(lambda: self.logits[which], self.token[which], self.pages[which], self.page_count[which], turnover)


def chosen_pages(pages: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The selection as a mask: bool [..., pages], from what a Step says: pages best first, and how many are chosen."""
    mask = np.zeros(pages.shape, bool)
    np.put_along_axis(mask, pages, np.arange(pages.shape[-1]) < count[..., None], axis=-1)
    return mask


class Decoder(Protocol):
    """B requests on their way, one per row: a cache of keys and values, updated in place.

    length: [B] int64, tokens of each row that are valid. Lower it to forget the newest ones: what the cache holds
    beyond is never read, and is overwritten.
    """

    length: np.ndarray

    @property
    def capacity(self) -> int:
        """Tokens a row has room for: what was asked for, or more."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""

    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """Append `ids` [B, S] int64 to the cache (-1-j = image feature j) and return what the last column computes.

        `page_budget` [B] int64 or one number: pages the last column may read; 0, for a prefill, leaves attention plain.
        `lengths` [B] int64: valid ids of each row when rows are padded at their end (then `Step` means nothing).
        The step's logits must be asked for before the next run. Raises BackendError when S more tokens do not fit, or
        the backend fails; `length` is then as it was.
        """

    def enlarged(self, capacity: int) -> Decoder:
        """A decoder with room for `capacity` tokens or more that has seen what this one has. This one must not be used
        afterwards: the other may be the same object. Raises BackendError when there is no such decoder, or no memory.
        """


class KeptCache(Protocol):
    """Keys and values of a row's first tokens, apart from the row."""

    @property
    def nbytes(self) -> int:
        """Bytes they take."""

    def restore(self, row: int, tokens: int) -> None:
        """Put the first so many of the tokens into a row that has their image. Raises BackendError."""


class Slots(Protocol[Array]):
    """Rows of one decoder, side by side: each has room for the whole context and for the pages of one image. They are
    filled one by one and step together, the first so many of them.

    length: [slots] int64, tokens of each row that are valid; the decoders below share it. A row that steps along with
    nothing to say, with a budget of 0, loses only what lies behind its length, once that is put back.
    """

    length: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' caches and pages, whether used or not."""

    def load(self, row: int, image: Image[Array]) -> None:
        """Copy an image, of one row, into a row, whose cache it empties. Raises BackendError."""

    def copy(self, source: int, target: int, tokens: int, *, image: bool) -> None:
        """Copy the first so many tokens of a row's cache into another row, which then has these alone; with `image`,
        the image, too. Raises BackendError."""

    def keep(self, row: int, tokens: int) -> KeptCache | None:
        """A copy of the first so many tokens of a row's cache; None where prefilling them again is the better way."""

    def row(self, row: int) -> Decoder:
        """A row alone: a decoder of a batch of one."""

    def first(self, rows: int) -> Decoder:
        """The first so many rows together."""


class Model(Protocol[Array]):
    """The three parts of a bundle, opened. Nothing of one request is kept for the next."""

    @property
    def geometry(self) -> Geometry:
        """Of the bundle."""

    def held(self, part: str) -> AbstractContextManager[float]:
        """Keep "vision" or "pages" in memory while the block lasts: `vision` or `project` runs in it as often as wanted
        and it is opened once. Gives the milliseconds that this took, 0 where it was open, as it always is with the
        residency "all". Raises BackendError, BundleError."""

    def vision(self, tiles: np.ndarray) -> Array:
        """tiles [N, 3, lowres, lowres] float32 -> projected features [N, T, hidden]. Raises BackendError."""

    def project(self, hires: Array, begin: np.ndarray) -> dict[str, Array]:
        """Features of the hi-res tiles [B * zoom*zoom, T, hidden], row by row, and positions of image token 0, [B]
        int64 -> `Image.pages`; with lazy pages what they are projected from, nothing being projected yet. Raises
        BackendError."""

    def nbytes(self, array: Array) -> int:
        """Bytes an array of this backend takes."""

    def no_image(self, batch: int) -> Image[Array]:
        """Stand-in for `batch` rows without an image: zeros, which nothing reads. Raises BackendError."""

    def decoder(self, image: Image[Array], capacity: int) -> Decoder:
        """A decoder with an empty cache of at least `capacity` tokens, one row per image. Raises BackendError when the
        backend has no cache that large, or memory for none."""

    def slots(self, count: int) -> Slots[Array]:
        """So many rows that requests take turns in. Raises BackendError when the backend has none, or no memory."""

    def require_unchanged(self) -> None:
        """BundleError when a file that the model reads as it runs was written to since it was opened: asked before each
        request, which would be answered wrongly, or not survived."""

    def device_ms(self) -> float:
        """Milliseconds the device has worked, by its own clock, since this was last asked; 0 where nobody measures."""
