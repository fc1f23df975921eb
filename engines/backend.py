"""What every backend takes and gives, whatever runs the graphs. `Array` is the backend's own resident tensor type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

Array = TypeVar("Array")


@dataclass(frozen=True)
class Opening:
    """How a bundle is opened, and the defaults.

    backend: one of engines.bundle.kinds.BACKENDS, None = what the bundle was built for. device: "cpu" or "cuda", None =
    "cpu" for ONNX Runtime, "cuda" for TensorRT, which knows no other. threads: of one operator on the CPU, None = every
    core. verify: check the SHA-256 of every file.
    """

    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    verify: bool = True


@dataclass(frozen=True)
class Image(Generic[Array]):
    """What the decoder needs to know of B images (one per row), resident on the device."""

    features: Array  # [B, T, hidden]
    pages: dict[str, Array]  # what the decoder takes about hi-res pages, by name; lazily projected pages change in it
    begin: np.ndarray  # [B] int64: position of image token 0
    margins: np.ndarray  # [B, 2] int64: rows, columns of the map zeroed at each end


@dataclass(frozen=True)
class Step:
    """What one decoder run says about the last token of each row. Arrays are copies.

    `fetch`: gives the logits; where they lie on a device, only until the decoder's next run.
    """

    fetch: Callable[[], np.ndarray]
    token: np.ndarray  # [B] int64: the largest logit
    pages: np.ndarray  # [B, M, pages] int64, best first
    page_count: np.ndarray  # [B, M] int64; the first page_count entries of `pages` are selected

    @cached_property
    def logits(self) -> np.ndarray:
        """[B, vocab] float32, fetched when first asked for."""
        return self.fetch()

    def cells(self) -> np.ndarray:
        """The selection as a mask: bool [B, M, pages]."""
        mask = np.zeros(self.pages.shape, bool)
        chosen = np.arange(self.pages.shape[-1]) < self.page_count[..., None]
        np.put_along_axis(mask, self.pages, chosen, axis=-1)
        return mask
