"""Tables of the vocabulary in 16 bits: ONNX Runtime's CPU reads rows of them, and makes float32 of no more than a
block; what comes out is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.bundle.precision import BF16, FP16, PRECISIONS, Precision
from export.graph import tables
from export.graph.bind import for_onnxruntime

VOCAB, HIDDEN = 1000, 64
STORED = {"float16": (np.float16, ir.DataType.FLOAT16), "bfloat16": (ml_dtypes.bfloat16, ir.DataType.BFLOAT16)}


def made(folder: Path, dtype: str, *, tied: bool = False, bias: bool = False, odd: int = 0) -> ir.Model:
    """ids [n] -> logits [n, vocab] float32: the tables of a model with nothing between them, in a file as a bundle's
    are, the head behind `odd` bytes."""
    numpy, kind = STORED[dtype]
    draw = np.random.default_rng(0)
    weights = {"embed": draw.standard_normal((VOCAB, HIDDEN)), "head": draw.standard_normal((VOCAB, HIDDEN)) / 8}
    graph_weights, content = {}, b""
    for name, values in weights.items():
        content += bytes(odd if name == "head" else 0)
        raw = values.astype(numpy).tobytes()
        tensor = ir.ExternalTensor(
            "weights", len(content), len(raw), kind, shape=ir.Shape(values.shape), name=name, base_dir=folder
        )
        graph_weights[name] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
        content += raw
    (folder / "weights").write_bytes(content)
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    rows = ir.node("Gather", [graph_weights["embed"], ids], {"axis": 0}, num_outputs=1)
    # What attention does to them: something that is computed in float32 on the CPU.
    hidden = ir.node("Mul", [rows.outputs[0], rows.outputs[0]], num_outputs=1)
    head = graph_weights["embed" if tied else "head"]
    inputs = [hidden.outputs[0], head]
    if bias:
        row = ir.Value(name="bias", shape=ir.Shape([VOCAB]), type=ir.TensorType(kind))
        row.const_value = ir.tensor(np.ones(VOCAB, numpy), name="bias")
        graph_weights["bias"] = row
        inputs.append(row)
    product = ir.node("Gemm", inputs, {"transB": 1}, num_outputs=1)
    logits = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT.value}, num_outputs=1)
    for node, name, shape in (
        (rows, "rows", HIDDEN), (hidden, "hidden", HIDDEN), (product, "product", VOCAB), (logits, "logits", VOCAB),
    ):  # fmt: skip
        value = node.outputs[0]
        value.name, value.shape, value.type = name, ir.Shape(["n", shape]), ir.TensorType(kind)
    logits.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    used = [name for name in graph_weights if name in {value.name for value in inputs} | {"embed"}]
    graph = ir.Graph(
        [ids], logits.outputs, nodes=[rows, hidden, product, logits],
        initializers=[graph_weights[name] for name in used], opset_imports={"": 20}, name="tables",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def run(tmp_path) -> Callable[..., tuple[np.ndarray, onnx.ModelProto]]:
    """run(model) -> logits of some ids, and the graph as ONNX Runtime makes it."""

    def answer(model: ir.Model) -> tuple[np.ndarray, onnx.ModelProto]:
        ir.save(model, tmp_path / "model.onnx")
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"ids": np.array([3, 999, 0, 3, 511])})
        return logits, onnx.load(tmp_path / "optimized.onnx")

    return answer


def widened(optimized: onnx.ModelProto) -> list[int]:
    """Values of each weight that the graph makes float32, in every run or for good."""
    sizes = {each.name: int(np.prod(each.dims)) for each in optimized.graph.initializer}
    folded = [sizes[each.name] for each in optimized.graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    casts = [node.input[0] for node in optimized.graph.node if node.op_type == "Cast"]
    return sorted(folded + [sizes[name] for name in casts if name in sizes])


def bound(model: ir.Model, precision: Precision, monkeypatch, *, left_alone: bool = False) -> ir.Model:
    monkeypatch.setattr(tables, "BLOCK", 4 * HIDDEN * 300)
    if left_alone:
        monkeypatch.setattr("export.graph.bind.read_tables_narrow", lambda model: None)
    made = for_onnxruntime(model, precision)
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("odd", [0, 256])
@pytest.mark.parametrize("tied", [False, True])
def test_float16_tables(tmp_path, monkeypatch, run, tied, odd):
    expected, before = run(bound(made(tmp_path, "float16", tied=tied, odd=odd), FP16, monkeypatch, left_alone=True))
    found, after = run(bound(made(tmp_path, "float16", tied=tied, odd=odd), FP16, monkeypatch))
    assert np.array_equal(found, expected)
    whole, block = VOCAB * HIDDEN, 300 * HIDDEN
    assert max(widened(before)) == whole  # the premise: otherwise nobody needs this
    assert widened(after) == [100 * HIDDEN, block, block, block]


@pytest.mark.parametrize("precision", [BF16, PRECISIONS["int4"]])
def test_tables_of_precisions_that_compute_in_float32(tmp_path, monkeypatch, run, precision):
    """Rows of the embeddings are read as they are stored; the head is float32, and one copy."""
    expected, before = run(bound(made(tmp_path, precision.dtype), precision, monkeypatch, left_alone=True))
    found, after = run(bound(made(tmp_path, precision.dtype), precision, monkeypatch))
    assert np.array_equal(found, expected)
    assert widened(before) == [VOCAB * HIDDEN] * 2 and widened(after) == [VOCAB * HIDDEN]


def test_a_head_with_a_bias_is_left_alone(tmp_path, monkeypatch, run):
    model = bound(made(tmp_path, "float16", bias=True), FP16, monkeypatch)
    assert [node.op_type for node in model.graph].count("Gemm") == 1
    expected, _ = run(bound(made(tmp_path, "float16", bias=True), FP16, monkeypatch, left_alone=True))
    assert np.array_equal(run(model)[0], expected)


def test_cuda_and_float32_are_left_alone(tmp_path):
    for precision, cuda in ((FP16, True), (PRECISIONS["fp32"], False)):
        model = for_onnxruntime(made(tmp_path, "float16"), precision, cuda=cuda)
        kinds = [node.op_type for node in model.graph]
        assert kinds.count("Gemm") == 1 and "Concat" not in kinds
