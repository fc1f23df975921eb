"""Traced graphs that read weights as codes with scales (export/weights/scheme.py)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from engines.bundle.precision import COLUMN, Scheme
from engines.errors import ExportError
from export.weights.scheme import SCALE_SUFFIX, code_dtype, stored_shape

QUANTISED_OPSET = 21  # the first with int4, and with blocks in DequantizeLinear; float8 is older


def rewrite(model: ir.Model, schemes: Mapping[str, Scheme]) -> int:
    """Make a traced graph read those weights of `schemes` it holds as quantised, in place; returns how many it does.

    The weight keeps its name, its scales are called `<name>.scale`; both are still without bytes.
    """
    graph, count = model.graph, 0
    for name, scheme in schemes.items():
        weight = graph.initializers.get(name)
        if weight is None:
            continue
        (user,) = [use.node for use in weight.uses()] if len(weight.uses()) == 1 else (None,)
        if user is None or user.op_type not in (("Gather",) if scheme.rows else ("Transpose", "Gemm")):
            use = "a table of rows" if scheme.rows else "the weight of one linear layer"
            raise ExportError(f"the graph does not read {name} as {use}")
        dtype = weight.dtype
        codes, scales = stored_shape(scheme, tuple(weight.shape.numpy()))
        weight.shape, weight.dtype = ir.Shape(codes), code_dtype(scheme)
        scale = ir.Value(name=name + SCALE_SUFFIX, shape=ir.Shape(scales), type=ir.TensorType(dtype))
        graph.initializers[scale.name] = scale
        (_gather if scheme.rows else _multiply)(graph, user, weight, scale, scheme)
        count += 1
    if count:
        model.opset_imports[""] = QUANTISED_OPSET
    return count


def _multiply(graph: ir.Graph, user: ir.Node, weight: ir.Value, scale: ir.Value, scheme: Scheme) -> None:
    """Codes of a linear layer, unpacked right before its product; `user` reads the weight there."""
    attributes = {"axis": 1} if scheme.block == COLUMN else {"axis": 0, "block_size": scheme.block}
    read = ir.node("DequantizeLinear", [weight, scale], attributes, name=f"node_dequantize_{weight.name}")
    _describe(read, f"{weight.name}.float", scale.dtype, weight.shape)
    graph.insert_before(user, read)
    if user.op_type == "Transpose":
        ir.convenience.replace_all_uses_with(user.outputs[0], read.outputs[0])
        graph.remove(user, safe=True)
    else:  # lm_head: x [B, K] times the transposed weight, no bias
        _replace(graph, user, ir.node("MatMul", [user.inputs[0], read.outputs[0]], name=user.name))


def _gather(graph: ir.Graph, user: ir.Node, weight: ir.Value, scale: ir.Value, scheme: Scheme) -> None:
    """Rows of codes and their scales, gathered, and only these unpacked: with a scale of 1, since DequantizeLinear has
    none for each row of what was gathered."""
    ids, name = user.inputs[1], weight.name
    one = ir.Value(name=f"{name}.one", shape=ir.Shape(()), type=ir.TensorType(scale.dtype))
    one.const_value = ir.tensor(np.ones((), scale.dtype.numpy()), scale.dtype, name=one.name)
    last = ir.Value(name=f"{name}.last", shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.INT64))
    last.const_value = ir.tensor(np.array([-1]), ir.DataType.INT64, name=last.name)
    for constant in (one, last):
        graph.initializers[constant.name] = constant
    rows, steps = (ir.node("Gather", [table, ids], {"axis": 0}) for table in (weight, scale))
    whole = ir.node("DequantizeLinear", [rows.outputs[0], one])
    column = ir.node("Unsqueeze", [steps.outputs[0], last])
    shape = user.outputs[0].shape
    _describe(rows, f"{name}.rows", weight.dtype, shape)
    _describe(steps, f"{name}.steps", scale.dtype, ids.shape)
    _describe(whole, f"{name}.whole", scale.dtype, shape)
    _describe(column, f"{name}.column", scale.dtype, ir.Shape((*ids.shape, 1)))
    for node in (rows, steps, whole, column):
        node.name = f"node_{node.outputs[0].name}"
        graph.insert_before(user, node)
    _replace(graph, user, ir.node("Mul", [whole.outputs[0], column.outputs[0]], name=user.name))


def _describe(node: ir.Node, name: str, dtype: ir.DataType, shape: ir.Shape) -> None:
    """Name the one output of a node, and say what it is."""
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, shape


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, with its output's name."""
    output = old.outputs[0]
    _describe(new, output.name, output.dtype, output.shape)
    output.name = f"{output.name}.unused"
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(output, new.outputs[0])
    graph.remove(old, safe=True)
