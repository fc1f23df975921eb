"""The three parts of a bundle on TensorRT or TensorRT-RTX. numpy and the driver only.

One decode step is one CUDA graph: copy the step's numbers to the device, run the engine, copy token and selection back.
Everything it touches is allocated before it is recorded, the cache is updated in place at its full capacity, and the
host waits once, for the end.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from engines.backend import Image, Step
from engines.bundle.folder import Bundle
from engines.bundle.specs import in_place, page_inputs
from engines.cuda import Buffer, Cuda, Graph, Shared, this_gpu
from engines.errors import BackendError
from engines.trt import library as tensorrt
from engines.trt.engine import Context, DeviceArray, PartEngine, allocate, padded, plans_of
from plugins.tensorrt import register

logger = logging.getLogger(__name__)


class TrtModel:
    """engines.backend.Model on TensorRT. Engines, scratch memory and the buffers of finished requests are kept; nothing
    else of them."""

    def __init__(
        self, bundle: Bundle, backend: str, *, cuda: Cuda | None = None, trt: ModuleType | None = None
    ) -> None:
        """`backend`: "tensorrt" or "tensorrt-rtx". `cuda`, `trt`: to run on something else than this machine's own.

        Raises BundleError when the bundle has no engines for it; BackendError when there is no GPU, no TensorRT, or
        they are others than the engines were built for.
        """
        self.geometry = bundle.manifest.geometry
        plans = plans_of(bundle, backend)
        self.cuda = cuda or this_gpu()
        trt = trt or tensorrt.load(backend)
        if any(plan.plugins for plan in plans.values()):
            register(trt, run=self.cuda.run)
        self._engines = {part: PartEngine(trt, self.cuda, bundle, part, backend, plan) for part, plan in plans.items()}
        self.outputs = plans["decoder"].outputs
        self._model_dtype = bundle.precision.dtype
        self.stream = self.cuda.stream()
        self._events = self.cuda.event(), self.cuda.event()
        # Runs follow each other in one stream, so that all parts can work in the same memory.
        size = padded(max(1, *(engine.scratch for engine in self._engines.values())))
        self._scratch = self.cuda.buffer(size, "the engines' scratch memory", self._smaller())
        self._contexts: dict[tuple[str, int], Context] = {}
        self._desks: dict[int, list[_Desk]] = {}  # by batch: free ones
        self._blank: dict[int, Image[DeviceArray]] = {}
        self._tiles: Shared | None = None
        self._device_ms = 0.0
        self.captures = True  # until recording a step fails

    def vision(self, tiles: np.ndarray) -> DeviceArray:
        """See Model.vision."""
        self.cuda.make_current()
        engine, g, count = self._engines["vision"], self.geometry, len(tiles)
        features = allocate(
            self.cuda, {"features": ((count, g.image_tokens, g.hidden), self._model_dtype)}, "the image's features"
        )["features"]
        most = min(engine.limits("tiles")[1], 1 + g.zoom**2)
        if self._tiles is None:
            self._tiles = self.cuda.shared(most * tiles[0].nbytes, "the pixels of an image")
        pixels = self._tiles
        for start in range(0, count, most):
            part = tiles[start : start + most]
            pixels.view(0, part.shape, np.float32)[:] = part
            context = self._context("vision", engine.profile(tiles=len(part)))
            context.bind("tiles", pixels.address, part.shape)
            at = features.address + start * (features.nbytes // count)
            context.bind("features", at, (len(part), *features.shape[1:]))
            with self.timed():
                pixels.upload(self.stream, part.nbytes)
                context.enqueue(self.stream)
        return features

    def project(self, hires: DeviceArray, begin: np.ndarray) -> dict[str, DeviceArray]:
        """See Model.project."""
        self.cuda.make_current()
        engine, batch = self._engines["pages"], len(begin)
        context = self._context("pages", engine.profile(batch=batch, batch_tiles=hires.shape[0]))
        found = [spec.name for spec in engine.plan.outputs]
        pages = self._pages(batch, "the pages of the image")
        position = self.cuda.shared(begin.nbytes, "the position of the image")
        position.view(0, begin.shape, np.int64)[:] = begin
        context.bind("hires_features", hires.address, hires.shape)
        context.bind("image_begin", position.address, begin.shape)
        for name in found:
            context.bind(name, pages[name].address, pages[name].shape)
        if "projected" in pages:  # lazy: nothing is yet, and what the stores hold is never read
            pages["projected"].clear(self.stream)
        with self.timed():
            position.upload(self.stream)
            context.enqueue(self.stream)
        return pages

    def _pages(self, batch: int, what: str) -> dict[str, DeviceArray]:
        """Memory for `Image.pages`, not initialised."""
        specs, names = self._engines["decoder"].specs, page_inputs(self.geometry)
        shapes = {name: (specs[name].of_batch(batch), specs[name].dtype) for name in names}
        return allocate(self.cuda, shapes, what, self._smaller())

    def nbytes(self, array: DeviceArray) -> int:
        """See Model.nbytes."""
        return array.nbytes

    def no_image(self, batch: int) -> Image[DeviceArray]:
        """See Model.no_image; one zero buffer serves every layer, and every request."""
        if batch not in self._blank:
            self.cuda.make_current()
            specs, names = self._engines["decoder"].specs, ("features", *page_inputs(self.geometry))
            kinds = {name: (specs[name].of_batch(batch), specs[name].dtype) for name in names}
            chosen = {kind: name for name, kind in kinds.items()}
            shapes = {name: kind for kind, name in chosen.items()}
            zeros = allocate(self.cuda, shapes, "a request without an image", self._smaller())
            next(iter(zeros.values())).memory.fill(0, self.stream)  # weight 0 times stale NaN would be NaN
            pages = {name: zeros[chosen[kind]] for name, kind in kinds.items()}
            row = np.zeros(batch, np.int64)
            self._blank[batch] = Image(pages.pop("features"), pages, row, np.zeros((batch, 2), np.int64))
        return self._blank[batch]

    def decoder(self, image: Image[DeviceArray], capacity: int) -> TrtDecoder:
        """See Model.decoder: whatever is asked for, its capacity is the whole context, the one the engine knows."""
        self.cuda.make_current()
        if capacity > self.geometry.context:
            raise BackendError(
                f"a cache of {capacity} tokens",
                expected=f"at most the {self.geometry.context} the engine was built for",
                fix="ask for fewer tokens",
            )
        batch = len(image.begin)
        free = self._desks.setdefault(batch, [])
        desk = free.pop() if free else self._new_desk(batch)
        desk.cache.fill(0, self.stream)  # NaN of an earlier request would outlive it
        return TrtDecoder(self, desk, free, image)

    def require_unchanged(self) -> None:
        """See Model.require_unchanged: engines are read when they are opened, and never again."""

    def device_ms(self) -> float:
        """See Model.device_ms. From the begin to the end of the work, waiting for the host included: in the first two
        steps of an answer that is most of it, as the host prepares and records."""
        spent, self._device_ms = self._device_ms, 0.0
        return spent

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Wait at the end for what the block has asked of the stream, and count the device's time."""
        start, end = self._events
        start.record(self.stream)
        try:
            yield
        except BaseException:
            self.stream.wait()  # what was asked for before still reads the step's numbers
            raise
        end.record(self.stream)
        end.wait()
        self._device_ms += end.since(start)

    def prefill_context(self, batch: int, steps: int) -> Context:
        """The context that takes `steps` new tokens; its bindings are whoever used it last's."""
        return self._context("decoder", self._engines["decoder"].profile(batch=batch, steps=steps), "prefill")

    def _context(self, part: str, profile: int, use: str = "") -> Context:
        key = part + use, profile
        if key not in self._contexts:
            self._contexts[key] = self._engines[part].context(profile, self._scratch, self.stream)
        return self._contexts[key]

    def _new_desk(self, batch: int) -> _Desk:
        engine = self._engines["decoder"]
        profile = engine.profile(batch=batch, steps=1)
        context = engine.context(profile, self._scratch, self.stream, one_shape=True)
        g, dtype = self.geometry, self._model_dtype
        shape = (batch, g.kv_heads, g.context, g.head_dim), dtype
        names = [f"past_{half}.{layer}" for half in ("key", "value") for layer in range(g.layers)]
        what = f"the cache of {batch} x {g.context} tokens"
        cache = allocate(self.cuda, dict.fromkeys(names, shape), what, self._smaller())
        results: dict[str, tuple[tuple[int, ...], str]] = {"logits": ((batch, g.vocab), "float32")}
        if g.lazy_pages:
            results["present_projected"] = (batch, len(g.reading_layers), g.pages), "int64"
        arrays = cache | allocate(self.cuda, results, "the logits")
        rows, selecting = (batch,), (batch, len(g.selecting_layers))
        inputs = _Block.of(
            self.cuda,
            {
                "past_length": rows,
                "page_budget": rows,
                "image_begin": rows,
                "margins": (batch, 2),
                "input_ids": (batch, g.context),
            },
        )
        outputs = _Block.of(self.cuda, {"token": rows, "page_count": selecting, "pages": (*selecting, g.pages)})
        return _Desk(context, next(iter(cache.values())).memory, arrays, inputs, outputs)

    def _smaller(self) -> str:
        now = self.geometry.context
        return f"close what else uses the GPU, or build the bundle again with a smaller --context than {now}"


