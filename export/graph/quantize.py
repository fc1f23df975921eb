"""Traced graphs that read their linear layers' weights as codes with scales (export/weights/scheme.py)."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from engines.bundle.precision import COLUMN
from engines.errors import ExportError
from export.weights.scheme import SCALE_SUFFIX, Scheme

QUANTISED_OPSET = 21  # the first with int4, and with blocks in DequantizeLinear; float8 is older


def rewrite(model: ir.Model, names: Iterable[str], scheme: Scheme) -> int:
    """Make a traced graph read those of `names` it holds as quantised, in place; returns how many it does.

    The weight keeps its name, its scales are called `<name>.scale`; both are still without bytes.
    """
    graph, count = model.graph, 0
    for name in names:
        weight = graph.initializers.get(name)
        if weight is None:
            continue
        (user,) = [use.node for use in weight.uses()] if len(weight.uses()) == 1 else (None,)
        if user is None or user.op_type not in ("Transpose", "Gemm"):
            raise ExportError(f"the graph does not read {name} as the weight of one linear layer")
        n, k = weight.shape.numpy()
        dtype = weight.dtype
        weight.shape, weight.dtype = ir.Shape((k, n)), scheme.dtype
        columns = scheme.block == COLUMN
        shape = (n,) if columns else (k // scheme.block, n)
        scale = ir.Value(name=name + SCALE_SUFFIX, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        graph.initializers[scale.name] = scale
        attributes = {"axis": 1} if columns else {"axis": 0, "block_size": scheme.block}
        read = ir.node("DequantizeLinear", [weight, scale], attributes, name=f"node_dequantize_{name}")
        read.outputs[0].name, read.outputs[0].dtype, read.outputs[0].shape = f"{name}.float", dtype, ir.Shape((k, n))
        graph.insert_before(user, read)
        if user.op_type == "Transpose":
            ir.convenience.replace_all_uses_with(user.outputs[0], read.outputs[0])
        else:  # lm_head: x [B, K] times the transposed weight, no bias
            product = ir.node("MatMul", [user.inputs[0], read.outputs[0]], name=user.name)
            product.outputs[0].dtype, product.outputs[0].shape = user.outputs[0].dtype, user.outputs[0].shape
            product.outputs[0].name, user.outputs[0].name = user.outputs[0].name, f"{name}.unused"
            graph.insert_before(user, product)
            ir.convenience.replace_all_uses_with(user.outputs[0], product.outputs[0])
        graph.remove(user, safe=True)
        count += 1
    if count:
        model.opset_imports[""] = QUANTISED_OPSET
    return count
