"""Traced graphs with bare flex:: nodes -> graphs a backend runs. Needs onnx-ir and onnxscript; never torch."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    InlinePass,
    RemoveUnusedNodesPass,
)
from onnxscript import OnnxFunction
from onnxscript.optimizer import fold_constants

from engines.bundle.precision import Precision
from engines.errors import ExportError
from export.graph.tidy import drop_idle_casts, drop_idle_reshapes, share_sizes
from plugins.cached_attention import onnx_body as cached_attention
from plugins.cached_attention import onnx_int8 as int8_cached_attention
from plugins.cached_attention import onnx_static as static_cached_attention
from plugins.hierarchical_attention import onnx_body as hierarchical_attention
from plugins.hierarchical_attention import onnx_cuda as cuda_hierarchical_attention
from plugins.hierarchical_attention import onnx_int8 as int8_hierarchical_attention
from plugins.hierarchical_attention import onnx_static as static_hierarchical_attention
from plugins.op import INT8_CACHE, INT8_PAGES, PAGE_SLOTS, STORES
from plugins.project_pages import onnx_body as project_pages
from plugins.project_pages import onnx_int8 as int8_project_pages
from plugins.project_pages import onnx_slots as slots_project_pages
from plugins.select_pages import onnx_body as select_pages
from plugins.select_pages import onnx_static as static_select_pages

BOUND_OPSET = 24  # TensorScatter
PLUGIN_ATTRIBUTES = {"plugin_namespace": "flex", "plugin_version": "1"}  # of the flex:: nodes, for TensorRT's parser
Bodies = Mapping[tuple[str, ...], tuple[OnnxFunction, ...]]  # op, then those of STORES it has -> its functions
SHARED: Bodies = {
    ("SelectPages",): select_pages.FUNCTIONS,
    ("CachedAttention",): cached_attention.FUNCTIONS,
    ("ProjectPages",): project_pages.FUNCTIONS,
    ("ProjectPages", INT8_PAGES): int8_project_pages.FUNCTIONS,
    ("ProjectPages", PAGE_SLOTS): slots_project_pages.FUNCTIONS,
    ("ProjectPages", INT8_PAGES, PAGE_SLOTS): slots_project_pages.INT8_FUNCTIONS,
}  # of ONNX Runtime's CPU and its CUDA provider
DYNAMIC: Bodies = SHARED | {
    ("CachedAttention", INT8_CACHE): int8_cached_attention.FUNCTIONS,
    ("HierarchicalAttention",): hierarchical_attention.FUNCTIONS,
    ("HierarchicalAttention", INT8_PAGES): int8_hierarchical_attention.FUNCTIONS,
    ("HierarchicalAttention", INT8_CACHE): hierarchical_attention.INT8_CACHE,
    ("HierarchicalAttention", INT8_PAGES, INT8_CACHE): int8_hierarchical_attention.INT8_CACHE,
}
CUDA: Bodies = SHARED | {
    ("CachedAttention", INT8_CACHE): int8_cached_attention.CUDA_FUNCTIONS,
    ("HierarchicalAttention",): cuda_hierarchical_attention.FUNCTIONS,
    ("HierarchicalAttention", INT8_PAGES): cuda_hierarchical_attention.INT8_FUNCTIONS,
    ("HierarchicalAttention", INT8_CACHE): cuda_hierarchical_attention.INT8_CACHE,
    ("HierarchicalAttention", INT8_PAGES, INT8_CACHE): cuda_hierarchical_attention.INT8_BOTH,
}
# None for an int8 cache: what updates a cache in place, TensorRT's IKVCacheUpdateLayer, takes floats alone.
STATIC: Bodies = {
    ("SelectPages",): static_select_pages.FUNCTIONS,
    ("CachedAttention",): static_cached_attention.FUNCTIONS,
    ("HierarchicalAttention",): static_hierarchical_attention.FUNCTIONS,
    ("HierarchicalAttention", INT8_PAGES): static_hierarchical_attention.INT8_FUNCTIONS,
}
# Operators of the traced graphs whose meaning is the same in opset 20 (DequantizeLinear: 21) and 24: later versions
# only admit more types.
STABLE_SINCE_20 = {
    "Abs", "Add", "And", "ArgMax", "Cast", "Concat", "Constant", "ConstantOfShape", "Cos", "DequantizeLinear", "Div",
    "Equal", "Expand",
    "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "Greater", "Identity", "LayerNormalization",
    "Less", "LessOrEqual", "MatMul", "Max", "Min", "Mul", "Neg", "Pow", "QuantizeLinear", "Range",
    "Reciprocal", "ReduceMax", "ReduceMean",
    "ReduceSum", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub",
    "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def for_onnxruntime(model: ir.Model, precision: Precision, *, cuda: bool = False) -> ir.Model:
    """Bind a traced graph to ONNX Runtime, in place: dynamic ONNX bodies for the flex:: nodes, or with `cuda` those
    that keep its CUDA provider from waiting: no branch or loop, but for lazy projection, which skips what is there.

    Graphs of a precision that is widened compute in float32, over weights and scales that stay as they are stored.
    """
    _bind(model, CUDA if cuda else DYNAMIC)
    if precision.widened:
        _widen(model, ir.DataType[precision.dtype.upper()])
    drop_idle_casts(model)
    return model


def for_plugin_free(model: ir.Model, capacity: int) -> ir.Model:
    """Bind a traced decoder to TensorRT without plugins, in place: static ONNX bodies, a cache of `capacity` tokens.

    TensorRT updates a cache in place only when its capacity is a number. bfloat16 graphs stay bfloat16.
    """
    symbol = ir.SymbolicDim("capacity")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(capacity if size == symbol else size for size in value.shape)
    _bind(model, STATIC)
    return model


def _bind(model: ir.Model, bodies: Bodies) -> None:
    """Replace the flex:: nodes by `bodies`, and tidy up. ExportError for a node that has none."""
    unknown = {node.op_type for node in model.graph if not node.domain} - STABLE_SINCE_20
    if unknown:
        raise ExportError(
            f"the graph holds {sorted(unknown)}",
            expected=f"operators known to mean the same in opset 20 and {BOUND_OPSET}",
            fix="check them against the ONNX changelog and add them to STABLE_SINCE_20 in export/graph/bind.py",
        )
    model.opset_imports[""] = BOUND_OPSET
    used: set[tuple[str, ...]] = set()
    for node in model.graph:
        if node.domain == "flex":
            used.add((node.op_type, *(store for store in STORES if node.attributes.get_int(store, 0))))
            for name in (*PLUGIN_ATTRIBUTES, *STORES):  # no function has them
                node.attributes.pop(name, None)
    unbound = used - bodies.keys()
    if unbound:
        raise ExportError(
            f"no ONNX body for {sorted(map(' of '.join, unbound))}",
            expected="flex:: nodes of export/graph/bind.py's bodies",
        )
    named: dict[str, OnnxFunction] = {}
    for key in sorted(used):  # in an order that is the same in every process
        for function in bodies[key]:
            if named.setdefault(function.name, function) is not function:
                raise ExportError(
                    f"two ONNX functions {function.name} in the bodies of {sorted(map(' of '.join, used))}",
                    expected="a name of its own for each function",
                    fix="rename one of them in plugins/",
                )
    for function in named.values():
        bound = ir.serde.deserialize_function(function.to_function_proto())
        model.functions[bound.identifier()] = bound
    # Inlined here, not by the backend: it would keep what nobody reads (the maps of the first layers), and compute in
    # every layer what is the same in all.
    InlinePass()(model)
    RemoveUnusedNodesPass()(model)
    fold_constants(model, should_fold=_reads_no_weight)
    _merge_constants(model.graph)
    share_sizes(model)
    drop_idle_reshapes(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)


def _reads_no_weight(node: ir.Node) -> bool | None:
    """False forbids folding, None leaves it to the folder: a folded weight would be a copy inside the .onnx file."""
    tensors = (value.const_value for value in node.inputs if value is not None)
    return False if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors) else None


def _merge_constants(graph: ir.Graph) -> None:
    """One of each folded constant, so that equal computations on them are seen to be equal."""
    first: dict[tuple, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):  # a weight
            continue
        same = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if same is not value:
            ir.convenience.replace_all_uses_with(value, same)
            del graph.initializers[name]


def _widen(model: ir.Model, narrow: ir.DataType) -> None:
    """Everything of dtype `narrow` becomes float32, but for initializers, which are cast."""
    wide, graph = ir.DataType.FLOAT, model.graph
    first = graph[0]
    for value in list(graph.initializers.values()):
        if value.dtype == narrow:
            cast = ir.node("Cast", [value], {"to": wide.value}, num_outputs=1)
            cast.outputs[0].name = f"{value.name}.float32"
            cast.outputs[0].dtype, cast.outputs[0].shape = wide, value.shape
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(first, cast)
    for node in graph.all_nodes():
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow.value:
            node.attributes["to"] = ir.AttrInt64("to", wide.value)
        for value in node.outputs:
            if value.dtype == narrow:
                value.dtype = wide
    for part in (graph, *graph.subgraphs()):  # the bodies of loops have typed inputs, too
        for value in part.inputs:
            if value.dtype == narrow:
                value.dtype = wide
