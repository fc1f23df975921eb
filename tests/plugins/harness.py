"""Ways to run a flex:: op, all called as run(op, dtype, inputs) -> outputs, with inputs and outputs by name: as its
PyTorch reference, as an ONNX body in ONNX Runtime, as its kernels through the driver. (A further one is
tests.emulator.interpreter.call.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from onnxscript import OnnxFunction

from engines.cuda import Buffer, Cuda
from plugins.artifacts import Artifacts
from plugins.cached_attention.reference import cached_attention, cached_attention_int8_cache
from plugins.hierarchical_attention.reference import (
    hierarchical_attention,
    hierarchical_attention_int8,
    hierarchical_attention_int8_both,
    hierarchical_attention_int8_cache,
)
from plugins.op import STORES, Kernel, Launch, Op, named
from plugins.project_pages.reference import (
    project_pages,
    project_pages_int8,
    project_pages_int8_slots,
    project_pages_slots,
)
from plugins.select_pages.reference import select_pages
from tests.emulator.interpreter import NUMPY
from tests.plugins.inputs import to_bits, to_torch

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Op, str, Arrays], dict[str, np.ndarray]]

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int64": TensorProto.INT64,
}
REFERENCES = {  # by how things are stored
    ("SelectPages",): select_pages,
    ("CachedAttention",): cached_attention,
    ("CachedAttention", "int8_cache"): cached_attention_int8_cache,
    ("ProjectPages",): project_pages,
    ("ProjectPages", "int8_pages"): project_pages_int8,
    ("ProjectPages", "page_slots"): project_pages_slots,
    ("ProjectPages", "int8_pages", "page_slots"): project_pages_int8_slots,
    ("HierarchicalAttention",): hierarchical_attention,
    ("HierarchicalAttention", "int8_pages"): hierarchical_attention_int8,
    ("HierarchicalAttention", "int8_cache"): hierarchical_attention_int8_cache,
    ("HierarchicalAttention", "int8_pages", "int8_cache"): hierarchical_attention_int8_both,
}


def by_reference(op: Op, dtype: str, inputs: Arrays) -> dict[str, np.ndarray]:
    """What the op's PyTorch reference makes of the inputs; bfloat16 as its bits."""
    attributes = {name: value for name, value in op.attributes.items() if name not in STORES}  # no function has them
    function = REFERENCES[(op.name, *(store for store in STORES if op.attributes.get(store)))]
    given = {tensor.name: to_torch(np.array(inputs[tensor.name])) for tensor in op.inputs}
    return named(op.outputs, map(to_bits, function(**given, **attributes)))


def by_body(functions: Sequence[OnnxFunction]) -> Run:
    """Run an op as the last of an ONNX body's functions, in ONNX Runtime."""

    def run(op: Op, dtype: str, inputs: Arrays) -> dict[str, np.ndarray]:
        names, results = ([tensor.name for tensor in tensors] for tensors in (op.inputs, op.outputs))
        attributes = {name: value for name, value in op.attributes.items() if name not in STORES}
        node = helper.make_node(functions[-1].name, names, results, domain="flex", **attributes)
        kinds = {tensor.name: TYPES[tensor.kind(dtype)] for tensor in (*op.inputs, *op.outputs)}
        shapes = {name: [f"{name}_{axis}" for axis in range(inputs[name].ndim)] for name in names}
        graph = helper.make_graph(
            [node],
            "op",
            [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in names],
            [helper.make_tensor_value_info(name, kinds[name], None) for name in results],
        )
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("flex", 1)]
        protos = [function.to_function_proto() for function in functions]
        model = helper.make_model(graph, opset_imports=opsets, functions=protos, ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return dict(zip(results, session.run(None, {name: inputs[name] for name in names}), strict=True))

    return run


class Launcher:
    """Launches ops on `cuda`, a GPU or the emulated driver; `compile` makes the code of kernels."""

    def __init__(self, cuda: Cuda, compile: Callable[[Sequence[Kernel]], Artifacts]) -> None:
        self.cuda, self._compile = cuda, compile
        self.stream = cuda.stream()
        self._artifacts: dict[tuple[Kernel, ...], Artifacts] = {}

    def artifacts(self, op: Op, dtype: str) -> Artifacts:
        """The compiled kernels of an op."""
        kernels = op.kernels(dtype)
        if kernels not in self._artifacts:
            self._artifacts[kernels] = self._compile(kernels)
        return self._artifacts[kernels]

    def prepare(self, op: Op, dtype: str, inputs: Arrays) -> tuple[list[Launch], dict[str, Buffer]]:
        """The launches, and by name the buffers they work in, which must outlive them.

        Whatever the op writes is NaN beforehand. Inputs as in tests.emulator.interpreter.call.
        """
        shapes = {tensor.name: inputs[tensor.name].shape for tensor in op.inputs}
        buffers = {name: self._filled(inputs[name]) for name in shapes}
        for tensor in op.outputs:
            if tensor.name in op.in_place:
                buffers[tensor.name] = buffers[op.in_place[tensor.name]]
            else:
                buffers[tensor.name] = self._empty(self._result(op, dtype, shapes, tensor.name).nbytes)
        buffers["workspace"] = self._empty(max(1, op.workspace(dtype, shapes)))
        addresses = {name: buffer.address for name, buffer in buffers.items()}
        kernels = self.artifacts(op, dtype).on(op.kernels(dtype), self.cuda.sm)
        return op.launches(dtype, shapes, addresses, addresses["workspace"], kernels), buffers

    def __call__(self, op: Op, dtype: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """What `op` makes of `inputs`, as tests.emulator.interpreter.call gives it."""
        launches, buffers = self.prepare(op, dtype, inputs)
        self.cuda.run(self.artifacts(op, dtype), launches, int(self.stream))
        shapes = {tensor.name: inputs[tensor.name].shape for tensor in op.inputs}
        results = {tensor.name: self._result(op, dtype, shapes, tensor.name) for tensor in op.outputs}
        return {name: buffers[name].download(array, self.stream) for name, array in results.items()}

    def _result(self, op: Op, dtype: str, shapes: Mapping[str, tuple[int, ...]], name: str) -> np.ndarray:
        (tensor,) = (tensor for tensor in op.outputs if tensor.name == name)
        return np.zeros(op.output_shapes(shapes)[name], NUMPY[tensor.kind(dtype)])

    def _filled(self, array: np.ndarray) -> Buffer:
        buffer = self.cuda.buffer(array.nbytes, "a test")
        buffer.upload(np.ascontiguousarray(array), self.stream)
        return buffer

    def _empty(self, size: int) -> Buffer:
        buffer = self.cuda.buffer(size, "a test")
        buffer.fill(0xFF, self.stream)
        return buffer
