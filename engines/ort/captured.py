"""Decode steps of ONNX Runtime's CUDA provider as CUDA graphs: one launch instead of one for each operator.

ONNX Runtime records a run that has a new `gpu_graph_id`: it runs it twice, so that its arena has all the memory, once
more under the recorder, and launches what was recorded. Whoever asks for that id again gets the graph launched, which
reads and writes the addresses it was recorded with, whatever is bound. A graph lives as long as its session. So
everything a step touches stays where it is: decoders are lent desks, which come back when the decoder is dropped, and
images the stores of their pages; a graph belongs to a desk and the addresses of such stores. That a step is run three
times at first does no harm: it writes the same rows of the cache each time.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from engines.backend import Image
from engines.bundle.geometry import Geometry
from engines.bundle.specs import TensorSpec
from engines.errors import BackendError
from engines.ort.buffers import Buffers
from engines.ort.decoder import DecoderPart, Desk, OrtDecoder
from engines.ort.library import run_options
from engines.ort.thread import Thread

if TYPE_CHECKING:
    import onnxruntime as ort

logger = logging.getLogger(__name__)

T = TypeVar("T")
Addresses = tuple[int, ...]
GRAPH_ID = "gpu_graph_id"  # of a run; -1: neither recorded nor launched
MOST_GRAPHS = 256  # of a session: each takes memory, nobody has measured how much, and gives none back before its end


class Stores(dict[str, "ort.OrtValue"]):
    """The stores of an image's pages by name, lent until this is dropped."""


class CapturedPart(DecoderPart):
    """A decoder part whose single steps are recorded. captures: until that fails.

    What nobody uses is kept for the next of its size, so there are as many desks and stores as were in use at once; it
    is given up when the device has no room for more.
    """

    def __init__(
        self, session: ort.InferenceSession, g: Geometry, buffers: Buffers, dtype: type, cache: list[TensorSpec],
        in_place: dict[str, str], thread: Thread, *, chunk: int | None = None,
    ) -> None:  # fmt: skip
        """See DecoderPart. `session`: records."""
        super().__init__(session, g, buffers, dtype, cache, in_place, thread, chunk=chunk)
        self.captures = True
        self.unrecorded = run_options({GRAPH_ID: "-1"})
        self._recorded = 0  # graphs
        self._graphs: WeakKeyDictionary[Desk, dict[Addresses, ort.RunOptions]] = WeakKeyDictionary()
        self._desks: dict[tuple[int, int], list[Desk]] = {}  # free ones, by batch and capacity
        self._stores: dict[int, list[dict[str, ort.OrtValue]]] = {}  # free ones, by batch

    def rounded(self, capacity: int) -> int:
        """As of DecoderPart, then up to a power of two, but not above the context: few sizes, of few graphs each."""
        least = super().rounded(capacity)
        return max(least, min(1 << (least - 1).bit_length(), super().rounded(self.geometry.context)))

    def decoder(self, image: Image[ort.OrtValue], capacity: int) -> CapturedDecoder:
        """See Model.decoder. Its cache is zeroed: NaN of an earlier request would outlive it."""
        size = len(image.begin), self.rounded(capacity)
        free, pages = self._desks.setdefault(size, []), _addresses(image.pages)
        if free:  # rather one that was recorded with these pages
            desk = next((desk for desk in reversed(free) if pages in self._graphs.get(desk, ())), free[-1])
            free.remove(desk)
            for value in desk.cache.values():
                self.buffers.clear(value)
        else:
            desk = self._or_else(lambda: self._new_desk(image, size[1]))
        self.buffers.copy(image.features, desk.about["features"])
        desk.about["image_begin"].update_inplace(image.begin)
        desk.about["margins"].update_inplace(image.margins)
        decoder = CapturedDecoder(self, image, desk)
        _when_dropped(decoder, free.append, desk)
        return decoder

    def stores(self, specs: list[TensorSpec], batch: int) -> Stores:
        """Stores for the pages of so many images, not initialised."""
        free = self._stores.setdefault(batch, [])
        if free:
            stores = free.pop()
        else:
            empty = self.buffers.empty
            stores = self._or_else(lambda: {spec.name: empty(spec.of_batch(batch), spec.dtype) for spec in specs})
        lent = Stores(stores)
        _when_dropped(lent, free.append, stores)
        return lent

    def single_step(self, desk: Desk, pages: Addresses) -> ort.RunOptions:
        """The options of a single step's run at a desk, with the stores of pages at these addresses."""
        graphs = self._graphs.setdefault(desk, {})
        if not self.captures or (pages not in graphs and self._recorded == MOST_GRAPHS):
            return self.unrecorded
        if pages not in graphs:
            self._recorded += 1
            graphs[pages] = run_options({GRAPH_ID: str(self._recorded)})  # 0 is ONNX Runtime's own
            if self._recorded == MOST_GRAPHS:
                logger.warning(f"{MOST_GRAPHS} CUDA graphs are recorded: decode steps in other memory run without")
        return graphs[pages]

    def run(self, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
        """See DecoderPart.run; without options nothing is recorded."""
        super().run(binding, options or self.unrecorded)

    def give_up(self, error: BackendError) -> None:
        """Record and launch no graph any more, and say why."""
        self.captures = False
        logger.warning(f"decode steps run operator by operator, slower, without CUDA graphs: {error}")

    def _new_desk(self, image: Image[ort.OrtValue], capacity: int) -> Desk:
        desk = self.desk(image, self.cache(len(image.begin), capacity))
        desk.about["features"] = self.buffers.empty(tuple(image.features.shape()), self.dtype)
        return desk

    def _or_else(self, make: Callable[[], T]) -> T:
        """What `make` returns; where the device has no room for it, what nobody uses makes some."""
        try:
            return make()
        except BackendError:
            if not any(self._desks.values()) and not any(self._stores.values()):
                raise
            for desks in self._desks.values():
                desks.clear()
            for stores in self._stores.values():
                stores.clear()
        return make()


class CapturedDecoder(OrtDecoder):
    """A decoder at a desk that is lent; its single steps are graphs."""

    _part: CapturedPart

    def __init__(self, part: CapturedPart, image: Image[ort.OrtValue], desk: Desk) -> None:
        """See OrtDecoder; the desk holds what is to be known about the image."""
        super().__init__(part, image, desk)
        self._pages = _addresses(image.pages)

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes: of all that is kept for it."""
        return sum(int(value.tensor_size_in_bytes()) for value in self._desk.arrays())

    def _step(self) -> None:
        part, options = self._part, self._part.single_step(self._desk, self._pages)
        try:
            part.run(self._step_binding, options)
        except BackendError as error:
            if options is part.unrecorded:
                raise
            part.run(self._step_binding)  # from the start: rows of the cache that were written are written again
            part.give_up(error)


def _addresses(pages: Mapping[str, ort.OrtValue]) -> Addresses:
    return tuple(pages[name].data_ptr() for name in sorted(pages))


def _when_dropped(lent: object, give_back: Callable[[T], None], what: T) -> None:
    weakref.finalize(lent, give_back, what).atexit = False
