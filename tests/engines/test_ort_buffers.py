"""Tensors on a device, as far as the CPU can show: what clears them there does it by address."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from engines.ort import buffers
from engines.ort.buffers import Buffers


def test_the_clearing_graph_is_onnx():
    model = onnx.load_from_string(buffers._clearing_graph())
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert node.op_type == "ConstantOfShape" and model.opset_import[0].version == 19
    assert onnx.numpy_helper.to_array(node.attribute[0].t).tolist() == [0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.int64])
@pytest.mark.parametrize("piece", [1 << 30, 100, 1])
def test_a_tensor_is_cleared_where_it_lies(monkeypatch, dtype, piece):
    monkeypatch.setattr(buffers, "PIECE", piece)
    maker, array = Buffers("cpu"), np.ones((9, 3, 5), dtype)
    value = maker.of(array[2:5])
    maker.clear(value)
    assert not value.numpy().any() and value.shape() == [3, 3, 5]
    assert array[:2].all() and array[5:].all() and not array[2:5].any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int64"])
def test_zeros_and_empty_have_their_shape_and_dtype(dtype):
    maker = Buffers("cpu")
    for value in (maker.zeros((2, 3), dtype), maker.empty((2, 3), dtype)):
        assert value.numpy().shape == (2, 3) and value.numpy().dtype == dtype
    assert not maker.zeros((2, 3), dtype).numpy().any()
