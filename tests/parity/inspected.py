"""The exported decoder, as bound for a backend, with its inner values (maps, hidden states) made visible."""

from __future__ import annotations

from uuid import uuid4

import numpy as np
import onnx_ir as ir

from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA, PLUGIN_FREE, TRACED
from engines.ort import OrtDecoder, OrtModel
from export.graph.bind import for_onnxruntime, for_plugin_free


class InspectedModel(OrtModel):
    """An OrtModel whose decoders have `maps` and `hidden`, like those of export.network.reference.

    `kind`: ONNXRUNTIME; ONNXRUNTIME_CUDA, whose graph runs on the CPU as well; or PLUGIN_FREE: TensorRT's graph, which
    ONNX Runtime runs too, if slowly.
    """

    def __init__(self, bundle: Bundle, kind: str = ONNXRUNTIME) -> None:
        super().__init__(bundle)
        g, self.kind = self.geometry, kind
        self.map_names = [f"map.{layer}" for layer in g.selecting_layers]
        self.hidden_names = [f"hidden.{layer}" for layer in range(g.layers + 1)]
        model = ir.load(bundle.graph("decoder", TRACED))
        values = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs.extend(values[name] for name in self.map_names + self.hidden_names)
        path = bundle.path / f"{uuid4().hex}.onnx"  # beside the weights, where ONNX Runtime accepts them
        precision = bundle.precision
        if kind == PLUGIN_FREE:
            for_plugin_free(model, g.context)
        else:
            for_onnxruntime(model, precision, cuda=kind == ONNXRUNTIME_CUDA)
        ir.save(model, path)
        self.part.session = self.session(path)
        path.unlink()

    def decoder(self, image, capacity):
        """The plugin-free graph knows one capacity."""
        part, batch = self.part, len(image.begin)
        tokens = self.geometry.context if self.kind == PLUGIN_FREE else part.rounded(capacity)
        return InspectedDecoder(self, image, part.desk(image, part.cache(batch, tokens)))


class InspectedDecoder(OrtDecoder):
    def __init__(self, model: InspectedModel, image, desk) -> None:
        g, batch, self._model = model.geometry, len(image.begin), model
        for name in model.map_names:
            desk.results[name] = model.buffers.empty((batch, g.grid, g.grid), np.float32)
        for name in model.hidden_names:
            desk.results[name] = model.buffers.zeros((batch, g.hidden), model.part.dtype)
        super().__init__(model.part, image, desk)

    @property
    def maps(self) -> list[np.ndarray]:
        return [self._desk.results[name].numpy().copy() for name in self._model.map_names]

    @property
    def hidden(self) -> list[np.ndarray]:
        return [self._desk.results[name].numpy().astype(np.float32) for name in self._model.hidden_names]
