"""Rows that share decode steps on ONNX Runtime's CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engines.backend import Image
from engines.bundle.specs import TensorSpec
from engines.ort.decoder import DecoderPart, OrtDecoder

if TYPE_CHECKING:
    import onnxruntime as ort


class OrtSlots:
    """engines.backend.Slots on ONNX Runtime's CPU: every array has a row per slot, and decoders are bound to slices.

    The system gives an array its memory as it is written to: slots that are not used take none.
    """

    def __init__(self, part: DecoderPart, stores: Sequence[TensorSpec], count: int) -> None:
        """`stores`: what the decoder takes about hi-res pages. `count`: rows."""
        g, self._part = part.geometry, part
        self.length = np.zeros(count, np.int64)
        self._begin, self._margins = np.zeros(count, np.int64), np.zeros((count, 2), np.int64)
        self._features: np.ndarray = np.zeros((count, g.image_tokens, g.hidden), part.dtype)
        self._pages = {spec.name: np.zeros(spec.of_batch(count), spec.dtype) for spec in stores}
        capacity = part.rounded(g.context)
        self._cache: dict[str, np.ndarray] = {
            spec.name: np.zeros(spec.of_batch(count, capacity), spec.dtype) for spec in part.cache_specs
        }
        self._rows = [self._decoder(slice(row, row + 1)) for row in range(count)]
        self._first = [self._decoder(slice(0, rows + 1)) for rows in range(count)]

    @property
    def nbytes(self) -> int:
        """See Slots.nbytes."""
        return sum(array.nbytes for array in (self._features, *self._pages.values(), *self._cache.values()))

    def load(self, row: int, image: Image[ort.OrtValue]) -> None:
        """See Slots.load. What an earlier request left in the cache stays, finite, and is never read."""
        self.length[row] = 0
        self._begin[row], self._margins[row] = image.begin[0], image.margins[0]
        self._features[row] = image.features.numpy()[0]
        for name, store in self._pages.items():
            store[row] = image.pages[name].numpy()[0]

    def copy(self, source: int, target: int, tokens: int, *, image: bool) -> None:
        """See Slots.copy."""
        self.put(target, {name: array[source] for name, array in self._cache.items()}, tokens)
        if image:
            arrays: list[np.ndarray] = [self._begin, self._margins, self._features, *self._pages.values()]
            for array in arrays:
                array[target] = array[source]

    def keep(self, row: int, tokens: int) -> OrtKept | None:
        """See Slots.keep: on the CPU a copy takes far less time than a prefill."""
        try:
            return OrtKept(self, {name: array[row, :, :tokens].copy() for name, array in self._cache.items()})
        except MemoryError:
            return None

    def put(self, row: int, cache: dict[str, np.ndarray], tokens: int) -> None:
        """A cache by name, [Hkv, tokens or more, ...] -> the first tokens of a row, and nothing else."""
        for name, array in cache.items():
            self._cache[name][row, :, :tokens] = array[:, :tokens]
        self.length[row] = tokens

    def row(self, row: int) -> OrtDecoder:
        """See Slots.row."""
        return self._rows[row]

    def first(self, rows: int) -> OrtDecoder:
        """See Slots.first."""
        return self._first[rows - 1]

    def _decoder(self, rows: slice) -> OrtDecoder:
        """A decoder bound to these rows' memory; slices of the first axis are views, and whole."""
        value = self._part.buffers.of
        image = Image(
            value(self._features[rows]),
            {name: value(store[rows]) for name, store in self._pages.items()},
            self._begin[rows],
            self._margins[rows],
        )
        cache = {name: value(array[rows]) for name, array in self._cache.items()}
        return OrtDecoder(self._part, image, self._part.desk(image, cache), length=self.length[rows])


class OrtKept:
    """engines.backend.KeptCache in the host's memory."""

    def __init__(self, slots: OrtSlots, cache: dict[str, np.ndarray]) -> None:
        """`cache`: of a row, by name: [Hkv, tokens, ...]."""
        self._slots, self._cache = slots, cache

    @property
    def nbytes(self) -> int:
        """See KeptCache.nbytes."""
        return sum(array.nbytes for array in self._cache.values())

    def restore(self, row: int, tokens: int) -> None:
        """See KeptCache.restore."""
        self._slots.put(row, self._cache, tokens)
