"""What the project asks of TensorRT's Python bindings, asked of one version of them, over a library that is not there.

Run in a process of its own, since only one version can be loaded: `python -m tests.engines.trt.bindings_probe FOLDER
LIBRARIES`, the folder that holds the package `tensorrt_bindings`, and its libraries, which need no more than the names.
Prints a JSON object: `missing`, what the bindings lack, and what they made of the plugins.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from types import ModuleType

import numpy as np

from engines.trt.build import attributes
from plugins import tensorrt as plugin
from plugins.artifacts import Artifacts, Compiled
from plugins.errors import KernelError
from plugins.op import Op, named
from plugins.registry import kernels_of_model, ops_of_model
from tests.geometries import tiny

SM, DTYPE, ATTRIBUTES = 87, "float16", attributes(tiny())

# TensorRT keeps every plugin that its bindings made for it; older bindings die when one goes that it never had.
_KEPT: list[object] = []

# What engines/trt/* uses of each class, and the members of enums.
METHODS = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "IBuilderConfig": (
        "clear_flag", "builder_optimization_level", "profiling_verbosity", "progress_monitor", "set_memory_pool_limit",
        "add_optimization_profile", "create_timing_cache", "set_timing_cache", "get_timing_cache",
    ),
    "ITimingCache": ("combine", "serialize"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_start", "phase_finish", "step_complete"),
    "INetworkDefinition": ("num_inputs", "num_outputs", "get_input", "get_output"),
    "ITensor": ("name", "dtype", "shape", "allowed_formats"),
    "OnnxParser": ("parse", "num_errors", "get_error"),
    "ParserError": ("node", "node_name", "node_operator", "desc", "func"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "get_tensor_name", "num_io_tensors", "device_memory_size_v2", "create_execution_context",
    ),
    "IExecutionContext": (
        "set_device_memory", "set_optimization_profile_async", "set_input_shape", "set_tensor_address",
        "execute_async_v3",
    ),
    "IPluginRegistry": ("register_creator",),
    "IPluginV3OneCore": ("plugin_name", "plugin_namespace", "plugin_version"),
    "IPluginV3OneBuild": ("num_outputs", "timing_cache_id", "metadata_string", "format_combination_limit"),
    "IPluginCreatorV3One": ("name", "plugin_namespace", "plugin_version", "field_names"),
    "IExprBuilder": ("constant",),
    "DynamicPluginTensorDesc": ("desc", "max"),
    "PluginTensorDesc": ("dims", "type", "format"),
}  # fmt: skip
MEMBERS = {
    "BuilderFlag": ("TF32",),
    "ProfilingVerbosity": ("DETAILED",),
    "MemoryPoolType": ("WORKSPACE",),
    "TensorFormat": ("LINEAR",),
    "DataType": tuple(plugin.DTYPE_OF_KIND),
    "PluginFieldType": ("INT8", "INT32"),
    "TensorRTPhase": ("BUILD", "RUNTIME"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "NetworkDefinitionCreationFlag": (),
}


def missing(trt: ModuleType) -> list[str]:
    """What the project uses and this module does not have."""
    names = [f"{kind}.{name}" for kinds in (METHODS, MEMBERS) for kind, names in kinds.items() for name in names]
    found = [name for name in names if not hasattr(getattr(trt, name.split(".")[0], None), name.split(".")[1])]
    settings = getattr(trt, "IRuntimeConfig", None)
    if hasattr(trt.ICudaEngine, "create_runtime_config") and not hasattr(
        settings, "set_execution_context_allocation_strategy"
    ):
        found.append("IRuntimeConfig.set_execution_context_allocation_strategy")
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") and int(trt.__version__.split(".")[0]) < 11:
        found.append("NetworkDefinitionCreationFlag.STRONGLY_TYPED")
    return found


class Registry:
    """TensorRT's own is in the library."""

    def __init__(self) -> None:
        self.creators: dict[str, object] = {}

    def register_creator(self, creator: object, namespace: str) -> bool:
        self.creators[creator.name] = creator
        return namespace == plugin.NAMESPACE


