"""The decoder's graph for ONNX Runtime's CUDA provider: nothing in it waits for the host, and on the CPU it gives the
numbers of the CPU's graph. The official numbers: tests/parity/test_ladder.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from engines.backend import Image, Step
from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA
from engines.bundle.pages import page_size
from engines.ort import OrtModel
from export.build import BuildOptions, build
from plugins.hierarchical_attention.onnx_body import LARGE
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.geometries import tiny
from tests.parity.requests import request as made_up

FLOAT, HALF, LONG, BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.BOOL
FLOATS, NUMBERS = {FLOAT, HALF}, {FLOAT, HALF, LONG}
ANY = NUMBERS | {BOOL, ir.DataType.INT8}
# What CUDA kernels exist for, of the types that our graphs hold: docs/OperatorKernels.md of ONNX Runtime. The type is
# that of the first input, for Where of the second.
KERNELS = {
    "Abs": FLOATS, "Add": NUMBERS, "And": {BOOL}, "ArgMax": FLOATS, "Cast": ANY, "CastLike": ANY, "Concat": ANY,
    "Div": NUMBERS, "Equal": NUMBERS | {BOOL}, "Expand": ANY, "Gather": ANY, "GatherElements": ANY, "Gemm": FLOATS,
    "Greater": NUMBERS, "GreaterOrEqual": NUMBERS, "Less": NUMBERS, "LessOrEqual": NUMBERS, "MatMul": FLOATS,
    "Max": NUMBERS, "Min": NUMBERS, "Mul": NUMBERS, "Pow": NUMBERS, "Range": {FLOAT, LONG}, "ReduceMax": NUMBERS,
    "ReduceMean": FLOATS, "ReduceMin": NUMBERS, "ReduceSum": NUMBERS, "Reshape": ANY, "RotaryEmbedding": FLOATS,
    "Round": FLOATS, "ScatterElements": ANY, "Shape": ANY, "Sigmoid": FLOATS, "Slice": ANY, "Softmax": FLOATS,
    "Sqrt": FLOATS, "Squeeze": ANY, "Sub": NUMBERS, "TensorScatter": ANY, "Tile": NUMBERS, "TopK": NUMBERS,
    "Transpose": ANY, "Unsqueeze": ANY, "Where": NUMBERS,
}  # fmt: skip
# Inputs that CUDA kernels read in the host's memory: what is computed from shapes is there, what is computed from data
# would be copied.
ON_HOST = {
    "Expand": (1,), "Range": (0, 1, 2), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceMin": (1,), "ReduceSum": (1,),
    "Reshape": (1,), "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Tile": (1,), "TopK": (1,), "Unsqueeze": (1,),
}  # fmt: skip
SMALL = 100  # elements of an initializer that ONNX Runtime would rather have on the CPU
NO_LAUNCH = {"Constant", "Reshape", "Shape", "Squeeze", "Unsqueeze"}  # the same bytes by another name
SAME = 1e-5  # of the largest logit: float32 sums in another order
MODELS = {
    "plain": (tiny(), {"precision": "fp32"}),
    "fewer-layers": (tiny(layers=tiny().layers - 1), {"precision": "fp32"}),
    "half": (tiny(), {"precision": "fp16"}),
    "groups": (tiny(kv_heads=2), {"precision": "fp32"}),
    # What the CPU's graph reads in a Scan: large pages, here 576 tokens of 256 numbers, and int8 pages of any size.
    "large-pages": (tiny(hidden=256, head_dim=64, cells=1), {"precision": "fp32"}),
    "int8-pages": (tiny(), {"precision": "fp32", "kv": "int8"}),
    "int8-cache": (tiny(kv_heads=2), {"precision": "fp32", "kv_cache": "int8"}),
    "int8-both": (tiny(), {"precision": "fp32", "kv": "int8", "kv_cache": "int8"}),
    "lazy": (tiny(), {"precision": "fp32", "projection": "lazy"}),
}
EAGER = [
    name for name in MODELS if name not in ("lazy", "fewer-layers")
]  # a lazy one skips what is projected: that is an If


@pytest.fixture(scope="session")
def built(shared):
    """built(name) -> the bundle of one of MODELS."""

    def make(folder: Path, name: str) -> None:
        g, options = MODELS[name]
        checkpoint = write_checkpoint(folder.with_name(f"{folder.name}-checkpoint"), g)
        build(BuildOptions(checkpoint, folder, check="none", **options))

    return lambda name: Bundle(once(shared / f"cuda-{name}", lambda folder: make(folder, name)))


def graph_of(bundle: Bundle, kind: str) -> ir.Model:
    model = ir.load(bundle.graph("decoder", kind))
    ShapeInferencePass()(model)
    return model


def require_device_alone(model: ir.Model) -> None:
    """AssertionError for a branch or a loop, or for what the CUDA provider would leave to the CPU."""
    nodes = list(model.graph.all_nodes())
    assert len(nodes) == len(list(model.graph)), "branches or loops"
    for node in nodes:
        if node.op_type != "Constant":
            read = node.inputs[1 if node.op_type == "Where" else 0]
            assert not node.domain and read.dtype in KERNELS.get(node.op_type, ()), (node.op_type, read.dtype)
        for place in ON_HOST.get(node.op_type, ()):
            assert place >= len(node.inputs) or from_shapes(node.inputs[place]), (node.op_type, node.name, place)


def from_shapes(value: ir.Value | None) -> bool:
    """Whether a value is known without looking at the content of any tensor."""
    if value is None or value.const_value is not None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and (node.op_type == "Shape" or all(map(from_shapes, node.inputs)))


@pytest.mark.parametrize("name", EAGER)
def test_nothing_waits_for_the_host(built, name):
    require_device_alone(graph_of(built(name), ONNXRUNTIME_CUDA))


def require_capturable(graph: ir.Graph) -> None:
    """AssertionError for what keeps a graph from being recorded as a CUDA graph: a copy between host and device, which
    ONNX Runtime adds where it leaves a node to the CPU. It leaves it what it would rather not launch a kernel for, as
    fallback_cpu_capability.cc of ONNX Runtime has it: nodes that read, beside small initializers and inputs of the
    graph, only what is in the host's memory, and do not expect it there."""
    inputs, host = set(graph.inputs), set[ir.Value]()
    for node in graph:
        reads = [(place, value) for place, value in enumerate(node.inputs) if value is not None]
        if node.op_type == "Shape":
            host.update(node.outputs)
            continue
        expected = ON_HOST.get(node.op_type, ())
        needless = {value for place, value in reads if value in host and place not in expected}
        if not needless:
            continue
        on_cpu = all(
            value.dtype != HALF and (value in inputs or small(value) or (value in host and place not in expected))
            for place, value in reads
        )
        assert on_cpu, f"{node.op_type} {node.name} reads what is in the host's memory"
        assert not inputs.intersection(value for _, value in reads), f"{node.op_type} reads an input on the CPU"
        host.update(node.outputs)
    assert not host.intersection(graph.outputs)


