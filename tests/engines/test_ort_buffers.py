"""Tensors on a device, as far as the CPU can show: what clears them there does it by address."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from engines.errors import BackendError
from engines.ort import buffers
from engines.ort.buffers import Buffers


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Identity"])
def test_the_graphs_are_onnx(operator):
    model = onnx.load_from_string(buffers._filling_graph(operator))
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert node.op_type == operator and model.opset_import[0].version == 19
    assert [onnx.numpy_helper.to_array(each.t).tolist() for each in node.attribute] == [[0]] * (operator != "Identity")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.int64])
@pytest.mark.parametrize("piece", [1 << 30, 100, 1])
def test_a_tensor_is_cleared_where_it_lies(monkeypatch, dtype, piece):
    monkeypatch.setattr(buffers, "PIECE", piece)
    maker, array = Buffers("cpu"), np.ones((9, 3, 5), dtype)
    value = maker.of(array[2:5])
    maker.clear(value)
    assert not value.numpy().any() and value.shape() == [3, 3, 5]
    assert array[:2].all() and array[5:].all() and not array[2:5].any()


@pytest.mark.parametrize("piece", [1 << 30, 100, 1])
def test_a_tensor_is_copied_where_it_lies(monkeypatch, piece):
    monkeypatch.setattr(buffers, "PIECE", piece)
    maker, array = Buffers("cpu"), np.arange(9 * 15).reshape(9, 3, 5).astype(np.float16)
    target = np.zeros_like(array)
    maker.copy(maker.of(array[2:5]), maker.of(target[3:6]))
    assert np.array_equal(target[3:6], array[2:5]) and not target[:3].any() and not target[6:].any()
    assert array[0, 0, 1] == 1  # the source is as it was


def test_tensors_of_other_sizes_are_not_copied():
    maker = Buffers("cpu")
    with pytest.raises(BackendError, match="12 bytes for a tensor of 8"):
        maker.copy(maker.of(np.zeros(3, np.float32)), maker.of(np.zeros(2, np.float32)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int64"])
def test_zeros_and_empty_have_their_shape_and_dtype(dtype):
    maker = Buffers("cpu")
    for value in (maker.zeros((2, 3), dtype), maker.empty((2, 3), dtype)):
        assert value.numpy().shape == (2, 3) and value.numpy().dtype == dtype
    assert not maker.zeros((2, 3), dtype).numpy().any()
