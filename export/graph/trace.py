"""PyTorch modules -> ONNX graphs with bare flex:: nodes and no weights.

Parameters are fake while tracing: a 7B decoder takes the memory of its graph. Initializers keep the state-dict names;
`export/weights/write.py` gives them their bytes.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import onnxscript
import onnxscript.optimizer
import torch
from onnxscript import opset20
from onnxscript.values import Opset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from engines.bundle.specs import IO_OF_PART, projected_sizes
from export.graph.bind import PLUGIN_ATTRIBUTES
from export.network.parts import module_of
from plugins.op import INT8_CACHE, INT8_PAGES, PAGE_SLOTS

TRACED_OPSET = 20  # the newest that TensorRT 10.3 (JetPack 6) parses; the flex:: functions bring what is newer
OP_NAMES = {
    "select_pages": ("SelectPages", 2),
    "cached_attention": ("CachedAttention", 4),
    "cached_attention_int8_cache": ("CachedAttention", 6, {INT8_CACHE: 1}),
    "hierarchical_attention": ("HierarchicalAttention", 4),
    "hierarchical_attention_int8": ("HierarchicalAttention", 4, {INT8_PAGES: 1}),
    "hierarchical_attention_int8_cache": ("HierarchicalAttention", 6, {INT8_CACHE: 1}),
    "hierarchical_attention_int8_both": ("HierarchicalAttention", 6, {INT8_PAGES: 1, INT8_CACHE: 1}),
    "project_pages": ("ProjectPages", 3),
    "project_pages_int8": ("ProjectPages", 5, {INT8_PAGES: 1}),
    "project_pages_slots": ("ProjectPages", 3, {PAGE_SLOTS: 1}),
    "project_pages_int8_slots": ("ProjectPages", 5, {INT8_PAGES: 1, PAGE_SLOTS: 1}),
}  # in torch -> in ONNX: op, number of outputs, attributes that torch's op has not
BATCH, STEPS, CAPACITY = torch.export.Dim("batch"), torch.export.Dim("steps"), torch.export.Dim("capacity")
TILES = torch.export.Dim("tiles")


def trace(part: str, geometry: Geometry, dtype: torch.dtype) -> ir.Model:
    """The graph of one part: "vision", "pages" or "decoder" (their inputs and outputs: engines/bundle/specs.py).

    The decoder's debugging outputs (map.N, hidden.N) are values of the graph, not outputs: tools can mark them.
    """
    module = module_of(part, geometry, dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # buffers are real
    _fake_parameters(module, mode)
    with mode:
        args, shapes = {"vision": _vision, "pages": _pages, "decoder": _decoder}[part](geometry, dtype)
    inputs, outputs = IO_OF_PART[part](geometry)
    names = [spec.name for spec in outputs]
    debugging = []
    if part == "decoder":
        debugging = [f"map.{layer}" for layer in geometry.selecting_layers]
        debugging += [f"hidden.{layer}" for layer in range(geometry.layers + 1)]
    model = _export(module, args, shapes, [spec.name for spec in inputs], names + debugging)
    for _ in debugging:  # one by one: values of a deleted slice stay marked as outputs, and their types are not saved
        model.graph.outputs.pop()
    model.graph.name = part
    return model


def _fake_parameters(module: nn.Module, mode: FakeTensorMode) -> None:
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                fake = FakeTensor(mode, parameter.data, torch.device("cpu"))
                child._parameters[name] = nn.Parameter(fake, requires_grad=False)


# Example arguments and their dynamic axes. Each argument is a tensor of its own: the tracer merges aliases.


def _vision(g: Geometry, dtype: torch.dtype) -> tuple[tuple, tuple]:
    return (torch.zeros(2, 3, g.lowres, g.lowres),), ({0: TILES},)


def _pages(g: Geometry, dtype: torch.dtype) -> tuple[tuple, tuple]:
    tiles = torch.zeros(2 * g.zoom**2, g.image_tokens, g.hidden, dtype=dtype)
    by_tile = BATCH if g.zoom == 1 else g.zoom**2 * BATCH  # the tracer takes no factor of 1
    return (tiles, torch.zeros(2, dtype=torch.int64)), ({0: by_tile}, {0: BATCH})


def _decoder(g: Geometry, dtype: torch.dtype) -> tuple[tuple, tuple]:
    batch, steps, capacity, reading = 2, 3, g.image_tokens + 8, len(g.reading_layers)

    def integers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def floats(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def stores(layers: int, shape: tuple[int, ...], int8: bool) -> list[torch.Tensor]:
        if not int8:
            return [floats(*shape) for _ in range(layers)]
        kept = [torch.zeros(shape, dtype=torch.int8) for _ in range(layers)]
        return kept + [torch.zeros(shape[:-1]) for _ in range(layers)]

    def cache() -> list[torch.Tensor]:
        return stores(g.layers, (batch, g.kv_heads, capacity, g.head_dim), g.int8_cache)

    def store() -> list[torch.Tensor]:
        return stores(reading, (batch, g.kv_heads, g.stored_pages, page_size(g), g.head_dim), g.int8_pages)

    features = floats(batch, g.image_tokens, g.hidden)
    rows = integers(batch), integers(batch, 2), integers(batch)
    args = (integers(batch, steps), integers(batch), features, *rows, cache(), cache(), store(), store())
    by_cache = [{0: BATCH, 2: CAPACITY}] * (g.layers * (1 + g.int8_cache))
    by_store = [{0: BATCH}] * (reading * (1 + g.int8_pages))
    shapes = {0: BATCH, 1: STEPS}, *[{0: BATCH}] * 5, by_cache, by_cache, by_store, by_store
    if not g.lazy_pages:
        return args, shapes
    places = batch, g.pages, page_size(g)
    turn = (torch.zeros(*places, g.head_dim // 2) for _ in range(2))
    projected = integers(batch, *projected_sizes(g))
    return (*args, floats(*places, g.hidden), *turn, projected), (*shapes, *[{0: BATCH}] * 4)


def _export(module: nn.Module, args: tuple, shapes: tuple, inputs: list[str], outputs: list[str]) -> ir.Model:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # deprecations inside torch.export
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            opset_version=TRACED_OPSET,
            custom_translation_table=_translations(),
            optimize=False,
            verbose=False,
        )
    model = program.model
    parameters = {name for name, _ in module.named_parameters()}
    for name in parameters & model.graph.initializers.keys():
        model.graph.initializers[name].const_value = None
    with _quiet("onnx_ir"):  # it warns of every initializer without a value, which is all of them here
        onnxscript.optimizer.optimize_ir(model, inline=False)
    for node in model.graph:
        if node.domain == "flex":  # TensorRT before 10.10 looks for a plugin by these, not by the domain
            for name, value in PLUGIN_ATTRIBUTES.items():
                node.attributes[name] = ir.AttrString(name, value)
    for node in model.graph.all_nodes():  # stack traces and scopes of the tracer: noise that names this machine's paths
        node.metadata_props.clear()
        node.doc_string = None
    for initializer in model.graph.initializers.values():
        initializer.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_version = None
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors from this logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _translations() -> dict[Any, Callable]:
    """torch op -> bare node of the flex domain, attributes by keyword."""
    opset = Opset("flex", 1)

    def translation(
        overload: torch._ops.OpOverload, name: str, outputs: int, constants: Mapping[str, int] = MappingProxyType({})
    ) -> Callable:
        schema = overload._schema
        tensors = [argument.name for argument in schema.arguments if isinstance(argument.type, torch.TensorType)]
        attributes = [argument.name for argument in schema.arguments if argument.name not in tensors]
        op = onnxscript.values.Op(opset, name, _op_schema(name, tensors, [*attributes, *constants], outputs))

        def emit(*args: Any) -> Sequence[Any]:
            values = dict(zip([argument.name for argument in schema.arguments], args, strict=True))
            return op(*(values[key] for key in tensors), **{key: values[key] for key in attributes}, **constants)

        return emit

    table = {
        getattr(torch.ops.flex, torch_name).default: translation(getattr(torch.ops.flex, torch_name).default, *names)
        for torch_name, names in OP_NAMES.items()
    }
    return table | {torch.ops.flex.to_int8.default: _to_int8}


def _to_int8(x: Any) -> Any:
    """In steps of 1 QuantizeLinear is the rounding to int8, ties to even."""
    one, zero = opset20.Constant(value_float=1.0), opset20.Constant(value=ir.tensor(0, ir.DataType.INT8))
    return opset20.QuantizeLinear(x, one, zero)  # type: ignore[type-var]  # its annotation knows tensors, not Constant's


def _op_schema(name: str, tensors: list[str], attributes: list[str], outputs: int):
    import onnx

    schema = onnx.defs.OpSchema
    return schema(
        name,
        "flex",
        1,
        inputs=[schema.FormalParameter(key, f"T{index}") for index, key in enumerate(tensors)],
        outputs=[schema.FormalParameter(f"out{index}", f"O{index}") for index in range(outputs)],
        type_constraints=[
            (key, ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int8)", "tensor(int64)"], "")
            for key in [f"T{index}" for index in range(len(tensors))] + [f"O{index}" for index in range(outputs)]
        ],
        attributes=[schema.Attribute(key, schema.AttrType.INT) for key in attributes],
    )
