"""A traced graph as TensorRT would run it: ordinary nodes in torch, flex:: nodes by the project's plugins, all in the
order of one stream, on whatever device (device.py) there is.

What shapes depend on is computed on the host, once for all runs with the same shapes of inputs: then a run reads
nothing back, and can be recorded. What plugins take and give lies in the graph's own tensors or in the scratch memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from plugins.artifacts import Artifacts
from plugins.op import ALIGNMENT, named
from plugins.tensorrt import NAMESPACE
from tests.emulator.device import Device
from tests.emulator.operators import DTYPES, HOST_OPERANDS, OPERATORS
from tests.emulator.plugins import Registry, made

Shape = tuple[int, ...]
TORCH = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}  # by the names the project uses
NUMBERS = torch.int64, torch.bool  # constants of these may say how large something is


@dataclass
class Node:
    """A node: its operator and attributes, or its plugin."""

    name: str
    operator: str
    inputs: tuple[str, ...]  # "" for one that is left out
    outputs: tuple[str, ...]
    attributes: dict[str, object]
    plugin: object | None = None


@dataclass
class Program:
    """A graph for certain shapes of its inputs.

    nodes: all but those that were computed on the host. host: what these gave. copies: of that, on the device, as far
    as the others need it there. kinds: shape and dtype of what plugins take and give. places: where in the scratch
    memory that lies, unless it is the graph's own; by index of a node its plugin's workspace. scratch: bytes of it.
    """

    nodes: list[Node] = field(default_factory=list)
    host: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, tuple[Shape, torch.dtype]] = field(default_factory=dict)
    places: dict[str | int, int] = field(default_factory=dict)
    scratch: int = 0

    def reserve(self, key: str | int, size: int) -> None:
        """Give so many bytes of the scratch memory to something."""
        if key not in self.places:
            self.places[key] = self.scratch
            self.scratch += -(-size // ALIGNMENT) * ALIGNMENT


class Traced:
    """The nodes of a traced graph, its weights on the device, and a plugin for each flex:: node."""

    def __init__(self, device: Device, registry: Registry, graph: Path, kernels: Path | None) -> None:
        """`kernels`: the artifacts of its plugins. NotImplementedError for an operator that traced graphs had not."""
        self.device, model = device, ir.load(graph)
        unknown = {node.op_type for node in model.graph if node.domain != NAMESPACE} - OPERATORS.keys()
        if unknown:
            raise NotImplementedError(f"{graph}: no {', '.join(sorted(unknown))} in tests/emulator/operators.py")
        self.inputs = [value.name for value in model.graph.inputs]
        self.outputs = [value.name for value in model.graph.outputs]
        self.constants = {name: _tensor(value.const_value) for name, value in model.graph.initializers.items()}
        self.weights = {name: device.put(value) for name, value in self.constants.items()}
        self.constants = {name: value for name, value in self.constants.items() if value.dtype in NUMBERS}
        weights = model.graph.initializers.items()
        computed = next((value.dtype for name, value in weights if name.endswith("layernorm.weight")), None)
        artifacts = Artifacts.read(kernels) if kernels else None
        self.nodes = []
        for index, each in enumerate(model.graph):
            given = {name: _attribute(attribute) for name, attribute in each.attributes.items()}
            plugin = None
            if each.domain == NAMESPACE:
                plugin = made(registry, each.op_type, each.name, given, computed.numpy().name, artifacts)
            inputs, outputs = (tuple(v.name if v else "" for v in values) for values in (each.inputs, each.outputs))
            self.nodes.append(
                Node(each.name or f"{each.op_type} {index}", each.op_type, inputs, outputs, given, plugin)
            )
        self._programs: dict[tuple[Shape, ...], Program] = {}
        self._compiling = threading.Lock()

    def program(self, inputs: Mapping[str, tuple[Shape, torch.dtype]]) -> Program:
        """What is to do for inputs of these shapes and dtypes."""
        key = tuple(inputs[name][0] for name in self.inputs)
        with self._compiling:
            if key not in self._programs:
                self._programs[key] = self._compiled(inputs)
            return self._programs[key]

    def _compiled(self, inputs: Mapping[str, tuple[Shape, torch.dtype]]) -> Program:
        """Torch's meta device tells the shapes of all that is not computed on the host."""
        program = Program(host=dict(self.constants))
        shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in inputs.items()}
        shapes |= {name: value.to("meta") for name, value in self.weights.items()}
        for index, node in enumerate(self.nodes):
            if node.plugin:
                self._place(index, node, program, shapes)
                program.nodes.append(node)
                continue
            on_host = HOST_OPERANDS.get(node.operator, ())
            if node.operator == "Shape":
                given = [shapes[name] for name in node.inputs]
            elif all(name in program.host for name in node.inputs if name):
                given = [program.host.get(name) for name in node.inputs]
            else:
                given = [
                    program.host[name] if position in on_host and name else shapes.get(name)
                    for position, name in enumerate(node.inputs)
                ]
                self._copy_to_device(program, [n for at, n in enumerate(node.inputs) if at not in on_host])
                program.nodes.append(node)
            results = _results(node, given)
            if program.nodes[-1:] != [node]:
                program.host |= results
            shapes |= {name: value.to("meta") for name, value in results.items()}
        self._copy_to_device(program, self.outputs)
        return program

    def _copy_to_device(self, program: Program, names: list[str]) -> None:
        for name in names:
            if name in program.host and name not in self.weights and name not in program.copies:
                program.copies[name] = self.device.put(program.host[name])

    def _place(self, index: int, node: Node, program: Program, shapes: dict[str, Tensor]) -> None:
        op = node.plugin.op
        given = named(op.inputs, (tuple(shapes[name].shape) for name in node.inputs))
        results = op.output_shapes(given)
        for name, tensor in zip(node.outputs, op.outputs, strict=True):
            dtype = TORCH[tensor.kind(node.plugin.dtype)]
            shapes[name] = torch.empty(tuple(results[tensor.name]), dtype=dtype, device="meta")
        self._copy_to_device(program, list(node.inputs))
        for name, tensor in zip((*node.inputs, *node.outputs), (*op.inputs, *op.outputs), strict=True):
            program.kinds[name] = tuple(shapes[name].shape), shapes[name].dtype
            wanted = TORCH[tensor.kind(node.plugin.dtype)]
            assert shapes[name].dtype == wanted, f"{node.name}: {name} is {shapes[name].dtype}, not {wanted}"
            if name not in (*self.inputs, *self.outputs, *self.weights, *program.copies):
                program.reserve(name, shapes[name].numel() * shapes[name].dtype.itemsize)
        program.reserve(index, node.plugin.get_workspace_size([SimpleNamespace(max=s) for s in given.values()], []))


