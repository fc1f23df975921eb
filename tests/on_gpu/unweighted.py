"""A bundle without the values of its weights: graphs and a manifest, exported from shapes alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from engines.bundle.geometry import Geometry
from engines.bundle.manifest import File
from engines.bundle.tensors import expected_tensors
from engines.bundle.writer import BundleWriter
from tests import traces  # noqa: F401 - before whatever imports the tracer

from export import build  # isort: skip
from export.checkpoint.formats.key_table import TensorInfo
from export.checkpoint.write_config import write_config
from export.options import BuildOptions

PUBLISHED_TOWER = "openai/clip-vit-large-patch14-336"
NOBODY = "0" * 64  # the SHA-256 of a file that is yet to be made
ITEM = 2  # bytes of a float16 value


class Shapes:
    """What a build asks of a checkpoint, of one that has shapes and no values. bytes: of the tensors that were asked
    for since `taken` was called."""

    def __init__(self, g: Geometry) -> None:
        self.dropped: dict[str, str] = {}
        self._shapes, self._bytes = expected_tensors(g), 0

    def identity(self) -> dict[str, object]:
        """For the manifest."""
        return {"weights": "none: random ones are made where it is opened"}

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        shape = self._shapes[name]
        return TensorInfo(name, Path("nowhere"), torch.float16, shape, 0, torch.Size(shape).numel() * ITEM, (0, 0))

    def chunks(self, name: str, max_bytes: int = 0) -> Iterator[bytes]:
        """No bytes; they are counted."""
        self._bytes += self.info(name).nbytes
        return iter(())

    def taken(self) -> int:
        """Bytes counted since the last call."""
        count, self._bytes = self._bytes, 0
        return count


class _Writer(BundleWriter):
    """Writes all but the values of weights, which the manifest lists all the same."""

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        super().__init__(folder)
        self._source = shapes

    def write(self, name: str, chunks: Iterator[bytes], progress: Callable[[int], None] | None = None) -> None:
        if not name.endswith(".weights"):
            super().write(name, chunks, progress)
            return
        padding = sum(map(len, chunks))
        self.files[name] = File(padding + self._source.taken(), NOBODY)


def bundle_without_weights(g: Geometry, folder: Path) -> None:
    """Export a float16 bundle of that shape for ONNX Runtime into `folder`, which must exist. Takes no more time and
    memory than tracing does."""
    with tempfile.TemporaryDirectory(prefix="config-") as name:
        model = Path(name)
        published = g.vision.hidden == 1024  # its numbers are known, and are those of 7B
        write_config(model, g, tower=PUBLISHED_TOWER if published else "clip")
        recipe = build.read_recipe(BuildOptions(model=model, out=folder, precision="fp16", check="none"))
        shapes = Shapes(recipe.geometry)
        writer = _Writer(folder, shapes)
        build._write(recipe, shapes, None, None, build._versions(), writer, Console(quiet=True))
