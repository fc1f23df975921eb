"""The tables of the vocabulary on ONNX Runtime's CPU, which has no products of 16-bit floats: it computes in float32.

Left to itself it makes all of a table float32: embeddings before it reads a row of them (once, to be kept, or with
float16 in every run), the head's weights whole before a product with them. Here rows are read as they are stored, and
the head's are made float32 block by block, in memory that one block after the other uses. Results are the same, but for
the order of float32 sums in the head (2e-7 in the logits of a model of 118M weights).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

# Bytes of float32 that a block of the head has: in this memory each of them is widened and multiplied.
BLOCK = 4 << 20
NARROW = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def read_tables_narrow(model: ir.Model) -> None:
    """Read rows, and multiply blocks, of the weights of a graph bound to ONNX Runtime's CPU, in place: see above."""
    for node in list(model.graph):
        if node.op_type == "Gather" and not node.domain:
            _rows_first(node)
        elif node.op_type == "Gemm" and not node.domain:
            _in_blocks(node)
    RemoveUnusedNodesPass()(model)


def _rows_first(node: ir.Node) -> None:
    """A Gather from a weight, or from one that a Cast widens: it reads rows as stored, which are cast then."""
    source = node.inputs[0]
    cast = source.producer()
    widened = cast is not None and cast.op_type == "Cast"
    weight = cast.inputs[0] if cast is not None and widened else source
    if weight is None or not weight.is_initializer() or weight.dtype not in NARROW:
        return
    narrow, rows = weight.dtype, node.outputs[0]
    node.replace_input_with(0, weight)
    # To float32 and, where the graph goes on in the table's own dtype, back: ONNX Runtime takes such a pair out, but
    # beside a Cast it leaves the Gather as it is, and does not take it for one that has to compute in float32.
    after: ir.Node = node
    for dtype in (ir.DataType.FLOAT,) if widened else (ir.DataType.FLOAT, narrow):
        value = after.outputs[0]
        following = ir.node("Cast", [value], {"to": dtype.value}, num_outputs=1)
        following.outputs[0].name = f"{rows.name}.{dtype.name.lower()}"
        following.outputs[0].dtype, following.outputs[0].shape = dtype, rows.shape
        ir.convenience.replace_all_uses_with(value, following.outputs[0])
        following.replace_input_with(0, value)
        assert node.graph is not None
        node.graph.insert_after(after, following)
        after = following
    rows.dtype = narrow


def _in_blocks(node: ir.Node) -> None:
    """A Gemm with a transposed float16 weight [N, K] of a file and no bias: one for each block of its rows."""
    graph, weight = node.graph, node.inputs[1]
    tensor = None if weight is None else weight.const_value
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype != ir.DataType.FLOAT16 or graph is None:
        return
    n, k = tensor.shape.numpy()
    rows, output = max(1, BLOCK // (4 * k)), node.outputs[0]
    plain = node.attributes.get_int("transB", 0) and all(each is None for each in node.inputs[2:])
    if rows >= n or not plain or output.is_graph_output():
        return
    assert weight is not None
    # Float32 as they come, if that is what the graph makes of them: joined in float16 they would be rounded to it.
    users = [use.node for use in output.uses()]
    cast = users[0] if len(users) == 1 and users[0].op_type == "Cast" else None
    parts = []
    for begin in range(0, n, rows):
        count, name = min(rows, n - begin), f"{weight.name}.{begin}"
        piece = ir.ExternalTensor(
            tensor.location, (tensor.offset or 0) + begin * k * 2, count * k * 2, tensor.dtype,
            shape=ir.Shape((count, k)), name=name, base_dir=tensor.base_dir,
        )  # fmt: skip
        value = ir.Value(name=name, shape=piece.shape, type=ir.TensorType(piece.dtype), const_value=piece)
        graph.initializers[name] = value
        part = ir.node("Gemm", [node.inputs[0], value], node.attributes, num_outputs=1, name=f"{node.name}.{begin}")
        part.outputs[0].name, part.outputs[0].dtype = f"{output.name}.{begin}", output.dtype
        graph.insert_before(node, part)
        parts.append(part if cast is None else ir.node("Cast", part.outputs, cast.attributes, num_outputs=1))
        if cast is not None:
            parts[-1].outputs[0].name = f"{part.outputs[0].name}.cast"
            graph.insert_before(node, parts[-1])
    whole = output if cast is None else cast.outputs[0]
    joined = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": 1}, num_outputs=1)
    joined.outputs[0].name, whole.name = whole.name, f"{output.name}.whole"
    joined.outputs[0].dtype, joined.outputs[0].shape = whole.dtype, whole.shape
    graph.insert_before(node, joined)
    ir.convenience.replace_all_uses_with(whole, joined.outputs[0], replace_graph_outputs=True)
