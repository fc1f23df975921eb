"""`OrtModel`, the parts of a bundle as sessions of ONNX Runtime, and the decoders that are made of one of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.backend import Image, Opening, Step
from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA
from engines.bundle.mapped import MappedFiles
from engines.bundle.rebuild import rebuild
from engines.bundle.specs import TensorSpec, cache_inputs, in_place, page_inputs
from engines.checks import require_integer
from engines.errors import BackendError, BundleError
from engines.memory import release_freed
from engines.ort.buffers import Buffers
from engines.ort.library import PROVIDER_OPTIONS, failed, import_library, numpy_dtype, onnx_type
from plugins.cores import usable_cores

if TYPE_CHECKING:
    import onnxruntime as ort

# Of MatMulNBits, which int8 and int4 weights become: activations are rounded to int8 in blocks, and multiplied so.
# That is what makes these precisions fast: with float32 products, ONNX Runtime 1.32 takes three times as long for int4
# and a hundred times for int8. What it costs: python -m tests.parity.report.
ACCURACY_LEVEL = 4
MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would start 100,000, or die of it
ROUND = 64  # cache capacities are multiples of this many tokens, so that similar requests reuse freed memory


class OrtModel:
    """engines.backend.Model on ONNX Runtime. Sessions are created once; nothing of a request is kept here."""

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = Opening.threads) -> None:
        """`device`: "cpu" or "cuda". `threads`: see Opening. Raises BackendError when onnxruntime or the device is
        missing, or a graph does not load.
        """
        self.geometry = bundle.manifest.geometry
        self.device = device
        self._ort = import_library()
        self.buffers = Buffers(device)
        self._options = self._ort.SessionOptions()
        self._options.log_severity_level = 3
        # The level above only adds convolution layouts, and crashes ONNX Runtime 1.32 on float16 page graphs.
        self._options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self._options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(ACCURACY_LEVEL))
        threads = require_integer(
            threads, f"threads={threads!r}", 1, MAX_THREADS, none="every core it may use", error=BackendError
        )
        if threads is None and usable_cores() < (os.cpu_count() or 1):  # else it counts the machine's
            threads = usable_cores()
        if threads is not None:
            self._options.intra_op_num_threads = threads
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._mapped = MappedFiles(bundle, [part.weights for part in bundle.manifest.parts.values()])
        for part in bundle.manifest.parts:
            # What runs once per image gives its scratch memory back: at 7B the arena would keep gigabytes of it.
            self._options.enable_cpu_mem_arena = part == "decoder"
            self._sessions[part] = self.part_session(bundle, part)
            release_freed()
        self._mapped.require_mapped()
        described = bundle.manifest.parts["decoder"].graphs[ONNXRUNTIME]
        self._page_specs = [spec for spec in described.inputs if spec.name in page_inputs(self.geometry)]
        self._cache_specs = [spec for spec in described.inputs if spec.name in cache_inputs(self.geometry)]
        self._in_place = in_place(described.outputs)
        self._model_dtype = numpy_dtype(self._sessions["vision"].get_outputs()[0].type)

    def part_session(self, bundle: Bundle, part: str) -> ort.InferenceSession:
        """The session of a part; its graph is the one the manifest describes, or this is a BundleError."""
        described, again = bundle.manifest.parts[part], rebuild(bundle.manifest, bundle.path)
        kind = ONNXRUNTIME_CUDA if self.device == "cuda" and ONNXRUNTIME_CUDA in described.graphs else ONNXRUNTIME
        path, weights = bundle.graph(part, kind), bundle.file(described.weights)
        try:
            session = self.session(path)
        except BackendError as error:
            self._mapped.require_mapped()  # the cause, if it says something
            if weights.resolve().parent in (path.parent.resolve(), path.resolve().parent):
                raise type(error)(error.found, expected=error.expected, fix=error.fix or again) from error
            raise BundleError(
                f"{weights} is a link to {weights.resolve()}, which is not in the folder of {path.name}: ONNX Runtime "
                "reads no weights from elsewhere",
                expected="files of one folder, or links of all of them to one folder",
                fix=f"cp -rL {shlex.quote(str(bundle.path))} OTHER, which copies what links lead to, and open OTHER",
            ) from error
        graph = described.graphs[kind]
        for found, specs in ((session.get_inputs(), graph.inputs), (session.get_outputs(), graph.outputs)):
            there, expected = {(each.name, each.type) for each in found}, {(s.name, onnx_type(s.dtype)) for s in specs}
            if there != expected:
                odd = " ".join(sorted(there ^ expected)[0])
                raise BundleError(
                    f"{path} is not the graph of {part} that the manifest describes: they disagree on {odd}", fix=again
                )
        return session

    def require_unchanged(self) -> None:
        """See Model.require_unchanged: the weights are mapped, not read."""
        self._mapped.require_unchanged()

    def session(self, path: Path) -> ort.InferenceSession:
        """A session of the graph in `path` with this model's device and options; BackendError if it won't start."""
        providers = [(self.buffers.provider, PROVIDER_OPTIONS[self.device])]
        try:
            session = self._ort.InferenceSession(path, self._options, providers=providers)
        except Exception as error:  # onnxruntime raises its own classes and RuntimeError alike
            raise BackendError(f"ONNX Runtime cannot open {path}: {error}") from error
        if session.get_providers()[0] != self.buffers.provider:  # it falls back to the CPU without a word
            raise BackendError(
                f"ONNX Runtime did not start {self.buffers.provider}, only {session.get_providers()}",
                fix="check the CUDA and cuDNN installation, or pass device='cpu'",
            )
        return session

    def vision(self, tiles: np.ndarray) -> ort.OrtValue:
        """See Model.vision."""
        return self._run("vision", {"tiles": self.buffers.of(tiles)})[0]

    def project(self, hires: ort.OrtValue, begin: np.ndarray) -> dict[str, ort.OrtValue]:
        """See Model.project."""
        found = self._run("pages", {"hires_features": hires, "image_begin": self.buffers.of(begin)})
        pages = dict(zip((output.name for output in self._sessions["pages"].get_outputs()), found, strict=True))
        release_freed()
        for spec in self._page_specs:
            if spec.name not in pages:  # lazy: nothing is projected yet
                pages[spec.name] = self._blank(spec, len(begin))
        return pages

    def nbytes(self, array: ort.OrtValue) -> int:
        """See Model.nbytes."""
        return int(array.tensor_size_in_bytes())

    def no_image(self, batch: int) -> Image[ort.OrtValue]:
        """See Model.no_image; one zero buffer serves every layer."""
        g, row = self.geometry, np.zeros(batch, np.int64)
        blank = {(spec.shape, spec.dtype): self._blank(spec, batch) for spec in self._page_specs}
        pages = {spec.name: blank[spec.shape, spec.dtype] for spec in self._page_specs}
        features = self.zeros((batch, g.image_tokens, g.hidden))
        return Image(features, pages, row, np.zeros((batch, 2), np.int64))

    def decoder(self, image: Image[ort.OrtValue], capacity: int) -> OrtDecoder:
        """See Model.decoder."""
        return OrtDecoder(self, self._sessions["decoder"], image, self.rounded(capacity))

    def slots(self, count: int) -> OrtSlots:
        """See Model.slots; on the CPU."""
        if self.device != "cpu":
            raise BackendError(
                f"{count} slots on ONNX Runtime's {self.buffers.provider}",
                expected="one slot: rows are copied in the host's memory",
                fix="leave slots out, or pass device='cpu'",
            )
        return OrtSlots(self, self._sessions["decoder"], count)

    def rounded(self, capacity: int) -> int:
        """The capacity a cache really gets: a multiple of ROUND with room for the image tokens, which the map reads."""
        return -(-max(capacity, self.geometry.image_tokens) // ROUND) * ROUND

    def zeros(self, shape: tuple[int, ...]) -> ort.OrtValue:
        """A zeroed buffer in the dtype the graphs compute in. Zeroed, because weight 0 times stale NaN is NaN."""
        return self.buffers.zeros(shape, self._model_dtype)

    def device_ms(self) -> float:
        """See Model.device_ms: ONNX Runtime does not measure."""
        return 0.0

    def cache(self, batch: int, capacity: int) -> dict[str, ort.OrtValue]:
        """An empty cache for so many rows of `capacity` tokens: what the decoder takes of it, by name."""
        return {spec.name: self._blank(spec, batch, capacity) for spec in self._cache_specs}

    def _blank(self, spec: TensorSpec, batch: int, capacity: int | None = None) -> ort.OrtValue:
        return self.buffers.zeros(spec.of_batch(batch, capacity), spec.dtype)

    def _run(self, part: str, inputs: dict[str, ort.OrtValue]) -> list[ort.OrtValue]:
        session = self._sessions[part]
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, self.device)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise failed(part, error) from error
        binding.synchronize_outputs()
        return list(binding.get_outputs())


class OrtDecoder:
    """engines.backend.Decoder on ONNX Runtime: the cache is bound in place, so that a run writes where it reads."""

    def __init__(
        self,
        model: OrtModel,
        session: ort.InferenceSession,
        image: Image[ort.OrtValue],
        capacity: int,
        *,
        cache: dict[str, ort.OrtValue] | None = None,
        length: np.ndarray | None = None,
    ) -> None:
        """`session`: of the decoder part. `capacity`: tokens of each row, exactly. `cache`, `length`: whose to
        work in; None for its own, empty."""
        self.capacity = capacity
        self.length = np.zeros(len(image.begin), np.int64) if length is None else length
        self._model, self._session, self._image = model, session, image
        g, batch = model.geometry, len(image.begin)
        self._inputs = {
            "features": image.features,
            "image_begin": model.buffers.of(image.begin),
            "margins": model.buffers.of(image.margins),
        }
        self._inputs |= image.pages
        self._cache = model.cache(batch, capacity) if cache is None else cache
        selecting = len(g.selecting_layers)
        empty = model.buffers.empty
        self._outputs = {
            "logits": empty((batch, g.vocab), np.float32),
            "token": empty((batch,), np.int64),
            "pages": empty((batch, selecting, g.pages), np.int64),
            "page_count": empty((batch, selecting), np.int64),
        }
        # Its parts are joined last, when nobody reads `projected` any more; one part alone might not wait.
        self._projected_in_place = g.lazy_pages and len(g.reading_layers) > 1
        if g.lazy_pages and not self._projected_in_place:
            self._outputs["present_projected"] = empty((batch, len(g.reading_layers), g.pages), np.int64)
        self._runs = 0
        self._ids = model.buffers.of(np.zeros((batch, 1), np.int64))
        self._past_length = model.buffers.of(np.zeros(batch, np.int64))
        self._budget = model.buffers.of(np.zeros(batch, np.int64))
        self._step_binding = self._bind(self._ids)

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes."""
        return sum(self._model.nbytes(value) for value in self._cache.values())

    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run; in the host's memory the logits stay, on a GPU they lie there until somebody asks."""
        batch, steps = ids.shape
        if int(self.length.max()) + steps > self.capacity:
            raise BackendError(f"{steps} more tokens", expected=f"at most {self.capacity - self.length.max()} fit")
        self._past_length.update_inplace(self.length)
        self._budget.update_inplace(np.broadcast_to(np.asarray(page_budget, np.int64), (batch,)).copy())
        ids = np.ascontiguousarray(ids, np.int64)
        if steps == 1:
            self._ids.update_inplace(ids)
            binding = self._step_binding
        else:
            value = self._model.buffers.of(ids)  # must outlive the run: the binding alone does not keep it
            binding = self._bind(value)
        self._runs += 1
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise failed("decoder", error) from error
        binding.synchronize_outputs()
        self.length += steps if lengths is None else lengths
        if "present_projected" in self._outputs:
            self._inputs["projected"].update_inplace(self._outputs["present_projected"].numpy())
        token, pages, page_count = (self._outputs[name].numpy().copy() for name in ("token", "pages", "page_count"))
        return Step(self._fetch(), token, pages, page_count)

    def _fetch(self) -> Callable[[], np.ndarray]:
        if self._model.device == "cpu":  # a copy of this size takes microseconds
            logits: np.ndarray = self._outputs["logits"].numpy().copy()
            return lambda: logits
        run = self._runs

        def fetch() -> np.ndarray:
            if self._runs != run:
                raise BackendError("the logits of a step that is over", fix="read them before the next run")
            fetched: np.ndarray = self._outputs["logits"].numpy()
            return fetched

        return fetch

    def enlarged(self, capacity: int) -> OrtDecoder:
        """See Decoder.enlarged; the cache is copied."""
        other, used = self._model.decoder(self._image, capacity), int(self.length.max())
        for name, value in self._cache.items():
            kept = value.numpy()
            cache = np.zeros(other._cache[name].shape(), kept.dtype)
            cache[:, :, :used] = kept[:, :, :used]
            other._cache[name].update_inplace(cache)
        other.length[:] = self.length
        return other

    def _bind(self, ids: ort.OrtValue) -> ort.IOBinding:
        binding = self._session.io_binding()
        named = {"input_ids": ids, "past_length": self._past_length, "page_budget": self._budget}
        named |= self._inputs | self._cache
        for name, value in named.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            binding.bind_ortvalue_output(name, value)
        if self._projected_in_place:
            binding.bind_ortvalue_output("present_projected", named["projected"])
        for name, source in self._model._in_place.items():  # one buffer on both sides: the graph then writes in place
            binding.bind_ortvalue_output(name, named[source])
        return binding


