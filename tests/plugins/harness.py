"""Run one flex:: op as its ONNX body in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}
TYPES |= {np.int8: TensorProto.INT8, np.int64: TensorProto.INT64}


def run_body(functions, inputs: list[np.ndarray], outputs: list[type], **attributes: int) -> list[np.ndarray]:
    """The last of `functions` is the op; `outputs` are the numpy types of its results."""
    names = [f"in{index}" for index in range(len(inputs))]
    results = [f"out{index}" for index in range(len(outputs))]
    node = helper.make_node(functions[-1].name, names, results, domain="flex", **attributes)
    graph = helper.make_graph(
        [node],
        "op",
        [
            helper.make_tensor_value_info(
                name, TYPES[array.dtype.type], [f"{name}_{axis}" for axis in range(array.ndim)]
            )
            for name, array in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in zip(results, outputs, strict=True)],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("flex", 1)]
    protos = [function.to_function_proto() for function in functions]
    model = helper.make_model(graph, opset_imports=opsets, functions=protos, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))
