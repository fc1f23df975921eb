"""The plugin-free decoder, built by TensorRT-RTX for RTX 30, 40 and 50 without a GPU: which kernels it becomes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from engines.bundle.kinds import TENSORRT_RTX
from engines.bundle.precision import FP32
from engines.errors import ExportError
from engines.trt.build import build_engines
from engines.trt.options import EngineOptions
from export.build import BuildOptions, build
from export.graph.bind import for_onnxruntime, for_plugin_free
from tests.conftest import once
from tests.engines.trt.rtx_layers import ATTENTION, Layer, layers_of, log_of
from tests.geometries import tiny

GEOMETRIES = {
    "heads of 16": tiny(heads=2, kv_heads=2, head_dim=16),
    "grouped heads": tiny(heads=2, kv_heads=1, head_dim=16),
}
INT8 = "int8 pages"  # heads of 16 with them


@pytest.fixture
def built(shared, random_model):
    """built(name, precision) -> layers of the decoder's engine."""

    def get(name: str, precision: str) -> list[Layer]:
        label = f"tiny {name}".replace(" ", "-")

        def make(folder):
            model, kv = ("tiny heads of 16", "int8") if name == INT8 else (f"tiny {name}", "model")
            checkpoint = random_model(model.replace(" ", "-"), GEOMETRIES[model.removeprefix("tiny ")])[0]
            build(BuildOptions(checkpoint, folder, precision, kv=kv, check="none"))
            options = EngineOptions(TENSORRT_RTX, plugins=False, keep_log=True, timing_cache=False)
            build_engines(folder, options, quiet=True)

        return layers_of(log_of(once(shared / f"{label}-{precision}-free", make), "decoder"))

    return get


@pytest.mark.parametrize(
    ("name", "precision"),
    [("heads of 16", "fp16"), ("heads of 16", "bf16"), ("grouped heads", "fp16"), (INT8, "fp16")],
)
def test_attention_is_one_kernel_and_caches_and_pages_stay_where_they_are(built, name, precision):
    g, layers = GEOMETRIES.get(name, GEOMETRIES["heads of 16"]), built(name, precision)
    assert len([layer for layer in layers if layer.name.startswith(ATTENTION)]) == g.layers

    # Present and past are one buffer, written in place: no layer reads past_*, the writer of present_* reads that.
    present = {f"present_{half}.{layer}" for half in ("key", "value") for layer in range(g.layers)}
    read = {tensor.name for layer in layers for tensor in layer.inputs}
    assert not [name for name in read if name.startswith(("past_key", "past_value"))]
    assert {f"page_{half}.{layer}" for half in ("key", "value") for layer in g.reading_layers} <= read
    written = {tensor.name: layer for layer in layers for tensor in layer.outputs if tensor.name in present}
    assert written.keys() == present
    for tensor, layer in written.items():
        assert tensor in {source.name for source in layer.inputs}, f"{layer.name} does not update {tensor} in place"

    # Nothing of the size of a cache or a page store is ever made, unless its size follows the number of queries: then
    # a decode step makes little of it.
    cache = g.kv_heads * g.context * g.head_dim
    made = [(layer.name, tensor) for layer in layers for tensor in layer.outputs if tensor.name not in present]
    assert made and not [(name, tensor) for name, tensor in made if tensor.fixed_size >= cache]


def test_float32_builds_too_without_that_kernel(built):
    layers = built("heads of 16", "fp32")
    assert layers and not [layer for layer in layers if layer.name.startswith(ATTENTION)]


@pytest.mark.parametrize(
    "bind", [lambda model: for_onnxruntime(model, FP32), lambda model: for_plugin_free(model, 160)]
)
@pytest.mark.parametrize(("op_type", "domain"), [("Unheard", "flex"), ("Unheard", "")])
def test_an_operator_nobody_knows_is_not_left_to_the_backend(bind, op_type, domain):
    value = ir.Value(name="in", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "capacity"]))
    node = ir.node(op_type, [value], domain=domain)
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20, "flex": 1}), ir_version=10)
    with pytest.raises(ExportError, match="Unheard"):
        bind(model)
