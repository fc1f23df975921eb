"""The parts of a model, the kinds of graphs a bundle holds of each, and the backends that run them: their names."""

from __future__ import annotations

from engines.bundle.geometry import Geometry

PARTS = ("vision", "pages", "decoder")
# Kinds of graphs: with bare flex:: nodes (which TensorRT reads with this project's plugins), for ONNX Runtime, and for
# TensorRT without plugins.
TRACED, ONNXRUNTIME, PLUGIN_FREE = "traced", "onnxruntime", "plugin-free"
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
BACKENDS = (ONNXRUNTIME, TENSORRT, TENSORRT_RTX)


def kinds(part: str, g: Geometry) -> tuple[str, ...]:
    """The kinds of graphs a bundle holds of a part.

    The vision and pages parts hold no flex:: nodes: their traced graphs need no plugins anyway. Which pages are new is
    known to plugins alone.
    """
    plugin_free = part == "decoder" and not g.lazy_pages
    return (TRACED, ONNXRUNTIME, PLUGIN_FREE) if plugin_free else (TRACED, ONNXRUNTIME)
