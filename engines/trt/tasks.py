"""What a build of engines has to do: a job for each engine, part by part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from engines.bundle.folder import Bundle, sha256
from engines.bundle.geometry import Geometry
from engines.bundle.kinds import PARTS, PLUGIN_FREE, TENSORRT, TENSORRT_RTX, TRACED
from engines.bundle.manifest import Profile
from engines.bundle.rebuild import rebuild
from engines.bundle.specs import TensorSpec, plan_io
from engines.cuda import this_gpu
from engines.sizing.builder import builder_bytes
from engines.sizing.needs import Configuration, engine_layers, engines_of
from engines.trt import library as trt
from engines.trt.cut import Piece, cut
from engines.trt.kept import key_of
from engines.trt.options import EngineOptions
from engines.trt.worker import Job

# Of an engine its label, layers, graph, inputs and outputs, and the bytes of its weights.
_Engine = tuple[str, tuple[int, int] | None, Path, tuple[TensorSpec, ...], tuple[TensorSpec, ...], int]


@dataclass(frozen=True)
class Task:
    """An engine to build. label: what files and messages call it. layers: of the part that has several engines, the
    first and the one after the last. needed: bytes of memory that its builder is said to take. key: see key_of."""

    part: str
    label: str
    layers: tuple[int, int] | None
    needed: int
    job: Job
    key: str


def tasks_of(
    bundle: Bundle, name: Path, options: EngineOptions, asked: Configuration, sms: Sequence[int], folder: Path
) -> Iterator[Task]:
    """The engines of a bundle that messages call `name`, in the order they run. asked: what they are for; folder: where
    plans, and the graphs of single engines, are written. Raises BackendError, and OSError."""
    manifest, copied = bundle.manifest, not trt.maps_weights(options.backend)
    again = rebuild(manifest, name, backend=options.backend, engines=asdict(options))
    version = trt.load(options.backend).__version__
    gpu = this_gpu().name if options.backend == TENSORRT else None  # TensorRT-RTX builds without one
    timing = str(timing_cache(options.backend, sms)) if options.timing_cache else None
    for part in PARTS:
        plugins = options.plugins and part == "decoder"
        kernels = manifest.kernels if plugins else None
        graph = bundle.graph(part, PLUGIN_FREE if part == "decoder" and not plugins else TRACED).resolve()
        weights = manifest.files[manifest.parts[part].weights]
        inputs, outputs = plan_io(part, manifest.geometry, bundle.precision)
        engines: list[_Engine] = [(part, None, graph, inputs, outputs, weights.bytes)]
        if (size := engine_layers(asked, part)) is not None:
            traced = None if plugins or part != "decoder" else bundle.graph(part, TRACED).read_bytes()
            whole, g = graph.read_bytes(), manifest.geometry
            pieces = cut(part, whole, str(graph), g, size, inputs, outputs, rebuild=again, traced=traced)
            engines = [*map(partial(_of_piece, folder, part), pieces, (held for _, held in engines_of(asked, part)))]
        for label, layers, file, taken, given, held in engines:
            job = Job(
                backend=options.backend,
                graph=str(file),
                weights=str(graph.parent),
                plan=str(folder / f"{label}.plan"),
                kernels=str(bundle.file(kernels).resolve()) if kernels else None,
                sms=tuple(sms),
                inputs=taken,
                outputs=given,
                profiles=profiles(part, manifest.geometry, options),
                workspace=None if options.workspace is None else options.workspace << 20,
                optimization_level=options.optimization_level,
                timing_cache=timing,
                rebuild=again,
            )
            digests = sha256(file), weights.sha256, manifest.files[kernels].sha256 if kernels else None
            begin, end = layers or (0, manifest.geometry.layers)
            needed = builder_bytes(part, held, layers=end - begin, copied=copied)
            yield Task(part, label, layers, needed, job, key_of(job, version, gpu, *digests))


def _of_piece(folder: Path, part: str, piece: Piece, weights: int) -> _Engine:
    """The engine of a piece of a part, whose graph is written into `folder`."""
    label = f"{part}-{piece.begin}-{piece.end - 1}"
    graph = folder / f"{label}.onnx"
    graph.write_bytes(piece.graph)
    return label, (piece.begin, piece.end), graph, piece.inputs, piece.outputs, weights


def profiles(part: str, g: Geometry, options: EngineOptions) -> tuple[Profile, ...]:
    """The optimisation profiles of a part. TensorRT chooses kernels at the optimum of each; RTX does so when it runs,
    and a second profile would double its engine."""
    rows, tiles = options.batch, g.zoom**2
    batch = 1, 1, rows
    if part == "vision":
        return (Profile("any", {"tiles": (1, tiles, tiles * rows)}),)
    if part == "pages":
        return (Profile("any", {"batch_tiles": (tiles, tiles, tiles * rows), "batch": batch}),)
    if options.backend == TENSORRT_RTX:
        return (Profile("any", {"batch": batch, "steps": (1, 1, g.context)}),)
    usual = min(g.context, g.image_tokens + 64)  # an image and a question
    return (
        Profile("decode", {"batch": batch, "steps": (1, 1, 1)}),
        Profile("prefill", {"batch": batch, "steps": (1, usual, g.context)}),
    )


def timing_cache(backend: str, sms: Sequence[int]) -> Path:
    """The file of kernel timings: one per TensorRT version, and per GPU where the GPU is timed."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    gpu = f"-sm_{sms[0]}" if backend == TENSORRT else ""
    return base / "flexattention" / f"timing-{backend}-{trt.load(backend).__version__}{gpu}.cache"
