"""The decoder part on ONNX Runtime: what all decoders of a model share, and one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engines.backend import Image, Step
from engines.bundle.geometry import Geometry
from engines.bundle.specs import TensorSpec, projected_sizes, turnover_sizes
from engines.errors import BackendError
from engines.ort.buffers import Buffers
from engines.ort.library import arena_shrinking, failed
from engines.ort.thread import Thread

if TYPE_CHECKING:
    import onnxruntime as ort

ROUND = 64  # cache capacities are multiples of this many tokens, so that similar requests reuse freed memory


@dataclass(eq=False)
class Desk:
    """What a decoder works with beside the pages of its image. about: features, image_begin and margins, by name.
    cache: by name, [B, Hkv, capacity, ...]. ids: of a single step [B, 1]. results: outputs by name."""

    capacity: int
    about: dict[str, ort.OrtValue]
    cache: dict[str, ort.OrtValue]
    ids: ort.OrtValue
    past_length: ort.OrtValue
    budget: ort.OrtValue
    results: dict[str, ort.OrtValue]

    def arrays(self) -> Iterable[ort.OrtValue]:
        """All of it."""
        yield from (self.ids, self.past_length, self.budget)
        for named in (self.about, self.cache, self.results):
            yield from named.values()


class DecoderPart:
    """The decoder's session, and what all decoders of a model share."""

    def __init__(
        self, session: ort.InferenceSession, g: Geometry, buffers: Buffers, dtype: type, cache: list[TensorSpec],
        in_place: dict[str, str], thread: Thread, *, chunk: int | None = None,
    ) -> None:  # fmt: skip
        """`dtype`: the graph computes in. `cache`: what it takes of one. `in_place`: outputs that take the place of
        inputs. `thread`: that asks the device. `chunk`: tokens of a row in one run at most, whose scratch memory is
        given back behind it; on the CPU alone; None: as many as are asked for, and the arena keeps what they took."""
        self.session, self.geometry, self.buffers, self.dtype = session, g, buffers, dtype
        self.cache_specs, self.in_place, self.thread, self.chunk = cache, in_place, thread, chunk
        self._shrinking = None if chunk is None else arena_shrinking()
        # Its parts are joined last, when nobody reads `projected` any more; one part alone might not wait.
        self.projected_in_place = g.lazy_pages and len(g.reading_layers) > 1

    def run(self, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
        """Run the decoder, and wait for it. Raises BackendError."""
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:  # onnxruntime raises its own classes and RuntimeError alike
            raise failed("decoder", error) from error
        binding.synchronize_outputs()

    def run_many(self, binding: ort.IOBinding) -> None:
        """`run` for several tokens of a row: a prompt's, which takes far more scratch memory than a step."""
        self.run(binding, self._shrinking)

    def rounded(self, capacity: int) -> int:
        """The capacity a cache really gets: a multiple of ROUND with room for the image tokens, which the map reads."""
        return -(-max(capacity, self.geometry.image_tokens) // ROUND) * ROUND

    def decoder(self, image: Image[ort.OrtValue], capacity: int) -> OrtDecoder:
        """See Model.decoder."""
        batch = len(image.begin)
        return OrtDecoder(self, image, self.desk(image, self.cache(batch, self.rounded(capacity))))

    def cache(self, batch: int, capacity: int) -> dict[str, ort.OrtValue]:
        """An empty cache for so many rows of so many tokens. Zeroed, because weight 0 times stale NaN is NaN."""
        zeros = self.buffers.zeros
        return {spec.name: zeros(spec.of_batch(batch, capacity), spec.dtype) for spec in self.cache_specs}

    def desk(self, image: Image[ort.OrtValue], cache: dict[str, ort.OrtValue]) -> Desk:
        """A desk for an image's rows, with the image's own features."""
        batch, of = len(image.begin), self.buffers.of
        about = {"features": image.features, "image_begin": of(image.begin), "margins": of(image.margins)}
        capacity = int(next(iter(cache.values())).shape()[2])
        ids, length, budget = (of(np.zeros(shape, np.int64)) for shape in ((batch, 1), batch, batch))
        return Desk(capacity, about, cache, ids, length, budget, self._results(batch))

    def _results(self, batch: int) -> dict[str, ort.OrtValue]:
        """Memory for the outputs, but for those that take the place of inputs."""
        g, empty = self.geometry, self.buffers.empty
        selecting = len(g.selecting_layers)
        results = {
            "logits": empty((batch, g.vocab), np.float32),
            "token": empty((batch,), np.int64),
            "pages": empty((batch, selecting, g.pages), np.int64),
            "page_count": empty((batch, selecting), np.int64),
        }
        if g.lazy_pages and not self.projected_in_place:
            results["present_projected"] = empty((batch, *projected_sizes(g)), np.int64)
        if g.page_slots is not None:
            results["turnover"] = empty((batch, *turnover_sizes(g)), np.int64)
        return results


class OrtDecoder:
    """engines.backend.Decoder on ONNX Runtime: the cache is bound in place, so that a run writes where it reads."""

    def __init__(
        self, part: DecoderPart, image: Image[ort.OrtValue], desk: Desk, *, length: np.ndarray | None = None
    ) -> None:
        """`desk`: to work at, which holds what is to be known about the image. `length`: of the rows, to be counted on;
        None for an empty cache."""
        self.capacity = desk.capacity
        self.length = np.zeros(len(image.begin), np.int64) if length is None else length
        self._part, self._image, self._desk, self._cache, self._runs = part, image, desk, desk.cache, 0
        self._inputs = desk.about | image.pages
        self._step_binding = self._bind(desk.ids)

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes."""
        return sum(int(value.tensor_size_in_bytes()) for value in self._cache.values())

    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run; in the host's memory the logits stay, on a GPU they lie there until somebody asks."""
        with nullcontext() if self._part.geometry.page_slots is None else self._image.turn:
            return self._part.thread.do(lambda: self._run_in_chunks(ids, page_budget, lengths))

    def _run_in_chunks(self, ids: np.ndarray, page_budget: np.ndarray | int, lengths: np.ndarray | None) -> Step:
        """As `run`. Only the last column reads pages, so those before the last chunk have no use for a budget."""
        steps, before = ids.shape[1], self.length.copy()
        chunk = self._part.chunk or max(steps, 1)
        if int(before.max()) + steps > self.capacity:
            raise BackendError(f"{steps} more tokens", expected=f"at most {self.capacity - before.max()} fit")
        try:
            for begin in range(0, max(steps, 1), chunk):
                valid = None if lengths is None else np.clip(lengths - begin, 0, chunk)
                last = begin + chunk >= steps
                step = self._run(ids[:, begin : begin + chunk], page_budget if last else 0, valid)
            return step
        except BaseException:
            self.length[:] = before
            raise

    def _run(self, ids: np.ndarray, page_budget: np.ndarray | int, lengths: np.ndarray | None) -> Step:
        (batch, steps), desk, results = ids.shape, self._desk, self._desk.results
        desk.past_length.update_inplace(self.length)
        desk.budget.update_inplace(np.broadcast_to(np.asarray(page_budget, np.int64), (batch,)).copy())
        ids = np.ascontiguousarray(ids, np.int64)
        self._runs += 1
        try:
            if steps == 1:
                desk.ids.update_inplace(ids)
                self._step()
            else:
                value = self._part.buffers.of(ids)  # must outlive the run: the binding alone does not keep it
                self._part.run_many(self._bind(value))
            if "present_projected" in results:
                self._inputs["projected"].update_inplace(results["present_projected"].numpy())
        except BaseException:
            self._forget_pages()
            raise
        self.length += steps if lengths is None else lengths
        token, pages, page_count = (results[name].numpy().copy() for name in ("token", "pages", "page_count"))
        turnover = results["turnover"].numpy().copy() if "turnover" in results else None
        return Step(self._fetch(), token, pages, page_count, turnover)

    def _forget_pages(self) -> None:
        """After a run that failed: page slots may hold other pages than the image's table says, which is written
        last. With an empty one all are projected again."""
        if self._part.geometry.page_slots is not None:
            table = self._inputs["projected"]
            table.update_inplace(np.zeros(table.shape(), np.int64))

    def _step(self) -> None:
        """Run a single step, whose inputs are there."""
        self._part.run(self._step_binding)

    def _fetch(self) -> Callable[[], np.ndarray]:
        if self._part.buffers.device == "cpu":  # a copy of this size takes microseconds
            logits: np.ndarray = self._desk.results["logits"].numpy().copy()
            return lambda: logits
        run = self._runs

        def fetch() -> np.ndarray:
            if self._runs != run:
                raise BackendError("the logits of a step that is over", fix="read them before the next run")
            fetched: np.ndarray = self._desk.results["logits"].numpy()
            return fetched

        return lambda: self._part.thread.do(fetch)

    def enlarged(self, capacity: int) -> OrtDecoder:
        """See Decoder.enlarged; the cache is copied."""
        return self._part.thread.do(lambda: self._enlarged(capacity))

    def _enlarged(self, capacity: int) -> OrtDecoder:
        other, used = self._part.decoder(self._image, capacity), int(self.length.max())
        for name, value in self._cache.items():
            kept = value.numpy()
            cache = np.zeros(other._cache[name].shape(), kept.dtype)
            cache[:, :, :used] = kept[:, :, :used]
            other._cache[name].update_inplace(cache)
        other.length[:] = self.length
        return other

    def _bind(self, ids: ort.OrtValue) -> ort.IOBinding:
        part, desk, binding = self._part, self._desk, self._part.session.io_binding()
        named = {"input_ids": ids, "past_length": desk.past_length, "page_budget": desk.budget}
        named |= self._inputs | self._cache
        for name, value in named.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in desk.results.items():
            binding.bind_ortvalue_output(name, value)
        if part.projected_in_place:
            binding.bind_ortvalue_output("present_projected", named["projected"])
        for name, source in part.in_place.items():  # one buffer on both sides: the graph then writes in place
            binding.bind_ortvalue_output(name, named[source])
        return binding
