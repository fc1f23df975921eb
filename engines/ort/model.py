"""`OrtModel`, the parts of a bundle as sessions of ONNX Runtime."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.backend import Image, Opening
from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA
from engines.bundle.manifest import Manifest
from engines.bundle.mapped import MappedFiles
from engines.bundle.precision import PRECISIONS
from engines.bundle.rebuild import rebuild
from engines.bundle.specs import TensorSpec, cache_inputs, in_place, page_inputs
from engines.bundle.tensors import MODEL
from engines.checks import require_integer
from engines.errors import BackendError, BundleError
from engines.memory import release_freed
from engines.ort.buffers import Buffers
from engines.ort.captured import CapturedPart
from engines.ort.decoder import DecoderPart, OrtDecoder
from engines.ort.library import PROVIDER_OPTIONS, captures, failed, import_library, onnx_type
from engines.ort.slots import OrtSlots
from engines.ort.thread import thread_of
from engines.residency import IMAGE_PARTS, SHARED, ImageParts
from plugins.cores import usable_cores

if TYPE_CHECKING:
    import onnxruntime as ort

# Of MatMulNBits, which int8 and int4 weights become: activations are rounded to int8 in blocks, and multiplied so.
# That is what makes these precisions fast: with float32 products, ONNX Runtime 1.32 takes three times as long for int4
# and a hundred times for int8. What it costs: python -m tests.parity.report.
ACCURACY_LEVEL = 4
MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would start 100,000, or die of it

logger = logging.getLogger(__name__)


class OrtModel:
    """engines.backend.Model on ONNX Runtime. The decoder's session is created once, those of the image parts as the
    residency says; nothing of a request is kept here. On CUDA a
    decode step is one CUDA graph, where the bundle and ONNX Runtime let it, and the memory of requests is used again.
    """

    def __init__(
        self, bundle: Bundle, *, device: str = "cpu", threads: int | None = Opening.threads,
        residency: str = Manifest.residency, prefill_chunk: int = Opening.prefill_chunk,
    ) -> None:  # fmt: skip
        """`device`: "cpu" or "cuda". `threads`, `residency`, `prefill_chunk`: see Opening. Raises BackendError when
        onnxruntime or the device is missing, or a graph does not load.
        """
        self.geometry = bundle.manifest.geometry
        self.device = device
        self._ort = import_library()
        self.buffers, self._thread = Buffers(device), thread_of(device)
        self._captures = False  # until there is a session that does
        self._no_images: dict[int, Image[ort.OrtValue]] = {}  # by batch
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
        parts = bundle.manifest.parts
        # What is opened later must be what was checked: not only weights, which are mapped, but graphs, too.
        later = IMAGE_PARTS if residency == SHARED else ()
        graphs = [graph.file for part in later for graph in parts[part].graphs.values()]
        self._mapped = MappedFiles(bundle, [*(part.weights for part in parts.values()), *graphs])
        self._sparing = residency == SHARED and device == "cpu"
        self._images = ImageParts(residency, partial(self._opened, bundle), self._thread.do)
        decoder = self._thread.do(partial(self._opened, bundle, "decoder"))
        release_freed()
        described = parts["decoder"].graphs[ONNXRUNTIME]
        self._page_specs = [spec for spec in described.inputs if spec.name in page_inputs(self.geometry)]
        cache = [spec for spec in described.inputs if spec.name in cache_inputs(self.geometry)]
        dtype = next(np.dtype(spec.dtype).type for spec in described.inputs if spec.name == "features")
        self.part = (CapturedPart if self._captures else DecoderPart)(
            decoder, self.geometry, self.buffers, dtype, cache, in_place(described.outputs),
            self._thread, chunk=prefill_chunk if self._sparing else None,
        )  # fmt: skip

    def _opened(self, bundle: Bundle, part: str) -> ort.InferenceSession:
        """The session of a part, of files that are those which the bundle checked."""
        # What runs once per image gives its scratch memory back: at 7B the arena would keep gigabytes of it.
        self._options.enable_cpu_mem_arena = part == "decoder"
        session = self.part_session(bundle, part)
        self._mapped.require_mapped()
        return session

    def held(self, part: str) -> AbstractContextManager[float]:
        """See Model.held."""
        return self._images.held(part)

    def part_session(self, bundle: Bundle, part: str) -> ort.InferenceSession:
        """The session of a part; its graph is the one the manifest describes, or this is a BundleError."""
        described, again = bundle.manifest.parts[part], rebuild(bundle.manifest, bundle.path)
        kind = ONNXRUNTIME_CUDA if self.device == "cuda" and ONNXRUNTIME_CUDA in described.graphs else ONNXRUNTIME
        path, weights = bundle.graph(part, kind), bundle.file(described.weights)
        # Lazy pages are projected in a branch, and graphs of older bundles have others: CUDA graphs have none.
        capture = part == "decoder" and kind == ONNXRUNTIME_CUDA and not self.geometry.lazy_pages
        try:
            session = self._recording_session(path) if capture else self.session(path, folds=self._folds(bundle, part))
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

    def _folds(self, bundle: Bundle, part: str) -> bool:
        """Whether ONNX Runtime computes what a graph makes of weights alone when it opens it, and keeps it: of a tower
        in 16 bits a copy in float32, 1.2 GB at 7B, and twice that while it is packed. One that is opened for one image
        need not: each weight is made float32 as it is read. Codes are fused into their products by what was folded."""
        precision, options = PRECISIONS[bundle.manifest.precision], bundle.manifest.options
        in_codes = part != "vision" or options.get("vision", MODEL) != MODEL
        return not self._sparing or in_codes or not precision.widened

    def require_unchanged(self) -> None:
        """See Model.require_unchanged: the weights are mapped, not read."""
        self._mapped.require_unchanged()

    def _recording_session(self, path: Path) -> ort.InferenceSession:
        """A session that records CUDA graphs; without, and a warning that says why, where it cannot be had."""
        why_not = captures()
        if why_not is None:
            try:
                session, self._captures = self.session(path, {"enable_cuda_graph": "1"}), True
                return session
            except BackendError as error:
                why_not = str(error)
        session = self.session(path)  # may fail, too: then that was the cause
        logger.warning(f"decode steps run operator by operator, slower, without CUDA graphs: {why_not}")
        return session

    def session(
        self, path: Path, provider_options: Mapping[str, str] | None = None, *, folds: bool = True
    ) -> ort.InferenceSession:
        """A session of the graph in `path` with this model's device and options, and more of its provider's; `folds`:
        constants, for good. BackendError if it won't start."""
        without = {} if folds else {"disabled_optimizers": ["ConstantFolding"]}
        providers = [(self.buffers.provider, {**PROVIDER_OPTIONS[self.device], **(provider_options or {})})]
        try:
            session = self._ort.InferenceSession(path, self._options, providers=providers, **without)
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
        with self.held("vision"):
            return self._thread.do(lambda: self._vision(tiles))

    def _vision(self, tiles: np.ndarray) -> ort.OrtValue:
        g = self.geometry
        features = self.buffers.owned((len(tiles), g.image_tokens, g.hidden), self.part.dtype)
        self._run("vision", {"tiles": self.buffers.of(tiles)}, {"features": features})
        return features

    def project(self, hires: ort.OrtValue, begin: np.ndarray) -> dict[str, ort.OrtValue]:
        """See Model.project."""
        with self.held("pages"):
            return self._thread.do(lambda: self._project(hires, begin))

    def _project(self, hires: ort.OrtValue, begin: np.ndarray) -> dict[str, ort.OrtValue]:
        pages: dict[str, ort.OrtValue] = {}
        if isinstance(self.part, CapturedPart):
            pages = self.part.stores(self._page_specs, len(begin))
        projected = {output.name for output in self._images["pages"].get_outputs()}
        for spec in self._page_specs:
            if spec.name not in pages:  # with lazy pages some are there to be filled later: nothing is projected yet
                make = self.buffers.owned if spec.name in projected else self.buffers.zeros
                pages[spec.name] = make(spec.of_batch(len(begin)), spec.dtype)
        inputs = {"hires_features": hires, "image_begin": self.buffers.of(begin)}
        self._run("pages", inputs, {name: pages[name] for name in projected})
        release_freed()
        return pages

    def nbytes(self, array: ort.OrtValue) -> int:
        """See Model.nbytes."""
        return int(array.tensor_size_in_bytes())

    def no_image(self, batch: int) -> Image[ort.OrtValue]:
        """See Model.no_image; one zero buffer serves every layer."""
        return self._thread.do(lambda: self._no_image(batch))

    def _no_image(self, batch: int) -> Image[ort.OrtValue]:
        if batch in self._no_images:
            return self._no_images[batch]
        g, row = self.geometry, np.zeros(batch, np.int64)
        blank = {(spec.shape, spec.dtype): self._blank(spec, batch) for spec in self._page_specs}
        pages = {spec.name: blank[spec.shape, spec.dtype] for spec in self._page_specs}
        features = self.buffers.zeros((batch, g.image_tokens, g.hidden), self.part.dtype)
        image = Image(features, pages, row, np.zeros((batch, 2), np.int64))
        if isinstance(self.part, CapturedPart):  # its graphs know the addresses
            self._no_images[batch] = image
        return image

    def decoder(self, image: Image[ort.OrtValue], capacity: int) -> OrtDecoder:
        """See Model.decoder."""
        return self._thread.do(lambda: self.part.decoder(image, capacity))

    def slots(self, count: int) -> OrtSlots:
        """See Model.slots; on the CPU."""
        if self.device != "cpu":
            raise BackendError(
                f"{count} slots on ONNX Runtime's {self.buffers.provider}",
                expected="one slot: rows are copied in the host's memory",
                fix="leave slots out, or pass device='cpu'",
            )
        return OrtSlots(self.part, self._page_specs, count)

    def device_ms(self) -> float:
        """See Model.device_ms: ONNX Runtime does not measure."""
        return 0.0

    def _blank(self, spec: TensorSpec, batch: int) -> ort.OrtValue:
        return self.buffers.zeros(spec.of_batch(batch), spec.dtype)

    def _run(self, part: str, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> None:
        """Run a part into memory for its outputs. ONNX Runtime's own would keep the session for as long as it is."""
        session = self._images[part]
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise failed(part, error) from error
        binding.synchronize_outputs()
