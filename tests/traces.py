"""Traced graphs are kept: tests build a hundred bundles of thirty models, and tracing is nine tenths of a small build.

A graph is traced once for the workers of a run, whichever builds it first; tests/export/graph/test_trace.py shows that
what comes back from the disk is what the tracer made.
"""

from __future__ import annotations

import gc
import hashlib
import os
from pathlib import Path

import onnx_ir as ir
import torch
from filelock import FileLock

import export.graph.trace
from engines.bundle.geometry import Geometry

trace = export.graph.trace.trace  # the tracer itself
FOLDER = "FLEX_TEST_TRACES"  # environment variable: processes that a worker starts share the folder, too


def cached(part: str, geometry: Geometry, dtype: torch.dtype) -> ir.Model:
    """What `trace` returns."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return trace(part, geometry, dtype)
    path = Path(folder) / f"{hashlib.sha256(key(part, geometry, dtype).encode()).hexdigest()}.onnx"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            gc.disable()  # it would find nothing in what the tracer makes, for a sixth of the time
            try:
                write(trace(part, geometry, dtype), path)
            finally:
                gc.enable()
    return read(path)


def key(part: str, g: Geometry, dtype: torch.dtype) -> str:
    """What a graph depends on. Models that differ in their decoder alone share their vision graph."""
    what = (g.vision, g.lowres, g.hidden, g.projector_depth) if part == "vision" else g
    return f"{part} {what} {dtype}"


def write(model: ir.Model, path: Path) -> None:
    """Save a graph whose weights have no values yet: a file cannot leave them out, so they point nowhere."""
    missing = [value for value in model.graph.initializers.values() if value.const_value is None]
    for value in missing:
        value.const_value = ir.ExternalTensor(
            "nowhere", 0, 0, value.dtype, shape=value.shape, name=value.name, base_dir=path.parent
        )
    ir.save(model, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def read(path: Path) -> ir.Model:
    """A saved graph, its weights again without values."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


export.graph.trace.trace = cached
