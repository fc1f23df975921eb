"""The same decoder without FlexAttention: the exported graph with selection and pages taken out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.kinds import TRACED
from engines.ort import OrtDecoder, OrtModel
from engines.residency import ALL

LOW_INPUTS, PAGE_INPUTS = 9, 5  # of flex::CachedAttention, and what flex::HierarchicalAttention takes on top


def plain_graph(bundle: Bundle) -> Path:
    """The decoder of `bundle`, whose pages are projected eagerly, with every layer a flex::CachedAttention, bound to
    ONNX Runtime. Made once, in the bundle's folder, where its weights are. Takes features of any number of tokens.
    """
    path = bundle.path / "plain.onnx"
    if path.exists():
        return path
    import onnx_ir as ir  # here: a process whose memory is measured finds the graph made, and does not import the rest
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from export.graph.bind import for_onnxruntime

    model = ir.load(bundle.graph("decoder", TRACED))
    for node in list(model.graph):
        if node.op_type == "HierarchicalAttention":
            assert len(node.inputs) == LOW_INPUTS + PAGE_INPUTS
            node.op_type = "CachedAttention"
            node.resize_inputs(LOW_INPUTS)
    for values in (model.graph.inputs, model.graph.outputs):
        for value in [value for value in values if value.name.startswith("page")]:
            values.remove(value)
    RemoveUnusedNodesPass()(model)
    assert {node.op_type for node in model.graph if node.domain == "flex"} == {"CachedAttention"}
    for_onnxruntime(model, bundle.precision)
    left = {value.name for node in model.graph for value in node.inputs if value is not None}
    for value in [value for value in model.graph.inputs if value.name not in left]:
        model.graph.inputs.remove(value)
    for value in model.graph.inputs:
        if value.name == "features":
            value.shape = ir.Shape(["batch", "image_tokens", value.shape[2]])
    ir.save(model, path)
    return path


class PlainModel(OrtModel):
    """An OrtModel whose decoder is a plain LLaMA."""

    def __init__(
        self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None, residency: str = ALL
    ) -> None:
        self._decoder = plain_graph(bundle)
        super().__init__(bundle, device=device, threads=threads, residency=residency)

    def part_session(self, bundle: Bundle, part: str) -> ort.InferenceSession:
        """See OrtModel.part_session."""
        return self.session(self._decoder) if part == "decoder" else super().part_session(bundle, part)

    def decoder(self, image: Image, capacity: int) -> OrtDecoder:
        """See OrtModel.decoder."""
        part = self.part
        return PlainDecoder(part, image, part.desk(image, part.cache(len(image.begin), part.rounded(capacity))))

    def fill(self, decoder: OrtDecoder, length: int) -> None:
        """Pretend that `length` tokens were prefilled: random keys and values, as costly as real ones."""
        rng = np.random.default_rng(0)
        for value in decoder._cache.values():
            value.update_inplace(rng.standard_normal(value.shape(), np.float32))
        decoder.length[:] = length


class PlainDecoder(OrtDecoder):
    """A OrtDecoder that binds only what the plain graph has."""

    def _bind(self, ids: ort.OrtValue) -> ort.IOBinding:
        session, desk = self._part.session, self._desk
        inputs = {value.name for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
        binding = session.io_binding()
        named = {"input_ids": ids, "past_length": desk.past_length, **self._inputs}
        named |= self._cache
        for name in inputs:
            binding.bind_ortvalue_input(name, named[name])
        results = desk.results | {name.replace("past_", "present_"): value for name, value in self._cache.items()}
        for name in outputs:
            binding.bind_ortvalue_output(name, results[name])
        for name in ("pages", "page_count"):  # this graph has none
            desk.results[name].update_inplace(np.zeros(desk.results[name].shape(), np.int64))
        return binding
