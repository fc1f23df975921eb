"""The decoder part on TensorRT: one decode step is one CUDA graph.

Copy the step's numbers to the device, run the engine, copy token and selection back. Everything a step touches is
allocated before it is recorded, the cache is updated in place at its full capacity, and the host waits once, for the
end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from engines.backend import Image, Step
from engines.bundle.geometry import Geometry
from engines.bundle.specs import cache_inputs, in_place, page_inputs, projected_sizes, turnover_sizes
from engines.cuda import Buffer, Cuda, Graph, Shared
from engines.errors import BackendError
from engines.trt.chain import Chain, ChainContext
from engines.trt.engine import DeviceArray, allocate
from engines.trt.queue import Queue
from plugins.op import padded

logger = logging.getLogger(__name__)


class DecoderPart:
    """The decoder's engines, and what all decoders of a model share. captures: until recording a step fails."""

    def __init__(self, engine: Chain, g: Geometry, cuda: Cuda, queue: Queue, scratch: Buffer) -> None:
        """`scratch`: what all runs in `queue` work in."""
        self.engine, self.geometry, self.cuda, self.queue, self.captures = engine, g, cuda, queue, True
        self.in_place = in_place(engine.plan.outputs)
        self.cache_names = cache_inputs(g)
        self._scratch = scratch
        self._prefill: dict[int, ChainContext] = {}  # by profile

    def step_context(self, batch: int) -> ChainContext:
        """A new context for single steps of so many rows; BackendError when the engine was built for fewer."""
        profile = self.engine.profile(batch=batch, steps=1)
        return self.engine.context(profile, self._scratch, self.queue.stream, one_shape=True)

    def prefill_context(self, batch: int, steps: int) -> ChainContext:
        """The context that takes `steps` new tokens; its bindings are whoever used it last's."""
        profile = self.engine.profile(batch=batch, steps=max(2, steps))  # the one of many: it takes a single one, too
        if profile not in self._prefill:
            self._prefill[profile] = self.engine.context(profile, self._scratch, self.queue.stream)
        return self._prefill[profile]

    def cache_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what the decoder takes of the cache."""
        return self._shapes(self.cache_names, batch)

    def image_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what the decoder takes about images: features, and `Image.pages`."""
        return self._shapes(("features", *page_inputs(self.geometry)), batch)

    def _shapes(self, names: Iterable[str], batch: int) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (self.engine.specs[name].of_batch(batch), self.engine.specs[name].dtype) for name in names}

    def cache(self, batch: int) -> dict[str, DeviceArray]:
        """Memory for a cache, not initialised."""
        what = f"the cache of {batch} x {self.geometry.context} tokens"
        return allocate(self.cuda, self.cache_shapes(batch), what, less_memory(self.geometry))

    def results(self, batch: int) -> Results:
        """Memory for what a run leaves on the device."""
        g = self.geometry
        shapes: dict[str, tuple[tuple[int, ...], str]] = {"logits": ((batch, g.vocab), "float32")}
        if g.lazy_pages:
            shapes["present_projected"] = (batch, *projected_sizes(g)), "int64"
        return Results(allocate(self.cuda, shapes, "the logits"))

    def desk(self, batch: int, results: Results, context: ChainContext | None) -> Desk:
        """A desk for so many rows, in `results`, which has as many or more."""
        g, rows = self.geometry, (batch,)
        selecting = batch, len(g.selecting_layers)
        inputs = {"past_length": rows, "page_budget": rows, "image_begin": rows, "margins": (batch, 2)}
        outputs = {"token": rows, "page_count": selecting, "pages": (*selecting, g.pages)}
        outputs |= {} if g.page_slots is None else {"turnover": (batch, *turnover_sizes(g))}
        return Desk(
            context,
            results,
            Block.of(self.cuda, {**inputs, "input_ids": (batch, g.context)}),
            Block.of(self.cuda, outputs),
        )


@dataclass(frozen=True)
class Block:
    """Named int64 arrays side by side in memory that host and device share."""

    memory: Shared
    places: dict[str, tuple[int, tuple[int, ...]]]  # offset, shape

    @classmethod
    def of(cls, cuda: Cuda, shapes: Mapping[str, tuple[int, ...]]) -> Block:
        """A block with arrays of these shapes, zeroed."""
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


@dataclass
class Results:
    """Where a run leaves its logits, and with lazy pages what is projected. runs: of all decoders that work here, so
    that a step knows whether its logits are still there."""

    arrays: dict[str, DeviceArray]  # logits, present_projected
    runs: int = 0


@dataclass(frozen=True)
class Desk:
    """What decoders work with beside cache and image, one at a time. context: for single steps, which are recorded;
    None: these go where all others go, too, and none is recorded."""

    context: ChainContext | None
    results: Results
    inputs: Block
    outputs: Block


