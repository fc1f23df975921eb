"""The ops as TensorRT plugins, through the real plugin registry: what is stored, restored, launched and refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engines.bundle.kinds import TENSORRT_RTX
from engines.errors import BackendError
from engines.trt import library
from engines.trt.build import attributes
from plugins import tensorrt as plugin
from plugins.artifacts import Artifacts, Compiled
from plugins.errors import KernelError
from plugins.op import MODEL_DTYPES, STORES, named
from plugins.registry import OPS, kernels_of_model, ops_of_model
from tests.geometries import tiny

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
trt = library.load(TENSORRT_RTX)
SIZES = attributes(tiny())
KINDS = {dtype: kind for kind, dtype in plugin.DTYPE_OF_KIND.items()}
SMS = (86, 89)
CHANGES = ({"int8_pages": 1}, {"int8_cache": 1}, {"int8_pages": 1, "int8_cache": 1})
CHANGES += ({"page_slots": 1}, {"int8_pages": 1, "page_slots": 1})


def int8_of(op) -> dict[str, int]:
    """What of an op is in 8 bits, or in slots."""
    return {store: 1 for store in STORES if op.attributes.get(store)}


OPS_OF_MODELS = [*ops_of_model(SIZES)]
OPS_OF_MODELS += [op for change in CHANGES for op in ops_of_model(SIZES | change) if int8_of(op) == change]
_KEPT: list[dict[str, np.ndarray]] = []  # a field is but a pointer


def id_of(op) -> str:
    return "-".join([op.name, *int8_of(op)])


def artifacts(dtype: str, **int8: int) -> Artifacts:
    """Stand-ins for compiled kernels: nothing here runs them."""
    code = {sm: f"code for {sm}".encode() for sm in (*SMS, 120)}
    return Artifacts(
        tuple(
            Compiled(kernel, kernel.name, 0, 128, b"text", code, dict.fromkeys(code, 32))
            for kernel in kernels_of_model(SIZES | int8, dtype)
        ),
        {},
    )


@pytest.fixture(autouse=True)
def clean():
    """The creators are there, whichever test is the first, and know nothing of an earlier one."""
    plugin.register(trt)
    yield
    plugin.register(trt)


def attribute_fields(op, kind=np.int64):
    type_ = {np.int64: trt.PluginFieldType.INT64, np.int32: trt.PluginFieldType.INT32}[kind]
    data = {name: np.array([value], kind) for name, value in op.attributes.items()}
    _KEPT.append(data)
    return trt.PluginFieldCollection([trt.PluginField(name, array, type_) for name, array in data.items()])


def creator(name: str):
    return trt.get_plugin_registry().get_creator(name, plugin.VERSION, plugin.NAMESPACE)


def descs(op, dtype: str):
    """Descriptions of all inputs and outputs, as TensorRT asks for them."""
    found = []
    for tensor in (*op.inputs, *op.outputs):
        desc = trt.DynamicPluginTensorDesc()
        desc.desc.type = getattr(trt.DataType, KINDS[dtype if tensor.dtype == "model" else tensor.dtype])
        desc.desc.format = trt.TensorFormat.LINEAR
        found.append(desc)
    return found


def configured(op, dtype: str, kind=np.int64):
    """A plugin of the building phase after its types were settled."""
    made = creator(op.name).create_plugin("node", attribute_fields(op, kind), trt.TensorRTPhase.BUILD)
    given = descs(op, dtype)
    made.configure_plugin(given[: len(op.inputs)], given[len(op.inputs) :])
    return made


def restored(op, dtype: str):
    """What a plan makes of a plugin: serialised, then created again to run."""
    stored = configured(op, dtype).clone()
    fields = stored.get_fields_to_serialize()
    made = creator(op.name).create_plugin("node", fields, trt.TensorRTPhase.RUNTIME)
    return made.attach_to_context(None)


def shape_of(name: str) -> tuple[int, ...]:
    """Small shapes of the inputs that launches depend on, any of the others."""
    steps, capacity, g = 2, 160, tiny()
    shapes = {
        "query": (1, steps, g.hidden), "past_key": (1, g.kv_heads, capacity, g.head_dim), "map": (1, g.grid, g.grid),
        "page_lengths": (g.pages,), "features": (1, g.pages, SIZES["page_size"], g.hidden),
        "page_key": (1, g.kv_heads, 5, SIZES["page_size"], g.head_dim),
    }  # fmt: skip
    return shapes.get(name, (1, 1))


def call(made, op, dtype: str, buffers=None):
    """Run `enqueue` on small shapes with made-up addresses; in-place outputs share their input's, unless given."""
    inputs = [trt.PluginTensorDesc() for _ in op.inputs]
    for desc, tensor in zip(inputs, op.inputs, strict=True):
        desc.dims = trt.Dims(shape_of(tensor.name))
    addresses = [0x1000 * (index + 1) for index in range(len(op.inputs))]
    outputs = [0x100000 * (index + 1) for index in range(len(op.outputs))]
    by_name = named(op.inputs, addresses) | named(op.outputs, outputs)
    by_name |= {output: by_name[source] for output, source in op.in_place.items()}
    outputs = [by_name[tensor.name] for tensor in op.outputs]
    made.enqueue(inputs, [], addresses, buffers or outputs, 0x9000, 77)
    return op.launches(dtype, named(op.inputs, (tuple(desc.dims) for desc in inputs)), by_name, 0x9000)