@dataclass(frozen=True)
class _Block:
    """Named int64 arrays side by side in memory that host and device share."""

    memory: Shared
    places: dict[str, tuple[int, tuple[int, ...]]]  # offset, shape

    @classmethod
    def of(cls, cuda: Cuda, shapes: dict[str, tuple[int, ...]]) -> _Block:
        places, size = {}, 0
        for name, shape in shapes.items():
            places[name] = size, shape
            size += padded(8 * int(np.prod(shape)))
        return cls(cuda.shared(size, "input and output of a step"), places)

    def view(self, name: str) -> np.ndarray:
        """The host's side of an array."""
        offset, shape = self.places[name]
        return self.memory.view(offset, shape, np.int64)

    def address(self, name: str) -> int:
        """The device's side of an array."""
        return self.memory.address + self.places[name][0]


@dataclass(frozen=True)
class _Desk:
    """What one decoder works with, kept for the next one: `context` is for single steps, and its graphs."""

    context: Context
    cache: Buffer
    arrays: dict[str, DeviceArray]  # past_key.0, ... in `cache`; logits; with lazy pages present_projected
    inputs: _Block
    outputs: _Block


class TrtDecoder:
    """engines.backend.Decoder on TensorRT: the cache is bound in place, at the engine's full capacity."""

    def __init__(self, model: TrtModel, desk: _Desk, free: list[_Desk], image: Image[DeviceArray]) -> None:
        """`desk`: what it works with, put back among the `free` ones when the decoder goes."""
        self.capacity = model.geometry.context
        self.length = np.zeros(len(image.begin), np.int64)
        self._model, self._desk, self._image = model, desk, image
        self._graph: Graph | None = None
        self._runs = 0  # of single steps, and
        self._latest = 0  # of all, so that a step knows whether its logits are still there
        desk.inputs.view("image_begin")[:] = image.begin
        desk.inputs.view("margins")[:] = image.margins
        self._bind(desk.context, 1)
        weakref.finalize(self, free.append, desk)

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes."""
        return sum(array.nbytes for name, array in self._desk.arrays.items() if name.startswith("past_"))

    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run; the logits lie on the device until somebody asks for them."""
        model, desk = self._model, self._desk
        batch, steps = ids.shape
        if int(self.length.max()) + steps > self.capacity:
            raise BackendError(f"{steps} more tokens", expected=f"at most {self.capacity - self.length.max()} fit")
        model.cuda.make_current()
        self._latest += 1
        context = desk.context
        if steps > 1:
            context = model.prefill_context(batch, steps)
            self._bind(context, steps)
        desk.inputs.view("input_ids").reshape(-1)[: batch * steps] = ids.reshape(-1)
        desk.inputs.view("past_length")[:] = self.length
        desk.inputs.view("page_budget")[:] = page_budget
        with model.timed():
            graph = self._recording() if steps == 1 else None
            if graph is None:
                self._ask(context, steps)
            else:
                graph.launch(model.stream)
        self._runs += steps == 1
        self.length = self.length + (steps if lengths is None else lengths)
        token, pages, page_count = (desk.outputs.view(name).copy() for name in ("token", "pages", "page_count"))
        return Step(self._logits_of(self._latest), token, pages, page_count)

    def enlarged(self, capacity: int) -> TrtDecoder:
        """See Decoder.enlarged: this decoder, whose capacity is the engine's, or an error."""
        if capacity > self.capacity:
            raise BackendError(
                f"a cache of {capacity} tokens",
                expected=f"at most the {self.capacity} the engine was built for",
                fix="ask for fewer tokens",
            )
        return self

    def _recording(self) -> Graph | None:
        """A single step as one launch; None before there is one. The first step goes to TensorRT as it is, which may
        have to get ready for its shapes and addresses; the second is recorded, and serves all others."""
        model, context = self._model, self._desk.context
        if self._graph is None and self._runs > 0 and model.captures and context.capturable(model.stream):
            try:
                self._graph = model.cuda.capture(model.stream, lambda: self._ask(context, 1))
            except BackendError as error:
                model.captures = False
                logger.warning(f"decode steps run one by one, slower: recording failed: {error}")
        return self._graph

    def _ask(self, context: Context, steps: int) -> None:
        """A run with its copies, as far as they are needed; nothing waits."""
        desk, stream = self._desk, self._model.stream
        ids = desk.inputs.places["input_ids"][0]
        desk.inputs.memory.upload(stream, ids + 8 * len(self.length) * steps)
        context.enqueue(stream)
        if "projected" in self._image.pages:
            self._image.pages["projected"].copy(desk.arrays["present_projected"], stream)
        desk.outputs.memory.download(stream)

    def _bind(self, context: Context, steps: int) -> None:
        desk, image, batch = self._desk, self._image, len(self.length)
        for name, (_, shape) in desk.inputs.places.items():
            context.bind(name, desk.inputs.address(name), (batch, steps) if name == "input_ids" else shape)
        for name, (_, shape) in desk.outputs.places.items():
            context.bind(name, desk.outputs.address(name), shape)
        arrays: dict[str, DeviceArray] = {"features": image.features, **desk.arrays, **image.pages}
        for output, source in in_place(self._model.outputs).items():  # one buffer on both sides
            arrays[output] = arrays[source]
        for name, array in arrays.items():
            context.bind(name, array.address, array.shape)

    def _logits_of(self, run: int) -> Callable[[], np.ndarray]:
        def fetch() -> np.ndarray:
            if self._latest != run:
                raise BackendError("the logits of a step that is over", fix="read them before the decoder's next run")
            model, logits = self._model, self._desk.arrays["logits"]
            model.cuda.make_current()
            return logits.numpy(model.stream)

        return fetch