class TrtDecoder:
    """engines.backend.Decoder on TensorRT: the cache is bound in place, at the engine's full capacity."""

    def __init__(
        self,
        part: DecoderPart,
        desk: Desk,
        cache: Mapping[str, DeviceArray],
        image: Image[DeviceArray],
        *,
        length: np.ndarray | None = None,
        stand_ins: Mapping[str, DeviceArray] | None = None,
    ) -> None:
        """`cache`: to work in. `length`: of the rows, to be counted on; None for an empty cache. `stand_ins`: aligned
        memory for those arrays of cache and image that are not."""
        self.capacity, batch = part.geometry.context, len(image.begin)
        self.length = np.zeros(batch, np.int64) if length is None else length
        self._part, self._desk, self._cache, self._image = part, desk, cache, image
        self._results = {name: array.rows(0, batch) for name, array in desk.results.arrays.items()}
        self._arrays = {**cache, "features": image.features, **image.pages}
        self._stand_ins = {} if stand_ins is None else stand_ins
        self._graph: Graph | None = None
        self._runs = 0  # of single steps
        if desk.context is not None:
            self._bind(desk.context, 1)

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes."""
        return sum(array.nbytes for array in self._cache.values())

    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run; the logits lie on the device until somebody asks for them."""
        part, desk, (batch, steps) = self._part, self._desk, ids.shape
        if int(self.length.max()) + steps > self.capacity:
            raise BackendError(f"{steps} more tokens", expected=f"at most {self.capacity - self.length.max()} fit")
        with part.queue.turn():
            desk.results.runs += 1
            single = desk.context if steps == 1 else None
            context = single or part.prefill_context(batch, steps)
            if single is None:
                self._bind(context, steps)
            desk.inputs.view("input_ids").reshape(-1)[: batch * steps] = ids.reshape(-1)
            for name, value in (
                ("past_length", self.length),
                ("page_budget", page_budget),
                ("image_begin", self._image.begin),
                ("margins", self._image.margins),
            ):
                desk.inputs.view(name)[:] = value
            try:
                with part.queue.timed():
                    graph = None if single is None else self._recording(single)
                    if graph is None:
                        self._ask(context, steps)
                    else:
                        graph.launch(part.queue.stream)
            except BaseException:
                self._forget_pages()
                raise
            self._runs += single is not None
            self.length += steps if lengths is None else lengths
            told = {name: desk.outputs.view(name).copy() for name in desk.outputs.places}
            return Step(self._logits_of(desk.results.runs), **told)

    def enlarged(self, capacity: int) -> TrtDecoder:
        """See Decoder.enlarged: this decoder, whose capacity is the engine's, or an error."""
        if capacity > self.capacity:
            raise too_long(capacity, self.capacity)
        return self

    def _forget_pages(self) -> None:
        """After a run that failed: slots may hold other pages than the image's table says, which is written last. With
        an empty one all are projected again."""
        if self._part.geometry.page_slots is not None:
            self._image.pages["projected"].clear(self._part.queue.stream)
            self._part.queue.stream.wait()

    def _recording(self, context: ChainContext) -> Graph | None:
        """A single step as one launch; None before there is one. The first step goes to TensorRT as it is, which may
        have to get ready for its shapes and addresses; the second is recorded, and serves all others."""
        part, stream = self._part, self._part.queue.stream
        if self._graph is None and self._runs > 0 and part.captures and context.capturable(stream):
            try:
                self._graph = part.cuda.capture(stream, lambda: self._ask(context, 1))
            except BackendError as error:
                part.captures = False
                logger.warning(f"decode steps run one by one, slower: recording failed: {error}")
        return self._graph

    def _ask(self, context: ChainContext, steps: int) -> None:
        """A run with its copies, as far as they are needed; nothing waits."""
        desk, stream = self._desk, self._part.queue.stream
        ids = desk.inputs.places["input_ids"][0]
        desk.inputs.memory.upload(stream, ids + 8 * len(self.length) * steps)
        for name, stand_in in self._stand_ins.items():
            stand_in.copy(self._arrays[name], stream)
        context.enqueue(stream)
        for name in self._stand_ins.keys() & self._part.in_place.values():
            self._arrays[name].copy(self._stand_ins[name], stream)
        if "projected" in self._image.pages:
            self._image.pages["projected"].copy(self._results["present_projected"], stream)
        desk.outputs.memory.download(stream)

    def _bind(self, context: ChainContext, steps: int) -> None:
        desk, batch = self._desk, len(self.length)
        for name, (_, shape) in desk.inputs.places.items():
            context.bind(name, desk.inputs.address(name), (batch, steps) if name == "input_ids" else shape)
        for name, (_, shape) in desk.outputs.places.items():
            context.bind(name, desk.outputs.address(name), shape)
        arrays = {**self._arrays, **self._results, **self._stand_ins}
        arrays |= {output: arrays[source] for output, source in self._part.in_place.items()}  # one buffer on both sides
        for name, array in arrays.items():
            context.bind(name, array.address, array.shape)

    def _logits_of(self, run: int) -> Callable[[], np.ndarray]:
        def fetch() -> np.ndarray:
            with self._part.queue.turn():
                if self._desk.results.runs != run:
                    raise BackendError("the logits of a step that is over", fix="read them before the next run")
                return self._results["logits"].numpy(self._part.queue.stream)

        return fetch


def less_memory(g: Geometry) -> str:
    """How to need less memory."""
    return f"close what else uses the GPU, or build the bundle again with a smaller --context than {g.context}"


def too_long(capacity: int, context: int) -> BackendError:
    """A cache that the engine does not have."""
    return BackendError(
        f"a cache of {capacity} tokens",
        expected=f"at most the {context} the engine was built for",
        fix="ask for fewer tokens",
    )