@pytest.mark.parametrize("kind", [np.int64, np.int32])
@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize("op", OPS_OF_MODELS, ids=id_of)
def test_a_plan_restores_and_launches(op, dtype, kind):
    plugin.register(trt, artifacts=artifacts(dtype, **int8_of(op)), sms=SMS)
    stored = configured(op, dtype, kind)
    fields = stored.get_fields_to_serialize()
    launched = []
    plugin.register(trt, run=lambda *arguments: launched.append(arguments))
    made = creator(op.name).create_plugin("node", fields, trt.TensorRTPhase.RUNTIME).clone().attach_to_context(None)
    expected = call(made, op, dtype)
    ((kernels, launches, stream),) = launched
    assert launches == expected and launches
    assert stream == 77
    assert [c.kernel for c in kernels.compiled] == list(op.kernels(dtype if op.name != "SelectPages" else "float32"))
    assert kernels.sms == SMS
    again = made.get_fields_to_serialize()  # an engine that is opened may be serialised once more
    assert [bytes(field.data) for field in again] == [bytes(field.data) for field in fields]


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize("op", OPS_OF_MODELS, ids=id_of)
def test_scratch_memory_is_that_of_the_models_dtype(op, dtype):
    made = configured(op, dtype)
    inputs = [trt.DynamicPluginTensorDesc() for _ in op.inputs]
    for desc, tensor in zip(inputs, op.inputs, strict=True):
        desc.max = trt.Dims(shape_of(tensor.name))
    shapes = {tensor.name: shape_of(tensor.name) for tensor in op.inputs}
    assert made.get_workspace_size(inputs, []) == op.workspace(dtype, shapes)


@pytest.mark.parametrize("op", [op for op in OPS_OF_MODELS if op.in_place], ids=id_of)
def test_caches_in_two_buffers_are_refused(op):
    plugin.register(trt, artifacts=artifacts("float16", **int8_of(op)), sms=SMS)
    made = restored(op, "float16")
    plugin.register(trt, run=lambda *_: pytest.fail("launched"))
    with pytest.raises(KernelError, match="one buffer bound to both"):
        call(made, op, "float16", buffers=[0x700000 + index for index in range(len(op.outputs))])
    assert "updated in place" in plugin.take_error(trt).expected
    assert plugin.take_error(trt) is None


def test_an_output_without_memory_is_told():
    """The map of a layer that selects nothing has no reader: a TensorRT that therefore gave it no memory would have the
    kernel write to address 0."""
    op = next(op for op in OPS_OF_MODELS if op.name == "CachedAttention")
    plugin.register(trt, artifacts=artifacts("float16"), sms=SMS)
    made = restored(op, "float16")
    plugin.register(trt, run=lambda *_: pytest.fail("launched"))
    place = next(index for index, tensor in enumerate(op.outputs) if tensor.name == "map")
    with pytest.raises(KernelError, match="gives no memory for map"):
        call(made, op, "float16", buffers=[0 if index == place else 0x100 for index in range(len(op.outputs))])


def test_nothing_runs_while_an_engine_is_built():
    op = ops_of_model(SIZES)[1]
    plugin.register(trt, artifacts=artifacts("float16"), sms=SMS, run=lambda *_: pytest.fail("launched"))
    call(configured(op, "float16"), op, "float16", buffers=[1, 2, 3, 4])


