"""TensorRT's plugins without a GPU: a traced graph whose custom ops go through plugins/tensorrt.py, the driver's
wrapper and the kernels, and whose other ops ONNX's reference evaluator computes."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from plugins.artifacts import Artifacts
from plugins.op import MODEL_DTYPES, named
from plugins.registry import OPS
from plugins.tensorrt import DTYPE, KERNELS, NAMESPACE
from tests.emulator.driver import Driver
from tests.emulator.memory import aligned


class _Interface:
    def __init__(self) -> None:
        pass


class PluginField:
    """A named number, or bytes."""

    def __init__(self, name: str, data: object, kind: int) -> None:
        self.name, self.data = name, data


class Registry:
    """Creators by the name of their op."""

    def __init__(self) -> None:
        self.creators: dict[str, object] = {}

    def register_creator(self, creator: object, namespace: str) -> bool:
        known = creator.name in self.creators
        self.creators[creator.name] = creator
        return namespace == NAMESPACE and not known


CLASSES = {
    "IPluginV3": type("IPluginV3", (_Interface,), {}),
    "IPluginV3OneCore": type("IPluginV3OneCore", (_Interface,), {}),
    "IPluginV3OneBuild": type("IPluginV3OneBuild", (_Interface,), {}),
    "IPluginV3OneRuntime": type("IPluginV3OneRuntime", (_Interface,), {}),
    "IPluginCreatorV3One": type("IPluginCreatorV3One", (_Interface,), {}),
    "PluginField": PluginField,
    "PluginFieldType": SimpleNamespace(INT32=0, INT8=1),
    "PluginFieldCollection": list,
    "TensorRTPhase": IntEnum("TensorRTPhase", {"BUILD": 0, "RUNTIME": 1}),
    "DataType": IntEnum("DataType", {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT64": 8, "BF16": 9}),
    "TensorFormat": SimpleNamespace(LINEAR=0),
}


def _stand_in(name: str) -> type[OpRun]:
    return type(name, (OpRun,), {"op_domain": NAMESPACE, "_run": lambda self, *_: None})


class GatherElements(OpRun):
    """onnx's own goes through numpy.choose, which takes 64 choices at most."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis),)


class PluginGraph:
    """The nodes of a traced graph, and a plugin for each custom one, made as an engine file makes them."""

    def __init__(self, driver: Driver, registry: Registry, graph: str, kernels: str) -> None:
        self.driver = driver
        evaluator = ReferenceEvaluator(graph, new_ops=[GatherElements, *map(_stand_in, OPS)])
        self.nodes, self.weights = evaluator.rt_nodes_, evaluator.rt_inits_
        artifacts, model = Artifacts.read(kernels), onnx.load(graph, load_external_data=False)
        kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds["features"]).name
        self.plugins: dict[int, object] = {}
        for index, node in enumerate(model.graph.node):
            if node.domain != NAMESPACE:
                continue
            numbers = {each.name: each.i for each in node.attribute if each.name in OPS[node.op_type].attribute_names}
            op = OPS[node.op_type](**numbers)
            fields = [PluginField(name, np.array([value], np.int32), 0) for name, value in numbers.items()]
            fields.append(PluginField(DTYPE, np.array([MODEL_DTYPES.index(dtype)], np.int32), 0))
            code = artifacts.subset(op.kernels(dtype), artifacts.sms).to_bytes()
            fields.append(PluginField(KERNELS, np.frombuffer(code, np.int8), 1))
            creator, phase = registry.creators[node.op_type], CLASSES["TensorRTPhase"].RUNTIME
            self.plugins[index] = creator.create_plugin(node.name, fields, phase)


class PluginRun:
    """What one execution context keeps: its plugins, and memory for their tensors once the shapes are known."""

    def __init__(self, graph: PluginGraph) -> None:
        self._graph = graph
        self._plugins = {index: plugin.attach_to_context(None) for index, plugin in graph.plugins.items()}
        self._memory: dict[tuple, np.ndarray] = {}
        self._known: dict[tuple, dict[str, tuple[tuple[int, ...], np.dtype]]] = {}

    def enqueue(
        self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray], addresses: dict[str, int], stream: int
    ) -> bool:
        """Ask the stream for a run. The first with certain shapes is done at once, to learn those of all tensors."""
        driver = self._graph.driver
        key = tuple(array.shape for array in inputs.values())
        first = key not in self._known
        known = self._known.setdefault(key, {})
        values: dict[str, np.ndarray] = {}

        def step(work: Callable[[], None]) -> None:
            driver.submit(stream, work)
            if first:
                assert not driver.capturing(stream)
                assert driver.cuStreamSynchronize(stream) == (0,)

        step(lambda: values.update({**self._graph.weights, **inputs, "": None}))
        for index, node in enumerate(self._graph.nodes):
            if index not in self._plugins:
                step(lambda node=node: _evaluate(node, values, known if first else None))
            elif not self._plugin(index, node, known, values, addresses, stream, step):
                return False

        def finish() -> None:
            for name, view in outputs.items():
                if name not in self._bound_by_plugins:
                    assert values[name].dtype == view.dtype and values[name].shape == view.shape, name
                    view[...] = values[name]

        step(finish)
        return True

    @property
    def _bound_by_plugins(self) -> set[str]:
        return {name for index in self._plugins for name in self._graph.nodes[index].output}

    def _plugin(self, index, node, known, values, addresses, stream, step) -> bool:
        plugin, driver = self._plugins[index], self._graph.driver
        op = plugin.op
        if any(name not in known for name in node.input):  # weights and inputs of the graph
            for name in node.input:
                known.setdefault(name, (values[name].shape, values[name].dtype))
        shapes = [known[name][0] for name in node.input]
        made = op.output_shapes(named(op.inputs, shapes))
        for name, tensor in zip(node.output, op.outputs, strict=True):
            known[name] = tuple(made[tensor.name]), np.dtype(tensor.kind(plugin.dtype))
        places = {}
        for name in (*node.input, *node.output):
            places[name] = addresses[name] if name in addresses else self._place(name, *known[name])
        size = plugin.get_workspace_size([SimpleNamespace(max=shape) for shape in shapes], [])
        scratch = self._place(f"workspace {index}", (size,), np.dtype(np.uint8))

        def fill() -> None:
            for name in node.input:
                if name not in addresses:
                    driver.memory.view(places[name], *known[name], name)[...] = values[name]

        step(fill)
        descs = [[SimpleNamespace(dims=known[name][0]) for name in names] for names in (node.input, node.output)]
        where = [[places[name] for name in names] for names in (node.input, node.output)]
        try:
            plugin.enqueue(*descs, *where, scratch, stream)
        except Exception:
            return False  # as TensorRT does; the plugin keeps the reason

        def read() -> None:
            for name in node.output:
                values[name] = driver.memory.view(places[name], *known[name], name)

        step(read)
        return True

    def _place(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
        key = name, shape
        if key not in self._memory:
            self._memory[key] = aligned(shape, dtype)
            self._graph.driver.memory.add(self._memory[key], name)
        return self._memory[key].ctypes.data


def _evaluate(node, values: dict[str, np.ndarray], known: dict | None) -> None:
    results = node.run(*[values[name] for name in node.input])
    for name, result in zip(node.output, results, strict=True):
        values[name] = result
        if known is not None:
            known[name] = result.shape, result.dtype
