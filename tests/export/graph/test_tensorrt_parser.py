"""TensorRT with plugins parses the traced graphs as they are: they hold nothing that TensorRT 10.3 (JetPack 6) lacks.

Source of SUPPORTED: the operator matrix of its ONNX parser, docs/operators.md of onnx/onnx-tensorrt at release
10.1-GA ("opset 9 to opset 20"), of the operators these graphs could hold. Up to 10.3 its changelog only adds:
10.2 error handling, GRU and Squeeze; 10.3 `axes` of Slice as a tensor, another plugin behind ScatterElements.

int8 and int4 weights need opset 21. The matrix lists INT8 and INT4 for DequantizeLinear, without zero points; the
parser's source asks for positive scales, takes the block size from the shapes, and refuses no opset for being new. Of
blocks of INT8 weights it is not known whether the builder of 10.3 takes them; that of TensorRT-RTX does.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch

from engines.bundle.kinds import PARTS
from engines.bundle.precision import COLUMN, INT4, INT8, Scheme
from engines.bundle.tensors import Coding
from export.graph.bind import PLUGIN_ATTRIBUTES
from export.graph.quantize import rewrite
from export.graph.trace import trace
from plugins.registry import OPS
from tests.geometries import tiny

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
NUMBERS = FLOATS | {"INT32", "INT64"}
ANY = NUMBERS | {"BOOL"}
SUPPORTED = {
    "Abs": FLOATS, "Add": NUMBERS, "And": frozenset({"BOOL"}), "ArgMax": NUMBERS, "Cast": ANY | {"UINT8"},
    "Clip": FLOATS, "Concat": ANY, "Constant": ANY, "ConstantOfShape": ANY, "Conv": FLOATS, "Cos": FLOATS,
    "DequantizeLinear": FLOATS | {"INT4", "INT8"}, "Div": NUMBERS, "Equal": NUMBERS, "Erf": FLOATS,
    "Expand": ANY, "Flatten": ANY, "Gather": ANY, "GatherElements": ANY, "GatherND": ANY,
    "Gelu": FLOATS, "Gemm": FLOATS, "Greater": NUMBERS, "GreaterOrEqual": NUMBERS, "Identity": ANY,
    "LayerNormalization": FLOATS, "Less": NUMBERS, "LessOrEqual": NUMBERS, "MatMul": FLOATS, "Max": NUMBERS,
    "Min": NUMBERS, "Mul": NUMBERS, "Neg": NUMBERS, "Not": frozenset({"BOOL"}), "Or": frozenset({"BOOL"}),
    "Pow": FLOATS, "QuantizeLinear": FLOATS | {"INT8"},
    "Range": NUMBERS, "Reciprocal": FLOATS, "ReduceMax": NUMBERS, "ReduceMean": NUMBERS,
    "ReduceMin": NUMBERS, "ReduceSum": NUMBERS, "Reshape": ANY, "Shape": ANY, "Sigmoid": FLOATS, "Sin": FLOATS,
    "Slice": ANY, "Softmax": FLOATS, "Split": ANY, "Sqrt": FLOATS, "Squeeze": ANY, "Sub": NUMBERS, "Tanh": FLOATS,
    "Transpose": ANY, "Unsqueeze": ANY, "Where": ANY,
}  # fmt: skip
CONSTANT_INPUTS = {
    "ReduceMax": 1,
    "ReduceMean": 1,
    "ReduceMin": 1,
    "ReduceSum": 1,
    "Slice": 3,
    "Squeeze": 1,
    "Unsqueeze": 1,
}
GEOMETRIES = {
    "tiny": tiny(),
    "everything else": tiny(
        kv_heads=2, attention_bias=True, tied_embeddings=True, projector_depth=1, zoom=2,
        vision=replace(tiny().vision, activation="gelu"),
    ),
    "no zoom": tiny(zoom=1),
    "int8 pages": tiny(int8_pages=True),
    "int8 pages, lazy": tiny(int8_pages=True, lazy_pages=True),
    "int8 cache": tiny(int8_cache=True, kv_heads=2),
    "int8 both, lazy": tiny(int8_cache=True, int8_pages=True, lazy_pages=True),
    "page slots": tiny(lazy_pages=True, page_slots=5),
    "int8 both, page slots": tiny(int8_cache=True, int8_pages=True, lazy_pages=True, page_slots=5),
}  # fmt: skip
COMBINATIONS = [("tiny", "float32"), ("tiny", "bfloat16"), ("everything else", "float16"), ("no zoom", "float16")]
COMBINATIONS += [("int8 pages", "float16"), ("int8 pages", "bfloat16"), ("int8 pages, lazy", "float16")]
COMBINATIONS += [("int8 cache", "float16"), ("int8 cache", "bfloat16"), ("int8 both, lazy", "float16")]
COMBINATIONS += [("page slots", "float16"), ("int8 both, page slots", "bfloat16")]


def problems(model: ir.Model) -> list[str]:
    """What the parser of TensorRT 10.3 would stumble over."""
    found = []
    quantised = any(node.op_type == "DequantizeLinear" for node in model.graph.all_nodes())
    if model.opset_imports[""] > (21 if quantised else 20):
        found.append(f"opset {model.opset_imports['']}")
    found += [f"local function {identifier}" for identifier in model.functions]
    for node in model.graph.all_nodes():
        name = f"{node.op_type} {node.name}"
        types = {value.dtype.name if value.dtype else "unknown" for value in node.inputs if value is not None}
        if node.domain == "flex":
            kind = OPS.get(node.op_type)
            given = {key: each.as_int() for key, each in node.attributes.items() if key not in PLUGIN_ATTRIBUTES}
            needed = {*kind.attribute_names} - {*kind.defaults} if kind else set()
            known = kind is not None and needed <= {*given} <= {*kind.attribute_names}
            if (
                not known
                or len(kind(**given).inputs) != len(node.inputs)
                or not {*PLUGIN_ATTRIBUTES} <= {*node.attributes}
            ):
                found.append(f"{name}: no plugin of these attributes and inputs")
            elif {key: node.attributes[key].as_string() for key in PLUGIN_ATTRIBUTES} != PLUGIN_ATTRIBUTES:
                found.append(f"{name}: not found by its namespace")
            continue
        if node.domain or node.op_type not in SUPPORTED:
            found.append(f"{name}: not in the matrix")
            continue
        if node.op_type == "Cast":
            types.add(ir.DataType(node.attributes["to"].as_int()).name)
        if not types <= SUPPORTED[node.op_type] | {"INT64"}:  # shapes, axes, indices and repeats are INT64
            found.append(f"{name}: of {sorted(types)}")
        first = node.inputs[0].dtype.name if node.inputs else "INT64"
        if node.op_type != "Where" and first not in SUPPORTED[node.op_type]:
            found.append(f"{name}: of {first}")
        place = CONSTANT_INPUTS.get(node.op_type, len(node.inputs))
        if len(node.inputs) > place and ir.convenience.get_const_tensor(node.inputs[place]) is None:
            found.append(f"{name}: axes are no constant")
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            found.append(f"{name}: a branch")
        if node.op_type == "DequantizeLinear" and len(node.inputs) > 2:
            found.append(f"{name}: a zero point")
        if node.op_type == "LayerNormalization" and len([v for v in node.outputs if v.name]) > 1:
            found.append(f"{name}: more than one output")
    return found


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("geometry", "dtype"), COMBINATIONS)
def test_the_traced_graphs_parse(part, geometry, dtype):
    model = trace(part, GEOMETRIES[geometry], getattr(torch, dtype))
    assert len(model.graph) > 10
    assert not problems(model)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("precision", [INT4, INT8], ids=str)
def test_the_quantised_graphs_parse(part, precision):
    linear, columns, rows = Scheme(precision, 16), Scheme(INT8, COLUMN), Scheme(INT8, COLUMN, rows=True)
    model, coding = trace(part, GEOMETRIES["tiny"], torch.float16), Coding(linear, linear, columns)
    assert rewrite(model, coding.schemes(GEOMETRIES["tiny"])) > 0
    assert not problems(model)
    # No gather of int8 is listed, and TensorRT-RTX 1.7 builds none: they are refused there (engines/sizing/fit.py).
    rewrite(model, Coding(embeddings=rows).schemes(GEOMETRIES["tiny"]))
    assert {problem.split()[0] for problem in problems(model)} == ({"Gather"} if part == "decoder" else set())


def graph_of(op_type: str, dtype: ir.DataType, domain: str = "", opset: int = 20, **attributes: int) -> ir.Model:
    values = [ir.Value(name=f"in{index}", type=ir.TensorType(dtype), shape=ir.Shape([2])) for index in range(2)]
    node = ir.node(op_type, values, attributes, domain=domain)
    return ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": opset, "flex": 1}), ir_version=10)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (graph_of("Clip", ir.DataType.INT64), "Clip"),
        (graph_of("Add", ir.DataType.DOUBLE), "DOUBLE"),
        (graph_of("Add", ir.DataType.FLOAT, opset=23), "opset 23"),
        (graph_of("Attention", ir.DataType.FLOAT), "not in the matrix"),
        (graph_of("ReduceSum", ir.DataType.INT64), "axes are no constant"),
        (graph_of("DequantizeLinear", ir.DataType.INT4, opset=22), "opset 22"),
        (graph_of("SelectPages", ir.DataType.FLOAT, domain="flex", grid=3), "no plugin"),
    ],
)
def test_what_it_cannot_parse_is_found(model, text):
    assert any(text in problem for problem in problems(model))