def test_errors_inside_a_plugin_are_kept_and_logged(caplog):
    op = ops_of_model(SIZES)[0]
    plugin.register(trt, artifacts=artifacts("float16"), sms=SMS)
    made = restored(op, "float16")

    def fail(*_):
        raise BackendError("no device", fix="buy one")

    plugin.register(trt, run=fail)
    for _ in range(2):
        with pytest.raises(BackendError):
            call(made, op, "float16")
    assert caplog.text.count("flex::SelectPages: no device\n  fix: buy one") == 1  # the first is the cause
    with pytest.raises(BackendError, match="no device"):
        library._raise_error_of_plugin(trt)
    plugin.register(trt)
    with pytest.raises(KernelError, match="was not told how to launch"):
        call(made, op, "float16")


def test_missing_kernels_or_attributes():
    op = ops_of_model(SIZES)[1]
    plugin.register(trt)
    with pytest.raises(KernelError, match="no compiled kernels for flex::CachedAttention"):
        configured(op, "float16").get_fields_to_serialize()
    plugin.register(trt, artifacts=artifacts("float16"), sms=(86, 110))
    with pytest.raises(KernelError, match="SM 110"):
        configured(op, "float16").get_fields_to_serialize()
    plugin.register(trt, artifacts=artifacts("float16"), sms=SMS)
    with pytest.raises(KernelError, match=r"\*bf16"):  # kernels of another dtype
        configured(op, "bfloat16").get_fields_to_serialize()
    with pytest.raises(KernelError, match="has no attribute heads"):
        creator(op.name).create_plugin("node", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)


@pytest.mark.parametrize("op", OPS_OF_MODELS, ids=id_of)
def test_formats(op):
    made = configured(op, "float16")
    count = len(op.inputs)
    for dtype in MODEL_DTYPES:
        given = descs(op, dtype)
        assert all(made.supports_format_combination(index, given, count) for index in range(len(given)))
    for index, tensor in enumerate((*op.inputs, *op.outputs)):
        given = descs(op, "float16")
        given[index].desc.format = trt.TensorFormat.CHW2
        assert not made.supports_format_combination(index, given, count)
        given = descs(op, "float16")
        given[index].desc.type = trt.DataType.INT32
        assert not made.supports_format_combination(index, given, count)
        first = next((place for place, other in enumerate(op.inputs) if other.dtype == "model"), index)
        if tensor.dtype == "model" and index > first:
            given = descs(op, "float16")
            given[index].desc.type = trt.DataType.BF16
            assert not made.supports_format_combination(index, given, count), "one dtype for the whole model"


def test_types_that_do_not_fit_are_named():
    op = ops_of_model(SIZES)[1]
    made = configured(op, "float16")
    types = [desc.desc.type for desc in descs(op, "float16")[: len(op.inputs)]]
    assert made.get_output_data_types(types)[0] == trt.DataType.HALF
    types[3] = trt.DataType.FLOAT
    with pytest.raises(KernelError, match="past_key is float32"):
        made.get_output_data_types(types)


def test_equal_kernels_are_one_object_however_often_a_plan_is_opened():
    """Plugins never go (see plugins/tensorrt.py): what they hold must not become more with every engine."""
    op = ops_of_model(SIZES)[1]
    plugin.register(trt, artifacts=artifacts("float16"), sms=SMS)
    first, second = restored(op, "float16"), restored(op, "float16")
    assert first is not second and first.artifacts is second.artifacts
    plugin.register(trt, artifacts=artifacts("float32"), sms=SMS)
    assert restored(op, "float32").artifacts is not first.artifacts


def test_bindings_that_misread_fields_are_refused():
    """As those before TensorRT 10.16 do under NumPy 2 (tests/engines/trt/test_bindings.py): before anything is built or
    opened, not as kernels that are not whole."""

    class Field:
        def __init__(self, name, data, kind):
            self.data = np.full_like(data, data[0])

    module = SimpleNamespace(
        __name__="old", __version__="10.13.3", PluginField=Field, PluginFieldType=trt.PluginFieldType
    )
    with pytest.raises(KernelError, match=r"old 10\.13\.3 read the numbers \[1, 2\] as \[1, 1\]") as caught:
        plugin.register(module)
    assert "'numpy<2'" in caught.value.fix and "10.16" in caught.value.fix


def test_registering_again_makes_no_second_creator():
    plugin.register(trt)
    before = [creator(name) for name in OPS]
    plugin.register(trt)
    assert [creator(name) for name in OPS] == before and all(before)
