"""What the graphs and engines of a bundle take and give: names, dtypes and shapes, from the geometry alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from engines.bundle.geometry import Geometry
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA, PLUGIN_FREE, TRACED
from engines.bundle.pages import page_size
from engines.bundle.precision import Precision


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    `shape` mixes sizes and symbols: batch, steps (new tokens), capacity (of the cache), tiles, batch_tiles (zoom*zoom
    for each batch row). `dtype` is a numpy-style name, or "model": the precision the bundle was built with.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def of_batch(self, batch: int, capacity: int | None = None) -> tuple[int, ...]:
        """The shape for so many rows, of a tensor whose first size is the batch and whose others are numbers, or the
        capacity of a cache, which is given then."""
        sizes = {} if capacity is None else {"capacity": capacity}
        return (batch, *(int(sizes.get(str(size), size)) for size in self.shape[1:]))


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
    """Decoder, for prefill and decode step alike; their meaning: `FlexDecoder.forward` in export/network/decoder.py."""
    inputs = [
        TensorSpec("input_ids", "int64", ("batch", "steps")),
        TensorSpec("past_length", "int64", ("batch",)),
        TensorSpec("features", "model", ("batch", g.image_tokens, g.hidden)),
        TensorSpec("image_begin", "int64", ("batch",)),
        TensorSpec("margins", "int64", ("batch", 2)),
        TensorSpec("page_budget", "int64", ("batch",)),
    ]
    inputs += _cache("past_key", g) + _cache("past_value", g)
    inputs += _pages("page_key", g) + _pages("page_value", g)
    selecting = len(g.selecting_layers)
    lazy: list[TensorSpec] = []
    if g.lazy_pages:
        done: tuple[int | str, ...] = ("batch", *projected_sizes(g))
        inputs += [*_page_sources(g), TensorSpec("projected", "int64", done)]
        lazy = _pages("present_page_key", g) + _pages("present_page_value", g)
        lazy.append(TensorSpec("present_projected", "int64", done))
    if g.page_slots is not None:
        lazy.append(TensorSpec("turnover", "int64", ("batch", *turnover_sizes(g))))
    outputs = [
        TensorSpec("logits", "float32", ("batch", g.vocab)),
        TensorSpec("token", "int64", ("batch",)),
        TensorSpec("pages", "int64", ("batch", selecting, g.pages)),
        TensorSpec("page_count", "int64", ("batch", selecting)),
    ]
    return inputs, outputs + _cache("present_key", g) + _cache("present_value", g) + lazy


def in_place(outputs: Iterable[TensorSpec]) -> dict[str, str]:
    """Outputs of a decoder that share the buffer of an input, and that input: the cache, and lazily projected pages."""
    caches = "key", "value", "key_scale", "value_scale"
    prefixes = {f"present_{cache}": f"past_{cache}" for cache in caches}
    stores = "page_key", "page_value", "page_key_scale", "page_value_scale"
    prefixes |= {f"present_{store}": store for store in stores}
    split = ((spec.name, *spec.name.partition(".")) for spec in outputs)
    return {name: f"{prefixes[prefix]}.{layer}" for name, prefix, _, layer in split if prefix in prefixes}


def cache_inputs(g: Geometry) -> tuple[str, ...]:
    """Names of what a decoder takes of the ordinary tokens it has seen: the cache."""
    return tuple(spec.name for spec in _cache("past_key", g) + _cache("past_value", g))


def page_inputs(g: Geometry) -> tuple[str, ...]:
    """Names of what a decoder takes about the hi-res pages of an image."""
    stores = tuple(spec.name for spec in _pages("page_key", g) + _pages("page_value", g))
    return stores + (("page_features", "page_cos", "page_sin", "projected") if g.lazy_pages else ())


def projected_sizes(g: Geometry) -> tuple[int, ...]:
    """Of what says which pages are projected, for a row of the batch: of each reading layer a number for each page;
    with page slots two, which of them it has and when it was last selected (export/network/page_slots.py)."""
    return len(g.reading_layers), *(() if g.page_slots is None else (2,)), g.pages


def turnover_sizes(g: Geometry) -> tuple[int, ...]:
    """Of what says how pages took turns in page slots, for a row of the batch: see Step.turnover."""
    return len(g.reading_layers), 2


def _page_sources(g: Geometry) -> list[TensorSpec]:
    """What lazy projection works from, page by page."""
    places = "batch", g.pages, page_size(g)
    turn = [TensorSpec(name, "float32", (*places, g.head_dim // 2)) for name in ("page_cos", "page_sin")]
    return [TensorSpec("page_features", "model", (*places, g.hidden)), *turn]


def _cache(name: str, g: Geometry) -> list[TensorSpec]:
    """The cache of every layer; where it is int8, then the steps that each token's head is counted in."""
    return _stores(name, range(g.layers), ("batch", g.kv_heads, "capacity", g.head_dim), int8=g.int8_cache)


def _pages(name: str, g: Geometry) -> list[TensorSpec]:
    """Pages of every reading layer; where they are int8, as in _cache."""
    shape = ("batch", g.kv_heads, g.stored_pages, page_size(g), g.head_dim)
    return _stores(name, g.reading_layers, shape, int8=g.int8_pages)


def _stores(name: str, layers: range, shape: tuple[int | str, ...], *, int8: bool) -> list[TensorSpec]:
    """One for each of `layers`; int8 ones are followed by their scales."""
    if not int8:
        return [TensorSpec(f"{name}.{layer}", "model", shape) for layer in layers]
    scales = [TensorSpec(f"{name}_scale.{layer}", "float32", shape[:-1]) for layer in layers]
    return [TensorSpec(f"{name}.{layer}", "int8", shape) for layer in layers] + scales


def graph_io(
    part: str, kind: str, g: Geometry, precision: Precision
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph, the "model" dtype resolved.

    ONNX Runtime's graphs take and give what they compute in (export/graph/bind.py).
    The capacity of the plugin-free graph is the whole context: a number, not a symbol.
    """
    dtype = precision.ort_dtype if kind in (ONNXRUNTIME, ONNXRUNTIME_CUDA) else precision.dtype
    sizes: dict[int | str, int] = {"capacity": g.context} if kind == PLUGIN_FREE else {}

    def resolved(spec: TensorSpec) -> TensorSpec:
        shape = tuple(sizes.get(size, size) for size in spec.shape)
        return replace(spec, shape=shape, dtype=dtype if spec.dtype == "model" else spec.dtype)

    inputs, outputs = (tuple(map(resolved, specs)) for specs in IO_OF_PART[part](g))
    return inputs, outputs


def plan_io(part: str, g: Geometry, precision: Precision) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
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
