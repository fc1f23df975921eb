"""The three parts of a bundle on TensorRT or TensorRT-RTX. numpy and the driver only."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import TypeVar

import numpy as np

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.manifest import Manifest
from engines.bundle.mapped import MappedFiles
from engines.cuda import Buffer, Cuda, Shared, Stream, this_gpu
from engines.residency import IMAGE_PARTS, SHARED, ImageParts
from engines.trt import library as tensorrt
from engines.trt.chain import Chain
from engines.trt.decoder import DecoderPart, Desk, TrtDecoder, less_memory, too_long
from engines.trt.engine import Context, DeviceArray, PartEngine, allocate, clear, plans_of
from engines.trt.queue import Queue
from engines.trt.slots import TrtSlots
from plugins.op import padded
from plugins.tensorrt import register

T = TypeVar("T")


@dataclass(eq=False)
class _ImageEngine:
    """An engine of an image part. contexts: by profile, which all work in `scratch`. pixels: what vision reads."""

    engine: PartEngine
    contexts: dict[int, Context] = field(default_factory=dict)
    scratch: Buffer | None = None
    pixels: Shared | None = None


class TrtModel:
    """engines.backend.Model on TensorRT. The decoder's engine, those of the image parts as the residency says, scratch
    memory and the buffers of finished requests are kept; nothing else of them. Threads may ask it at the same time:
    they take turns on the device, run by run."""

    def __init__(
        self, bundle: Bundle, backend: str, *, cuda: Cuda | None = None, trt: ModuleType | None = None,
        residency: str = Manifest.residency,
    ) -> None:  # fmt: skip
        """`backend`: "tensorrt" or "tensorrt-rtx". `cuda`, `trt`: to run on something else than this machine's own.
        `residency`: see Opening.

        Raises BundleError when the bundle has no engines for it; BackendError when there is no GPU, no TensorRT, or
        they are others than the engines were built for.
        """
        self.geometry = bundle.manifest.geometry
        plans = plans_of(bundle, backend)
        self.cuda = cuda or this_gpu()
        trt = trt or tensorrt.load(backend)
        if any(plan.plugins for plan in plans.values()):
            register(trt, run=self.cuda.run, sms=(self.cuda.sm,))
        self._model_dtype = bundle.precision.dtype
        self._queue = Queue(self.cuda)
        # Of the image parts each engine is opened and closed by itself: of the several that may project pages, none
        # needs another.
        engines = {engine.file: (part, engine) for part in IMAGE_PARTS for engine in plans[part].engines}
        self._files = {part: plans[part].used for part in IMAGE_PARTS}
        self._later = MappedFiles(bundle, engines if residency == SHARED else ())  # they must be what was checked

        def opened_for_images(file: str) -> _ImageEngine:
            self._free.clear()  # with "shared" an image has the memory of earlier requests, too,
            self._blank.clear()  # before its own decoder is made
            part, plan = engines[file]
            engine = PartEngine(trt, self.cuda, bundle, part, backend, plan)
            self._later.require_mapped()
            return _ImageEngine(engine)

        self._free: dict[int, list[tuple[Desk, dict[str, DeviceArray]]]] = {}  # by batch: what decoders have left
        self._blank: dict[int, Image[DeviceArray]] = {}
        self._images = ImageParts(residency, opened_for_images, self._in_turn, tuple(engines))
        chain, g = Chain(trt, self.cuda, bundle, "decoder", backend, plans["decoder"]), self.geometry
        # Runs follow each other in one stream, so that all parts can work in the same memory.
        size = padded(max(1, chain.scratch, *(self._images[file].engine.scratch for file in self._images)))
        self._scratch = self.cuda.buffer(size, "the engines' scratch memory", less_memory(g))
        self._decoder = DecoderPart(chain, g, self.cuda, self._queue, self._scratch)

    @property
    def stream(self) -> Stream:
        """What all its work is asked of."""
        return self._queue.stream

    def held(self, part: str) -> AbstractContextManager[float]:
        """See Model.held. What the driver or TensorRT-RTX makes of an engine for this GPU, it makes again each time.

        Of pages that several engines project, none is held: `project` opens one after the other, which leaves no more
        than one in memory, and takes the time."""
        first, *others = self._files[part]
        return nullcontext(0.0) if others else self._images.held(first)

    def vision(self, tiles: np.ndarray) -> DeviceArray:
        """See Model.vision; others have their turns between runs."""
        with self.held("vision"):
            return self._vision(tiles)

    def _vision(self, tiles: np.ndarray) -> DeviceArray:
        (file,) = self._files["vision"]
        opened, g, count = self._images[file], self.geometry, len(tiles)
        shape = (count, g.image_tokens, g.hidden), self._model_dtype
        with self._queue.turn():
            features = allocate(self.cuda, {"features": shape}, "the image's features")["features"]
        most = min(opened.engine.limits("tiles")[1], 1 + g.zoom**2)
        for start in range(0, count, most):
            part = tiles[start : start + most]
            with self._queue.turn():
                if opened.pixels is None:
                    opened.pixels = self.cuda.shared(most * tiles[0].nbytes, "the pixels of an image")
                pixels = opened.pixels
                pixels.view(0, part.shape, np.float32)[:] = part
                context = self._context(opened, opened.engine.profile(tiles=len(part)))
                context.bind("tiles", pixels.address, part.shape)
                place = features.rows(start, start + len(part))
                context.bind("features", place.address, place.shape)
                with self._queue.timed():
                    pixels.upload(self.stream, part.nbytes)
                    context.enqueue(self.stream)
        return features

    def project(self, hires: DeviceArray, begin: np.ndarray) -> dict[str, DeviceArray]:
        """See Model.project. Several engines fill the pages of their layers, one after the other."""
        pages: dict[str, DeviceArray] = {}
        for file in self._files["pages"]:
            with self._images.held(file):
                pages = self._project(self._images[file], hires, begin, pages)
        return pages

    def _project(
        self, opened: _ImageEngine, hires: DeviceArray, begin: np.ndarray, pages: dict[str, DeviceArray]
    ) -> dict[str, DeviceArray]:
        """`pages`: of the image, with what other engines have filled; of the first none, as it was opened before there
        is memory for them."""
        engine, batch = opened.engine, len(begin)
        profile = engine.profile(batch=batch, batch_tiles=hires.shape[0])
        with self._queue.turn():
            context = self._context(opened, profile)
            pages = pages or self._pages(batch)
            position = self.cuda.shared(begin.nbytes, "the position of the image")
            position.view(0, begin.shape, np.int64)[:] = begin
            context.bind("hires_features", hires.address, hires.shape)
            context.bind("image_begin", position.address, begin.shape)
            for spec in engine.plan.outputs:
                context.bind(spec.name, pages[spec.name].address, pages[spec.name].shape)
            with self._queue.timed():
                if "projected" in pages:  # lazy: nothing is yet, and what the stores hold is never read
                    pages["projected"].clear(self.stream)
                position.upload(self.stream)
                context.enqueue(self.stream)
        return pages

    def _pages(self, batch: int) -> dict[str, DeviceArray]:
        """Memory for the pages of so many images, not initialised."""
        shapes = self._decoder.image_shapes(batch)
        del shapes["features"]
        return allocate(self.cuda, shapes, "the pages of the image", less_memory(self.geometry))

    def nbytes(self, array: DeviceArray) -> int:
        """See Model.nbytes."""
        return array.nbytes

    def no_image(self, batch: int) -> Image[DeviceArray]:
        """See Model.no_image; one zero buffer serves every layer, and every request."""
        with self._queue.turn():
            if batch not in self._blank:
                kinds = self._decoder.image_shapes(batch)
                chosen = {kind: name for name, kind in kinds.items()}
                shapes = {name: kind for kind, name in chosen.items()}
                zeros = allocate(self.cuda, shapes, "a request without an image", less_memory(self.geometry))
                with self._queue.timed():
                    clear(zeros.values(), self.stream)  # weight 0 times stale NaN would be NaN
                pages = {name: zeros[chosen[kind]] for name, kind in kinds.items()}
                row = np.zeros(batch, np.int64)
                self._blank[batch] = Image(pages.pop("features"), pages, row, np.zeros((batch, 2), np.int64))
            return self._blank[batch]

    def decoder(self, image: Image[DeviceArray], capacity: int) -> TrtDecoder:
        """See Model.decoder: whatever is asked for, its capacity is the whole context, the one the engine knows."""
        if capacity > self.geometry.context:
            raise too_long(capacity, self.geometry.context)
        part, batch = self._decoder, len(image.begin)
        with self._queue.turn():
            free = self._free.setdefault(batch, [])
            if free:
                desk, cache = free.pop()
            else:
                context = part.step_context(batch)
                desk, cache = part.desk(batch, part.results(batch), context), part.cache(batch)
            with self._queue.timed():
                clear(cache.values(), self.stream)  # NaN of an earlier request would outlive it
            decoder = TrtDecoder(part, desk, cache, image)
        weakref.finalize(decoder, free.append, (desk, cache))  # for the next one
        return decoder

    def slots(self, count: int) -> TrtSlots:
        """See Model.slots: at most the rows that the decoder's engine was built for."""
        with self._queue.turn():
            slots = TrtSlots(self._decoder, count)
            self._queue.spent()  # on zeroing them, which is no answer's
        return slots

    def require_unchanged(self) -> None:
        """See Model.require_unchanged: engines are read when they are opened, and never again while they are; what an
        image will need is looked at."""
        self._later.require_unchanged()

    def device_ms(self) -> float:
        """See Model.device_ms; for the calling thread. From the begin to the end of the work, waiting for the host
        included: in the first two steps of an answer that is most of it, as the host prepares and records."""
        return self._queue.spent()

    def _context(self, part: _ImageEngine, profile: int) -> Context:
        if part.scratch is None:  # the decoder's is its own, whose steps are recorded with its address
            size, what = padded(part.engine.scratch), f"the scratch memory of the {part.engine.part} engine"
            fits = size <= self._scratch.size
            part.scratch = self._scratch if fits else self.cuda.buffer(size, what, less_memory(self.geometry))
        if profile not in part.contexts:
            part.contexts[profile] = part.engine.context(profile, part.scratch, self.stream)
        return part.contexts[profile]

    def _in_turn(self, work: Callable[[], T]) -> T:
        with self._queue.turn():
            return work()