class TracedRun:
    """What one execution context keeps: its plugins."""

    def __init__(self, graph: Traced) -> None:
        self._graph = graph
        self._plugins = {
            node.outputs: (index, node.plugin.attach_to_context(None))
            for index, node in enumerate(graph.nodes)
            if node.plugin
        }

    def enqueue(self, program: Program, bound: Mapping[str, Tensor], scratch: int, stream: int) -> bool:
        """Ask `stream` for a run; False when a plugin fails, which keeps the reason.

        `bound`: the graph's inputs and outputs, where they are to be read and written. `scratch`: address of
        `program.scratch` bytes, of which nobody may count on what another run left there.
        """
        graph, device = self._graph, self._graph.device
        values: dict[str, Tensor | None] = {}
        operands = {name: bound[name] for name in program.kinds if name in bound}
        for name, (shape, dtype) in program.kinds.items():
            if name in program.places:
                operands[name] = device.at(scratch + program.places[name], shape, dtype, name)
        memory = device.at(scratch, (program.scratch,), torch.uint8, "scratch memory")

        def start() -> None:
            memory.fill_(0xFF)
            values.update({**graph.weights, **program.copies, **{name: bound[name] for name in graph.inputs}, "": None})

        def finish() -> None:
            for name in graph.outputs:
                if name not in written:
                    result = values[name]
                    assert (result.dtype, result.shape) == (bound[name].dtype, bound[name].shape), name
                    bound[name].copy_(result)
            values.clear()

        written = {name for node in program.nodes if node.plugin for name in node.outputs}
        waiting: list[Node] = []
        with torch.no_grad(), device.working(stream) as ask:
            ask(_without_grad(start))
            for node in program.nodes:
                if not node.plugin:
                    waiting.append(node)
                    continue
                ask(_without_grad(_computing(waiting, values, program.host, node, operands)))
                waiting = []
                everywhere = operands | {
                    n: graph.weights.get(n, program.copies.get(n)) for n in node.inputs if n not in operands
                }
                index, plugin = self._plugins[node.outputs]
                names = node.inputs, node.outputs
                descs = [[SimpleNamespace(dims=program.kinds[name][0]) for name in each] for each in names]
                addresses = [[everywhere[name].data_ptr() for name in each] for each in names]
                try:
                    plugin.enqueue(*descs, *addresses, scratch + program.places[index], stream)
                except Exception:
                    return False
            ask(_without_grad(_computing(waiting, values, program.host)))
            ask(_without_grad(finish))
        return True


def _without_grad(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:  # in whatever thread somebody waits
        with torch.no_grad():
            work()

    return run


def _computing(
    nodes: list[Node],
    values: dict[str, Tensor | None],
    host: Mapping[str, Tensor],
    plugin: Node | None = None,
    operands: Mapping[str, Tensor] | None = None,
) -> Callable[[], None]:
    """Nodes in their order; then what `plugin` takes is put where it takes it from, and its results are known."""

    def run() -> None:
        for node in nodes:
            on_host = HOST_OPERANDS.get(node.operator, ())
            given = [host[n] if at in on_host and n else values[n] for at, n in enumerate(node.inputs)]
            values.update(_results(node, given))
        if plugin and operands:
            for name in plugin.inputs:
                if name in operands and operands[name] is not values[name]:
                    operands[name].copy_(values[name])
            values.update({name: operands[name] for name in plugin.outputs})

    return run


def _results(node: Node, given: list[Tensor | None]) -> dict[str, Tensor]:
    while given and given[-1] is None:
        given.pop()
    try:
        results = OPERATORS[node.operator](*given, **node.attributes)
    except Exception as error:
        shapes = ", ".join("none" if each is None else str(list(each.shape)) for each in given)
        raise type(error)(f"{node.name} ({node.operator} of {shapes}): {error}") from error
    results = (results,) if isinstance(results, Tensor) else results
    return dict(zip(node.outputs, results, strict=True))


def _attribute(attribute: ir.Attr) -> object:
    return _tensor(attribute.value) if attribute.type == ir.AttributeType.TENSOR else attribute.value


def _tensor(tensor: ir.TensorProtocol) -> Tensor:
    """A copy; 4-bit integers as int8."""
    array = np.array(tensor.numpy())  # of weights that are mapped, which torch may not write
    kind = array.dtype.name
    if kind == "int4":
        array = array.astype(np.int8)
    elif kind in ("bfloat16", "float8_e4m3fn"):  # of ml_dtypes, which torch does not know
        return torch.from_numpy(array.view(f"u{array.itemsize}")).view(TORCH[kind])
    return torch.from_numpy(array)
