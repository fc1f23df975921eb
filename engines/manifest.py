"""`bundle.json`: everything a runtime must know about a bundle before it opens a single graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from engines.geometry import Geometry
from engines.pages import page_size

FORMAT = 3  # raised when an older reader would misread the bundle
PARTS = ("vision", "pages", "decoder")
# Kinds of graphs: with bare flex:: nodes (which TensorRT reads with this project's plugins), for ONNX Runtime, and for
# TensorRT without plugins.
TRACED, ONNXRUNTIME, PLUGIN_FREE = "traced", "onnxruntime", "plugin-free"
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
BACKENDS = (ONNXRUNTIME, TENSORRT, TENSORRT_RTX)
# Name on the command line -> dtype of what is not quantised: of activations, and of the other weights.
PRECISIONS = {
    "fp16": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "int8": "float16",
    "int4": "float16",
    "fp8": "float16",
}
BITS = {"int8": 8, "int4": 4, "fp8": 8}  # of the decoder's linear weights, in these precisions; fp8 is E4M3
BLOCK_SIZES = (16, 32, 64, 128)  # values along K that share a scale; 16 is for small models only it divides
COLUMN = 0  # as a block size: one scale for each output column, whatever K is
# Block sizes of each precision. int4 with one scale for a column would lose too much; fp8 in blocks, like int8 in
# blocks, TensorRT-RTX 1.7 unpacks in every step.
BLOCKS = {"int8": (*BLOCK_SIZES, COLUMN), "int4": BLOCK_SIZES, "fp8": (COLUMN,)}
# The CPU has no bfloat16 arithmetic, and float16 is no faster there than float32: graphs for ONNX Runtime then widen.
WIDENED = ("bf16", *BITS)


def block_name(size: int) -> str:
    """A block size as the command line has it: "128", "column"."""
    return "column" if size == COLUMN else str(size)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    `shape` mixes sizes and symbols: batch, steps (new tokens), capacity (cache slots), tiles, batch_tiles (zoom*zoom
    for each batch row). `dtype` is a numpy-style name, or "model": the precision the bundle was built with.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def kinds(part: str, g: Geometry) -> tuple[str, ...]:
    """The kinds of graphs a bundle holds of a part.

    The vision and pages parts hold no flex:: nodes: their traced graphs need no plugins anyway. Which pages are new is
    known to plugins alone.
    """
    plugin_free = part == "decoder" and not g.lazy_pages
    return (TRACED, ONNXRUNTIME, PLUGIN_FREE) if plugin_free else (TRACED, ONNXRUNTIME)


@dataclass(frozen=True)
class Graph:
    """An .onnx file and what it takes and gives."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: (min, opt, max) of each symbol in the shapes of a plan's inputs."""

    name: str
    sizes: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Plan:
    """A TensorRT engine: what it takes and gives, and where it runs."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    plugins: bool  # needs this project's plugins, which the plan carries the kernels of
    tensorrt: str  # version of the builder; no other version opens the plan
    cuda: str  # version that the builder was made for
    sms: tuple[int, ...]  # compute capabilities it runs on; 86 is 8.6
    kernels: str | None  # SHA-256 of the bundle's kernels it was built with; None without plugins


@dataclass(frozen=True)
class Part:
    """One part of the model: `graphs` by kind, all over the same weights, and TensorRT engines by backend."""

    weights: str
    graphs: dict[str, Graph]
    plans: dict[str, Plan]


def is_template(text: str) -> bool:
    """Whether a prompt template holds "<image>" and "{prompt}", each once."""
    return text.count("<image>") == 1 and text.count("{prompt}") == 1


@dataclass(frozen=True)
class Prompt:
    """How a question becomes token ids. `template`: see is_template."""

    template: str
    tokenizer: str | None  # file in the bundle; None: the bundle takes raw token ids only
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class File:
    """Size and SHA-256 (hex) of a file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `bundle.json`."""

    format: int
    name: str
    precision: str  # key of PRECISIONS
    page_budget: int  # pages each layer may read at most, unless a request asks for fewer
    geometry: Geometry
    prompt: Prompt
    parts: dict[str, Part]
    backend: str  # one of BACKENDS: what opens the bundle unless another is asked for
    kernels: str | None  # file of the compiled kernels of the plugins
    files: dict[str, File]
    versions: dict[str, str]  # of this project and of what wrote the graphs
    source: dict[str, object]  # identity of the checkpoint
    options: dict[str, object]  # the build's knobs, as used
    dropped: dict[str, str]  # tensors of the checkpoint that are not in the bundle, and why
    scales: str | None = None  # file of the scales folded into the weights (export/folding.py); None: not calibrated
    block_size: int | None = None  # one of BLOCKS in the precisions in BITS, else None


def vision_io(g: Geometry) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Vision encoder + projector: tiles of pixels -> features."""
    tiles = TensorSpec("tiles", "float32", ("tiles", 3, g.lowres, g.lowres))
    return [tiles], [TensorSpec("features", "model", ("tiles", g.image_tokens, g.hidden))]


