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


def kinds(part: str, g: Geometry) -> tuple[str, ...]:
    """The kinds of graphs a bundle holds of a part.

    The vision and pages parts hold no flex:: nodes: one graph serves every provider of ONNX Runtime, and the traced one
    needs no plugins. Which pages are new is known to plugins alone, and TensorRT itself updates no int8 cache in place.
    """
    if part != "decoder":
        return TRACED, ONNXRUNTIME
    plugin_free = () if g.lazy_pages or g.int8_cache else (PLUGIN_FREE,)
    return (TRACED, ONNXRUNTIME, ONNXRUNTIME_CUDA, *plugin_free)