def small(value: ir.Value) -> bool:
    """Whether it is an initializer of few elements."""
    return value.is_initializer() and np.prod(value.shape.numpy()) <= SMALL


def as_partitioned(bundle: Bundle, folder: Path) -> ir.Graph:
    """The decoder for CUDA after the simplifications that ONNX Runtime makes before it gives nodes to providers."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(folder / "decoder.onnx"), 3
    onnxruntime.InferenceSession(bundle.graph("decoder", ONNXRUNTIME_CUDA), options, providers=["CPUExecutionProvider"])
    model = ir.load(folder / "decoder.onnx")
    ShapeInferencePass()(model)
    return model.graph


@pytest.mark.parametrize("name", EAGER)
def test_a_step_can_be_recorded(built, tmp_path, name):
    """No copy between host and device: what the CPU computes, from shapes, is what kernels expect there."""
    require_capturable(as_partitioned(built(name), tmp_path))


def test_a_shape_that_meets_an_input_is_found():
    """Of such a sum ONNX Runtime would say that the CPU is the place, and copy the input there."""
    length, rows = ir.val("length", LONG, [1]), ir.val("rows", FLOAT, ["n"])
    size = ir.node("Shape", [rows])
    total = ir.node("Add", [size.outputs[0], length])
    graph = ir.Graph([length, rows], total.outputs, nodes=[size, total], opset_imports={"": 20})
    with pytest.raises(AssertionError, match="Add reads an input on the CPU"):
        require_capturable(graph)


def test_a_shape_that_meets_what_was_computed_is_found():
    """A kernel that expects no input on the host would get a copy of it."""
    rows = ir.val("rows", LONG, ["n"])
    twice, size = ir.node("Add", [rows, rows]), ir.node("Shape", [rows])
    total = ir.node("Mul", [twice.outputs[0], size.outputs[0]])
    graph = ir.Graph([rows], total.outputs, nodes=[twice, size, total], opset_imports={"": 20})
    with pytest.raises(AssertionError, match=r"Mul .*reads what is in the host's memory"):
        require_capturable(graph)


@pytest.mark.parametrize("name", EAGER)
def test_the_cpu_graph_would_wait(built, name):
    """What the test above can find."""
    with pytest.raises(AssertionError, match="branches or loops"):
        require_device_alone(graph_of(built(name), ONNXRUNTIME))


def test_only_the_projection_branches_where_it_is_lazy(built):
    g, graph = MODELS["lazy"][0], graph_of(built("lazy"), ONNXRUNTIME_CUDA).graph
    found = [node.op_type for node in graph.all_nodes() if node.op_type in ("If", "Loop", "Scan")]
    assert found == ["If"] * len(g.reading_layers)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("half", "fewer-layers")])
def test_it_computes_what_the_cpu_graph_computes(built, name):
    """Two rows, one of them padded, and steps that read few pages, all, other numbers in each row, and none."""
    g, bundle = MODELS[name][0], built(name)
    if name == "large-pages":
        assert page_size(g) * g.kv_heads * g.head_dim >= LARGE
    left, right = (steps(bundle, kind) for kind in (ONNXRUNTIME, ONNXRUNTIME_CUDA))
    for one, other in zip(left, right, strict=True):
        assert np.array_equal(one.page_count, other.page_count) and np.array_equal(one.cells(), other.cells())
        assert np.array_equal(one.token, other.token)
        assert np.abs(one.logits - other.logits).max() <= SAME * np.abs(one.logits).max()
    assert left[1].page_count.max() > 2 or g.pages == 1
    assert np.abs(left[0].logits - left[-1].logits).max() > 100 * SAME  # pages count


def steps(bundle: Bundle, kind: str) -> list[Step]:
    model = OrtModel(bundle, threads=1)
    model.part.session = model.session(bundle.graph("decoder", kind))
    requests = [made_up(model.geometry, seed) for seed in (3, 4)]
    tiles, ids, begin = (np.stack(each) for each in zip(*requests, strict=True))
    low, high = model.vision(tiles[:, 0]), model.vision(tiles[:, 1:].reshape(-1, *tiles.shape[2:]))
    image = Image(low, model.project(high, begin[:, 0]), begin[:, 0], np.array([[1, 0], [0, 2]]))
    decoder, tokens = model.decoder(image, ids.shape[2] + 8), ids.shape[2]
    decoder.run(ids[:, 0], 0, lengths=np.array([tokens, tokens - 2]))
    budgets = 2, model.geometry.pages, np.array([0, 3]), 0
    return [decoder.run(np.array([[5], [9]]), budget) for budget in budgets]


def launches(bundle: Bundle, kind: str, folder: Path) -> int:
    """Nodes that start a kernel, those of all branches, after ONNX Runtime's fusions."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / f"{kind}.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(bundle.graph("decoder", kind), options, providers=["CPUExecutionProvider"])
    nodes = ir.load(folder / f"{kind}.onnx").graph.all_nodes()
    return len([node for node in nodes if node.op_type not in NO_LAUNCH])


def test_launches_of_a_layer(built, tmp_path):
    """Of one that reads and selects, in float32; float16 takes 8 casts more. Of the CPU's graph with all branches, of
    which a run takes one."""
    few, more = built("fewer-layers"), built("plain")
    found = {
        kind: launches(more, kind, tmp_path) - launches(few, kind, tmp_path) for kind in (ONNXRUNTIME, ONNXRUNTIME_CUDA)
    }
    assert found == {ONNXRUNTIME: 88, ONNXRUNTIME_CUDA: 62}
