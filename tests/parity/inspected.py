"""The exported decoder with its inner values (maps, hidden states) made visible."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from polygraphy.backend.onnx import ModifyOutputs, OnnxFromPath, SaveOnnx

from engines.bundle import Bundle
from engines.ort import Decoder, OrtModel


class InspectedModel(OrtModel):
    """An OrtModel whose decoders have `maps` and `hidden`, like those of export.reference."""

    def __init__(self, bundle: Bundle, folder) -> None:
        super().__init__(bundle)
        g = self.geometry
        self.map_names = [f"map.{layer}" for layer in g.selecting_layers]
        self.hidden_names = [f"hidden.{layer}" for layer in range(g.layers + 1)]
        session = self._sessions["decoder"]
        outputs = [output.name for output in session.get_outputs()] + self.map_names + self.hidden_names
        marked = ModifyOutputs(OnnxFromPath(str(bundle.graph("decoder", "onnxruntime"))), outputs=outputs)
        path = folder / "decoder.inspected.onnx"
        SaveOnnx(marked, str(path), external_data_path="decoder.inspected.weights", all_tensors_to_one_file=True)()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._sessions["decoder"] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def decoder(self, image, capacity):
        return InspectedDecoder(self, self._sessions["decoder"], image, capacity)


class InspectedDecoder(Decoder):
    def __init__(self, model: InspectedModel, session, image, capacity: int) -> None:
        super().__init__(model, session, image, capacity)
        g, batch = model.geometry, len(image.begin)
        for name in model.map_names:
            self._outputs[name] = model._value(np.empty((batch, g.grid, g.grid), np.float32))
        for name in model.hidden_names:
            self._outputs[name] = model.zeros((batch, g.hidden))
        self._step_binding = self._bind(self._ids)

    @property
    def maps(self) -> list[np.ndarray]:
        return [self._outputs[name].numpy().copy() for name in self._model.map_names]

    @property
    def hidden(self) -> list[np.ndarray]:
        return [self._outputs[name].numpy().astype(np.float32) for name in self._model.hidden_names]