def artifacts() -> Artifacts:
    """Stand-ins for compiled kernels, whose bytes are not all alike."""
    kernels = kernels_of_model(ATTRIBUTES, DTYPE)
    return Artifacts(
        tuple(Compiled(each, each.name, 0, 128, bytes(range(1, 256)), {SM: b"code"}, {SM: 32}) for each in kernels), {}
    )


def lived(trt: ModuleType, creator: object, op: Op) -> tuple[object, list]:
    """A plugin as a node makes it, asked what a builder asks, stored, and made again: and what it launches then."""
    numbers = {name: np.array([value], np.int32) for name, value in op.attributes.items()}
    fields = [trt.PluginField(name, array, trt.PluginFieldType.INT32) for name, array in numbers.items()]
    node = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    kinds = {dtype: getattr(trt.DataType, kind) for kind, dtype in plugin.DTYPE_OF_KIND.items()}
    descs = []
    for tensor in (*op.inputs, *op.outputs):
        desc = trt.DynamicPluginTensorDesc()
        desc.desc.type, desc.desc.format = kinds[tensor.kind(DTYPE)], trt.TensorFormat.LINEAR
        descs.append(desc)
    count = len(op.inputs)
    types = node.get_output_data_types([desc.desc.type for desc in descs[:count]])
    assert types == [desc.desc.type for desc in descs[count:]], types
    assert all(node.supports_format_combination(place, descs, count) for place in range(len(descs)))
    node.configure_plugin(descs[:count], descs[count:])
    stored = node.clone()
    opened = creator.create_plugin("node", stored.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    made = opened.attach_to_context(None)
    _KEPT.extend((node, stored, opened, made))
    g, launched = tiny(), []
    sizes = {
        "query": (1, 2, g.hidden), "past_key": (1, g.kv_heads, 160, g.head_dim), "map": (1, g.grid, g.grid),
        "page_lengths": (g.pages,), "features": (1, g.pages, ATTRIBUTES["page_size"], g.hidden),
    }  # fmt: skip
    inputs = [trt.PluginTensorDesc() for _ in op.inputs]
    for desc, tensor in zip(inputs, op.inputs, strict=True):
        desc.dims = trt.Dims(sizes.get(tensor.name, (1, 1)))
    addresses = {tensor.name: 0x1000 * place for place, tensor in enumerate((*op.inputs, *op.outputs), 1)}
    addresses |= {output: addresses[source] for output, source in op.in_place.items()}
    plugin.register(trt, run=lambda *arguments: launched.append(arguments))
    made.enqueue(inputs, [], *([addresses[t.name] for t in each] for each in (op.inputs, op.outputs)), 0x9000, 77)
    ((kernels, launches, stream),) = launched
    shapes = named(op.inputs, (tuple(desc.dims) for desc in inputs))
    assert stream == 77 and launches == op.launches(DTYPE, shapes, addresses, 0x9000)
    return kernels, launches


def main(folder: str, libraries: list[str]) -> dict[str, object]:
    """What the bindings in `folder` have and do."""
    for library in libraries:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    sys.path.insert(0, folder)
    trt = importlib.import_module("tensorrt_bindings")
    told: dict[str, object] = {"version": trt.__version__, "numpy": np.__version__, "missing": missing(trt)}
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    try:
        plugin.register(trt)
    except KernelError as error:
        return told | {"refused": error.found, "fix": error.fix}
    for op in ops_of_model(ATTRIBUTES):
        plugin.register(trt, artifacts=artifacts(), sms=(SM,))
        kernels, launches = lived(trt, registry.creators[op.name], op)
        assert launches and [c.ptx for c in kernels.compiled] == [bytes(range(1, 256))] * len(kernels.compiled)
    assert plugin.take_error(trt) is None
    return told | {"plugins": sorted(registry.creators)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])), flush=True)
    os._exit(0)  # see _KEPT