class OrtSlots:
    """engines.backend.Slots on ONNX Runtime's CPU: every array has a row per slot, and decoders are bound to slices.

    The system gives an array its memory as it is written to: slots that are not used take none.
    """

    def __init__(self, model: OrtModel, session: ort.InferenceSession, count: int) -> None:
        """`session`: of the decoder part. `count`: rows."""
        g, self._model, self._session = model.geometry, model, session
        self._capacity = model.rounded(g.context)
        self.length = np.zeros(count, np.int64)
        self._begin, self._margins = np.zeros(count, np.int64), np.zeros((count, 2), np.int64)
        self._features: np.ndarray = np.zeros((count, g.image_tokens, g.hidden), model._model_dtype)
        self._pages = {spec.name: np.zeros(spec.of_batch(count), spec.dtype) for spec in model._page_specs}
        self._cache: dict[str, np.ndarray] = {
            spec.name: np.zeros(spec.of_batch(count, self._capacity), spec.dtype) for spec in model._cache_specs
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
            stores: list[np.ndarray] = [self._begin, self._margins, self._features, *self._pages.values()]
            for store in stores:
                store[target] = store[source]

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
        value = self._model.buffers.of
        image = Image(
            value(self._features[rows]),
            {name: value(store[rows]) for name, store in self._pages.items()},
            self._begin[rows],
            self._margins[rows],
        )
        cache = {name: value(array[rows]) for name, array in self._cache.items()}
        return OrtDecoder(self._model, self._session, image, self._capacity, cache=cache, length=self.length[rows])


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
