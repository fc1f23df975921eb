"""Passes that take out of a bound graph what every layer does again or for nothing. They change no result."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


def share_sizes(model: ir.Model) -> None:
    """Read a size that several inputs share, like the capacity of all caches, from the first of them, in place.

    What each layer makes of it is then seen to be the same.
    """
    first: dict[tuple, ir.Value] = {}
    for node in model.graph.all_nodes():
        source = node.inputs[0] if node.op_type == "Shape" and not node.domain else None
        if source is None or source.shape is None or not source.is_graph_input():
            continue
        start, end = (node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", None)))
        sizes = tuple(size if isinstance(size, int) else size.value for size in source.shape[start:end])
        if None not in sizes:
            node.replace_input_with(0, first.setdefault(sizes, source))


def drop_idle_reshapes(model: ir.Model) -> None:
    """Take out each Reshape that leaves its input's shape, or that of the Reshape before it, as it is; in place.

    Attention's bodies regroup heads for key/value heads that several query heads share; where each has its own, there
    is nothing to regroup.
    """
    unknown = [value for node in model.graph for value in node.outputs if value.shape is None]
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        before = source.producer()
        again = before is not None and before.op_type == "Reshape" and not before.domain
        if _keeps_shape(source, node):
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
        elif again and _same_shape(before.inputs[0], node.outputs[0]):
            ir.convenience.replace_all_uses_with(node.outputs[0], before.inputs[0])
    for value in unknown:  # what was inferred is not stored: its made-up symbols would only be noise
        value.shape = None


def _keeps_shape(source: ir.Value, node: ir.Node) -> bool:
    """Whether each target size is 0 (keep) or the size that is there; one more may be open (-1)."""
    target = ir.convenience.get_const_tensor(node.inputs[1])
    if target is None or source.shape is None or node.attributes.get_int("allowzero", 0):
        return False
    sizes = target.numpy().tolist()
    if len(sizes) != len(source.shape) or sizes.count(-1) > 1:
        return False
    return all(size in (0, -1) or size == known for size, known in zip(sizes, source.shape, strict=True))


def _same_shape(left: ir.Value, right: ir.Value) -> bool:
    if left.shape is None or right.shape is None:
        return False
    named = all(isinstance(size, int) or size.value is not None for size in left.shape)
    return named and list(left.shape) == list(right.shape)


def drop_idle_casts(model: ir.Model) -> None:
    """Take out each Cast and CastLike to the dtype that its input has, in place; ONNX Runtime keeps those in branches.

    Attention's bodies return from float32 to the model's dtype, which may be float32, too.
    """
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for node in list(model.graph.all_nodes()):
        if node.domain or node.op_type not in ("Cast", "CastLike") or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        target = node.attributes["to"].as_int() if node.op_type == "Cast" else node.inputs[1].dtype
        if source.dtype is not None and source.dtype == target:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            node.graph.remove(node, safe=True)