def pages_io(g: Geometry) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Features of the hi-res tiles -> K/V pages of every reading layer; with lazy pages, what projects them."""
    inputs = [
        TensorSpec("hires_features", "model", ("batch_tiles", g.image_tokens, g.hidden)),
        TensorSpec("image_begin", "int64", ("batch",)),
    ]
    outputs = _page_sources(g) if g.lazy_pages else _pages("page_key", g) + _pages("page_value", g)
    return inputs, outputs


def decoder_io(g: Geometry) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Decoder, for prefill and decode step alike; meaning of each tensor: export/model.py `Decoder.forward`."""
    inputs = [
        TensorSpec("input_ids", "int64", ("batch", "steps")),
        TensorSpec("past_length", "int64", ("batch",)),
        TensorSpec("features", "model", ("batch", g.image_tokens, g.hidden)),
        TensorSpec("image_begin", "int64", ("batch",)),
        TensorSpec("margins", "int64", ("batch", 2)),
        TensorSpec("page_budget", "int64", ("batch",)),
    ]
    inputs += _cache("past_key", g) + _cache("past_value", g) + _pages("page_key", g) + _pages("page_value", g)
    selecting = len(g.selecting_layers)
    lazy: list[TensorSpec] = []
    if g.lazy_pages:
        done = "int64", ("batch", len(g.reading_layers), g.pages)
        inputs += [*_page_sources(g), TensorSpec("projected", *done)]
        lazy = _pages("present_page_key", g) + _pages("present_page_value", g)
        lazy.append(TensorSpec("present_projected", *done))
    outputs = [
        TensorSpec("logits", "float32", ("batch", g.vocab)),
        TensorSpec("token", "int64", ("batch",)),
        TensorSpec("pages", "int64", ("batch", selecting, g.pages)),
        TensorSpec("page_count", "int64", ("batch", selecting)),
    ]
    return inputs, outputs + _cache("present_key", g) + _cache("present_value", g) + lazy


def in_place(outputs: Iterable[TensorSpec]) -> dict[str, str]:
    """Outputs of a decoder that share the buffer of an input, and that input: the cache, and lazily projected pages."""
    prefixes = {"present_key": "past_key", "present_value": "past_value"}
    stores = "page_key", "page_value", "page_key_scale", "page_value_scale"
    prefixes |= {f"present_{store}": store for store in stores}
    split = ((spec.name, *spec.name.partition(".")) for spec in outputs)
    return {name: f"{prefixes[prefix]}.{layer}" for name, prefix, _, layer in split if prefix in prefixes}


def page_inputs(g: Geometry) -> tuple[str, ...]:
    """Names of what a decoder takes about the hi-res pages of an image."""
    stores = tuple(spec.name for spec in _pages("page_key", g) + _pages("page_value", g))
    return stores + (("page_features", "page_cos", "page_sin", "projected") if g.lazy_pages else ())


def _page_sources(g: Geometry) -> list[TensorSpec]:
    """What lazy projection works from, page by page."""
    slots = "batch", g.pages, page_size(g)
    turn = [TensorSpec(name, "float32", (*slots, g.head_dim // 2)) for name in ("page_cos", "page_sin")]
    return [TensorSpec("page_features", "model", (*slots, g.hidden)), *turn]


def _cache(name: str, g: Geometry) -> list[TensorSpec]:
    shape = ("batch", g.kv_heads, "capacity", g.head_dim)
    return [TensorSpec(f"{name}.{layer}", "model", shape) for layer in range(g.layers)]


def _pages(name: str, g: Geometry) -> list[TensorSpec]:
    """Stores of every reading layer; where they are int8, then the steps that each token's head is counted in."""
    shape = ("batch", g.kv_heads, g.pages, page_size(g), g.head_dim)
    if not g.int8_pages:
        return [TensorSpec(f"{name}.{layer}", "model", shape) for layer in g.reading_layers]
    scales = [TensorSpec(f"{name}_scale.{layer}", "float32", shape[:-1]) for layer in g.reading_layers]
    return [TensorSpec(f"{name}.{layer}", "int8", shape) for layer in g.reading_layers] + scales


def graph_io(
    part: str, kind: str, g: Geometry, precision: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph, the "model" dtype resolved.

    ONNX Runtime's graphs of the precisions in WIDENED take and give float32 (engines/bind.py).
    The capacity of the plugin-free graph is the whole context: a number, not a symbol.
    """
    dtype = "float32" if kind == ONNXRUNTIME and precision in WIDENED else PRECISIONS[precision]
    sizes = {"capacity": g.context} if kind == PLUGIN_FREE else {}

    def resolved(spec: TensorSpec) -> TensorSpec:
        shape = tuple(sizes.get(size, size) for size in spec.shape)
        return replace(spec, shape=shape, dtype=dtype if spec.dtype == "model" else spec.dtype)

    inputs, outputs = (tuple(map(resolved, specs)) for specs in IO_OF_PART[part](g))
    return inputs, outputs


def plan_io(part: str, g: Geometry, precision: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a TensorRT engine: those of the traced graph, with one cache capacity, the whole context.

    Shapes that never change are what lets one decode step be captured and replayed.
    """
    inputs, outputs = (
        tuple(
            replace(spec, shape=tuple(g.context if size == "capacity" else size for size in spec.shape))
            for spec in specs
        )
        for specs in graph_io(part, TRACED, g, precision)
    )
    return inputs, outputs


def symbols(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """The symbols in the shapes, each once."""
    return tuple(dict.fromkeys(size for spec in specs for size in spec.shape if isinstance(size, str)))


IO_OF_PART = {"vision": vision_io, "pages": pages_io, "decoder": decoder_io}
