"""Rows that requests take turns in, on TensorRT: one cache and one store of pages for all, decoders over slices."""

from __future__ import annotations

from itertools import chain

import numpy as np

from engines.backend import Image, Step
from engines.trt.decoder import DecoderPart, Desk, TrtDecoder, less_memory, too_long
from engines.trt.engine import DeviceArray, allocate, clear
from plugins.op import ALIGNMENT, power_of_two


class TrtSlots:
    """engines.backend.Slots on TensorRT: every array has a row per slot, all of them in one allocation.

    Steps are recorded for 1, 2, 4, ... rows, and for all: a number between them steps with the next larger one, whose
    further rows write a token behind what they hold. What is made for a number of rows is made when first needed.
    """

    def __init__(self, part: DecoderPart, count: int) -> None:
        """`count`: rows. Raises BackendError when the engine was built for fewer, or there is no memory for them."""
        part.engine.profile(batch=count, steps=1)
        self.length, self._part, self._count = np.zeros(count, np.int64), part, count
        self._begin, self._margins = np.zeros(count, np.int64), np.zeros((count, 2), np.int64)
        g = part.geometry
        shapes = part.cache_shapes(count) | part.image_shapes(count)
        what = f"{count} slots of {g.context} tokens and {g.stored_pages} pages"
        fix = f"open the bundle with fewer slots; or {less_memory(g)}"
        self._arrays = allocate(part.cuda, shapes, what, fix)
        # TensorRT takes aligned addresses alone, and not every row begins at one: a copy of such a row is worked on.
        odd = [name for name, array in self._arrays.items() if array.nbytes // count % ALIGNMENT]
        shapes = {name: ((1, *array.shape[1:]), array.dtype) for name in odd if (array := self._arrays[name])}
        self._stand_ins = allocate(part.cuda, shapes, "rows that begin off alignment", fix) if odd else {}
        self._results = part.results(count)
        with part.queue.timed():  # weight 0 times NaN that lies there would be NaN
            clear(chain(self._arrays.values(), self._stand_ins.values()), part.queue.stream)
        desk = part.desk(1, self._results, None)
        self._rows = [self._decoder(row, row + 1, desk) for row in range(count)]
        self._together: dict[tuple[int, bool], TrtDecoder] = {}  # by number of rows, and whether for single steps

    @property
    def nbytes(self) -> int:
        """See Slots.nbytes."""
        return sum(array.nbytes for array in self._arrays.values())

    def load(self, row: int, image: Image[DeviceArray]) -> None:
        """See Slots.load; of the request before, which may have left what is not finite, nothing stays."""
        stream, source = self._part.queue.stream, {"features": image.features, **image.pages}
        with self._part.queue.timed():
            self.length[row] = 0
            self._begin[row], self._margins[row] = image.begin[0], image.margins[0]
            for name, array in self._of(row).items():
                if name in source:
                    array.copy(source[name], stream)
                else:
                    array.clear(stream)

    def copy(self, source: int, target: int, tokens: int, *, image: bool) -> None:
        """See Slots.copy. What lies behind the tokens comes along, as it is no more work, and is never read."""
        stream, sources = self._part.queue.stream, self._of(source)
        with self._part.queue.timed():
            for name, array in self._of(target).items():
                if image or name in self._part.cache_names:
                    array.copy(sources[name], stream)
            if image:
                self._begin[target], self._margins[target] = self._begin[source], self._margins[source]
            self.length[target] = tokens

    def keep(self, row: int, tokens: int) -> None:
        """See Slots.keep: nothing. A GPU prefills quickly, and its memory is what slots are counted by."""

    def row(self, row: int) -> TrtDecoder:
        """See Slots.row. Nothing it does is recorded: prompts are prefilled in it."""
        return self._rows[row]

    def first(self, rows: int) -> FirstRows:
        """See Slots.first."""
        return FirstRows(self, rows)

    def together(self, rows: int, steps: int) -> TrtDecoder:
        """What `rows` rows take `steps` tokens with: these rows, for single steps perhaps more. Raises BackendError."""
        single, size = steps == 1, rows
        if single:
            size = min(power_of_two(rows), self._count)
            if self.length[rows:size].max(initial=0) == self._part.geometry.context:
                size = rows  # one of the others is full: there is no place that it could write to
        with self._part.queue.turn():
            if (size, single) not in self._together:
                context = self._part.step_context(size) if single else None
                decoder = self._decoder(0, size, self._part.desk(size, self._results, context))
                self._together[size, single] = decoder
            return self._together[size, single]

    def _of(self, row: int) -> dict[str, DeviceArray]:
        return {name: array.rows(row, row + 1) for name, array in self._arrays.items()}

    def _decoder(self, begin: int, end: int, desk: Desk) -> TrtDecoder:
        """A decoder of the rows from `begin` to `end`."""
        arrays, rows = {name: array.rows(begin, end) for name, array in self._arrays.items()}, slice(begin, end)
        odd = {name: each for name, each in self._stand_ins.items() if arrays[name].address % ALIGNMENT}
        cache = {name: arrays.pop(name) for name in self._part.cache_names}
        image = Image(arrays.pop("features"), arrays, self._begin[rows], self._margins[rows])
        return TrtDecoder(self._part, desk, cache, image, length=self.length[rows], stand_ins=odd)


class FirstRows:
    """engines.backend.Decoder for the first rows of slots."""

    def __init__(self, slots: TrtSlots, rows: int) -> None:
        """`rows`: how many."""
        self.length = slots.length[:rows]
        self._slots, self._rows = slots, rows

    @property
    def capacity(self) -> int:
        """See Decoder.capacity."""
        return self._slots.row(0).capacity

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes."""
        return self._rows * self._slots.row(0).nbytes

    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run. Rows that only come along read no pages, and keep their length."""
        rows, steps = ids.shape
        decoder = self._slots.together(rows, steps)
        every = len(decoder.length)
        tokens, budgets, valid = (
            np.zeros((every, steps), np.int64),
            np.zeros(every, np.int64),
            np.zeros(every, np.int64),
        )
        tokens[:rows], budgets[:rows], valid[:rows] = ids, page_budget, steps if lengths is None else lengths
        return decoder.run(tokens, budgets, lengths=valid).rows(slice(rows))

    def enlarged(self, capacity: int) -> FirstRows:
        """See Decoder.enlarged: this decoder, whose capacity is the engine's, or an error."""
        if capacity > self.capacity:
            raise too_long(capacity, self.capacity)
        return self
