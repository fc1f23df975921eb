"""The parts of a model, the kinds of graphs a bundle holds of each, and the backends that run them: their names."""

from __future__ import annotations

from engines.bundle.geometry import Geometry

PARTS = ("vision", "pages", "decoder")
# Kinds of graphs: with bare flex:: nodes (which TensorRT reads with this project's plugins), for ONNX Runtime, for its
# CUDA provider, and for TensorRT without plugins.
TRACED, ONNXRUNTIME, ONNXRUNTIME_CUDA, PLUGIN_FREE = "traced", "onnxruntime", "onnxruntime-cuda", "plugin-free"
OPTIONAL = (ONNXRUNTIME_CUDA,)  # bundles of before there were any lack them, and do without
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
BACKENDS = (ONNXRUNTIME, TENSORRT, TENSORRT_RTX)
# What TensorRT can do with this project's plugins alone, by field of Geometry: the option of a build, and why.
PLUGINS_ALONE = {
    "lazy_pages": ("--projection lazy", "cannot tell which pages are new"),
    "int8_cache": ("--kv-cache int8", "updates no int8 cache in place"),
}


def needing_plugins(g: Geometry) -> list[str]:
    """The options of a model that TensorRT cannot serve without plugins."""
    return [option for field, (option, _) in PLUGINS_ALONE.items() if getattr(g, field)]


def layers_of(part: str, g: Geometry) -> range:
    """The layers whose weights a part holds, of which TensorRT may have several engines of some each; none of a part
    that is always one engine."""
    if part == "decoder":
        return range(g.layers)
    return g.reading_layers if part == "pages" and not g.lazy_pages else range(0)


def kinds(part: str, g: Geometry) -> tuple[str, ...]:
    """The kinds of graphs a bundle holds of a part.

    The vision and pages parts hold no flex:: nodes: one graph serves every provider of ONNX Runtime, and the traced one
    needs no plugins.
    """
    if part != "decoder":
        return TRACED, ONNXRUNTIME
    plugin_free = () if needing_plugins(g) else (PLUGIN_FREE,)
    return (TRACED, ONNXRUNTIME, ONNXRUNTIME_CUDA, *plugin_free)
