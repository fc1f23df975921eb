"""Torch computes the operators of traced graphs as ONNX's own reference does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from export.graph.bind import STABLE_SINCE_20
from tests.emulator.operators import HOST_OPERANDS, OPERATORS
from tests.emulator.traced import Traced

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 4)).astype(np.float32)
Y = rng.standard_normal((1, 3, 1)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
WHOLE = rng.integers(-9, 9, (2, 3, 4))
WIDE = rng.standard_normal((2, 6, 8, 8)).astype(np.float32)
Q = rng.integers(-128, 128, (8, 6)).astype(np.int8)
SCALES = (rng.random((8, 6)) + 0.1).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES = [
    *((name, (X,), {}) for name in ("Abs", "Cos", "Identity", "Neg", "Sigmoid", "Sin", "Tanh")),
    *((name, (X, Y), {}) for name in ("Add", "Div", "Greater", "Less", "LessOrEqual", "Max", "Min", "Mul", "Sub")),
    *((name, (POSITIVE,), {}) for name in ("Reciprocal", "Sqrt")),
    ("And", (X > 0, Y > 0), {}),
    ("ArgMax", (X,), {"axis": -1, "keepdims": 0}),
    ("Cast", (X * 9,), {"to": 7}),
    ("Cast", (WHOLE,), {"to": 10}),
    ("Concat", (X, X), {"axis": 1}),
    ("DequantizeLinear", (Q, SCALES[0]), {"axis": 1}),
    ("DequantizeLinear", (Q, SCALES[:2], Q[:2]), {"axis": 0, "block_size": 4}),
    ("Div", (WHOLE, ints(-4)), {}),
    ("Equal", (WHOLE, ints(3)), {}),
    ("Expand", (Y, ints(2, 1, 4)), {}),
    ("Flatten", (X,), {"axis": 2}),
    ("Gather", (X, ints(2, -1)), {"axis": 1}),
    ("Gather", (X, np.array(-2)), {"axis": 2}),
    ("GatherElements", (X, WHOLE[:, :1] % 3 - 1), {"axis": 1}),
    ("GatherND", (X, np.array([[1, 2], [0, 1]])), {}),
    ("Gelu", (X,), {"approximate": "none"}),
    ("Gelu", (X,), {"approximate": "tanh"}),
    ("Gemm", (X[0], X[1], Y[0, 0]), {"transB": 1, "alpha": 0.5}),
    ("LayerNormalization", (X, X[0, 0], X[0, 1]), {"axis": -1, "epsilon": 1e-3}),
    ("MatMul", (X, X[0].T), {}),
    ("Pow", (POSITIVE, np.array(2.5, np.float32)), {}),
    ("QuantizeLinear", (X * 100, SCALES[0, :4], Q[0, :4]), {"axis": 2}),
    ("Range", (np.array(2), np.array(9), np.array(3)), {}),
    ("ReduceMax", (X, ints(-1)), {"keepdims": 0}),
    ("ReduceMean", (X, ints(0, 2)), {"keepdims": 1}),
    ("ReduceSum", (X,), {"keepdims": 0}),
    ("Reshape", (X, ints(0, -1)), {}),
    ("Shape", (X,), {"start": 1}),
    ("Slice", (X, ints(1, -3), ints(9, -1), ints(1, -1), ints(1, 2)), {}),
    ("Softmax", (X,), {"axis": 1}),
    ("Split", (X, ints(1, 3)), {"axis": 2}),
    ("Split", (X,), {"axis": 2, "num_outputs": 3}),
    ("Squeeze", (Y, ints(0, 2)), {}),
    ("Transpose", (X,), {"perm": [2, 0, 1]}),
    ("Unsqueeze", (X, ints(0, -1)), {}),
    ("Where", (X > 0, X, Y), {}),
]
OF_ATTRIBUTES = {"Constant", "ConstantOfShape"}  # that are tensors: whole graphs have them


@pytest.mark.parametrize(("operator", "inputs", "attributes"), CASES, ids=[case[0] for case in CASES])
def test_as_the_reference(operator, inputs, attributes):
    given = [f"x{index}" for index in range(len(inputs))]
    results = [f"y{index}" for index in range(2 if operator == "Split" else 1)]
    node = helper.make_node(operator, given, results, **attributes)
    kinds = [helper.np_dtype_to_tensor_dtype(each.dtype) for each in inputs]
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(given, kinds, strict=True)]
    graph = helper.make_graph([node], "one", values, [helper.make_tensor_value_info(name, 0, None) for name in results])
    opset = 21 if "Linear" in operator else 20
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    expected = ReferenceEvaluator(model).run(None, dict(zip(given, inputs, strict=True)))
    found = OPERATORS[operator](*(torch.from_numpy(np.array(each)) for each in inputs), **attributes)
    for ours, theirs in zip(found if operator == "Split" else [found], expected, strict=True):
        assert tuple(ours.shape) == theirs.shape and ours.numpy().dtype == theirs.dtype
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_every_operator_that_traced_graphs_may_hold():
    assert OPERATORS.keys() == STABLE_SINCE_20
    assert {case[0] for case in CASES} | OF_ATTRIBUTES == STABLE_SINCE_20
    assert HOST_OPERANDS.keys() <= OPERATORS.keys()


def test_an_unknown_operator_is_told(tmp_path):
    value = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Erf", [value])
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "graph.onnx")
    with pytest.raises(NotImplementedError, match=r"graph\.onnx: no Erf in tests/emulator/operators\.py"):
        Traced(None, None, tmp_path / "graph.onnx", None)
