"""Every custom op as a TensorRT plugin: one IPluginV3 class, built from the TensorRT module that is passed in.

The plan holds what a plugin needs to run: the attributes of its op, the dtype the model computes in and the compiled
kernels. TensorRT 10.1 or newer, and TensorRT-RTX.

Caches are updated in place although TensorRT is told of two tensors: the executor binds one buffer to both, and
`enqueue` refuses anything else. Declaring the alias instead (IPluginV3OneBuildV2, 10.3, a preview feature) would let
TensorRT copy the cache where it likes without a word, and its optimiser rejects some graphs with aliases. It relies on
one thing: no other node reads an input that is updated in place, so that TensorRT cannot put it after the update.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from plugins.artifacts import REBUILD_KERNELS, Artifacts
from plugins.errors import KernelError
from plugins.op import MODEL_DTYPES, Kernel, Launch, Op, named
from plugins.registry import OPS

NAMESPACE, VERSION = "flex", "1"  # the ONNX domain of the nodes, and its version
DTYPE_OF_KIND = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT64": "int64"}
DTYPE, KERNELS = "dtype", "kernels"  # what a plan stores beside the attributes: index in MODEL_DTYPES, Artifacts
_log = logging.getLogger(__name__)
Run = Callable[[Artifacts, Sequence[Launch], int], None]


@dataclass
class _Registration:
    """What the creators of one TensorRT module work with; replaced by the next `register`."""

    artifacts: Artifacts | None = None
    sms: tuple[int, ...] = ()
    run: Run | None = None
    error: Exception | None = None
    creators: tuple[Any, ...] = ()  # TensorRT keeps no reference of its own


_registrations: dict[str, _Registration] = {}
# What plans hold, by content: every layer's plugin has the same few kernels, and so has a model that is opened again.
# TensorRT's bindings keep a reference to a plugin for each time it was asked for an interface: none of them ever goes.
_kernels: WeakValueDictionary[bytes, Artifacts] = WeakValueDictionary()


def register(
    trt: ModuleType, *, artifacts: Artifacts | None = None, sms: Sequence[int] = (), run: Run | None = None
) -> None:
    """Make every op of plugins.registry known to `trt` (tensorrt or tensorrt_rtx), in the namespace "flex".

    To build: `artifacts`, the model's kernels, of which each plugin puts its own into the plan, as code for `sms`. To
    run: `run(artifacts, launches, stream)`, which must not wait for the device, and `sms`, the one of its GPU. A
    further call replaces all three.

    KernelError when the bindings cannot read what a plan stores (see `require_fields`).
    """
    require_fields(trt)
    state = _registrations.setdefault(trt.__name__, _Registration())
    state.artifacts, state.sms, state.run, state.error = artifacts, tuple(sms), run, None
    if not state.creators:
        creators = _creators(trt, state)
        registry = trt.get_plugin_registry()
        for creator in creators:
            if not registry.register_creator(creator, NAMESPACE):
                raise KernelError(
                    f"another library has registered a plugin {NAMESPACE}::{creator.name}",
                    fix="do not load it in the same process",
                )
        state.creators = creators


def require_fields(trt: ModuleType) -> None:
    """KernelError unless these bindings read a field of several numbers as it was written. Those of TensorRT before
    10.16 were made for NumPy 1: under NumPy 2 every number reads as the first, and no plan's kernels are whole."""
    numbers = np.array([1, 2], np.int8)
    found = np.asarray(trt.PluginField("test", numbers, trt.PluginFieldType.INT8).data).tolist()
    if found != [1, 2]:
        raise KernelError(
            f"the Python bindings of {trt.__name__} {trt.__version__} read the numbers [1, 2] as {found} with NumPy "
            f"{np.__version__}: the kernels that an engine stores cannot be read",
            expected="NumPy 1 with TensorRT before 10.16, whose bindings were made for it",
            fix="pip install 'numpy<2'  # for Python 3.12 or older; or use TensorRT 10.16 or newer",
        )


def _kernels_of(data: bytes) -> Artifacts:
    """The compiled kernels that a plan holds, one object for equal ones; KernelError unless they are whole."""
    key = hashlib.sha256(data).digest()
    found = _kernels.get(key)
    if found is None:
        found = _kernels[key] = Artifacts.from_bytes(data)
    return found


def take_error(trt: ModuleType) -> Exception | None:
    """What went wrong inside a plugin since the last call; TensorRT itself only says that something did."""
    state = _registrations.get(trt.__name__, _Registration())
    error, state.error = state.error, None
    return error


def _kept(method: Callable[..., Any]) -> Callable[..., Any]:
    """TensorRT swallows exceptions of a plugin: keep them for `take_error`, and log them."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as error:
            if self.state.error is None:  # the first is the cause
                self.state.error = error
                _log.error("%s::%s: %s", NAMESPACE, self.op_name, error)
            raise

    return call


def _creators(trt: ModuleType, state: _Registration) -> tuple[Any, ...]:
    """One creator per op."""
    types = {getattr(trt.DataType, kind): name for kind, name in DTYPE_OF_KIND.items()}
    kinds = {name: kind for kind, name in types.items()}

    # TensorRT is passed in: to a type checker its classes are values.
    core: Any = trt.IPluginV3OneCore
    build: Any = trt.IPluginV3OneBuild
    runtime: Any = trt.IPluginV3OneRuntime
    plugin: Any = trt.IPluginV3
    creator: Any = trt.IPluginCreatorV3One

    class Plugin(plugin, core, build, runtime):  # type: ignore[misc]  # see above
        """One node. `building`: made to build an engine, where only its description is wanted, never its result."""

        def __init__(self, op: Op, building: bool, dtype: str | None = None, artifacts: Artifacts | None = None):
            for base in (plugin, core, build, runtime):
                base.__init__(self)
            self.state, self.op, self.op_name, self.building = state, op, op.name, building
            self.dtype, self.artifacts = dtype, artifacts
            self.code: dict[int | None, tuple[Kernel, ...]] = {}  # what `artifacts` has of the op's kernels, by SM
            self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.num_outputs = len(op.outputs)
            self.timing_cache_id = ""
            self.metadata_string = " ".join(f"{name}={value}" for name, value in op.attributes.items())

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Plugin:
            return Plugin(self.op, self.building, self.dtype, self.artifacts)

        def attach_to_context(self, context: Any) -> Plugin:
            return self.clone()

        # Building.

        @_kept
        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            self.dtype = self._model_dtype([types.get(kind) for kind in inputs])
            return [kinds[tensor.kind(self.dtype)] for tensor in self.op.outputs]

        @_kept
        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            given = named(self.op.inputs, ([dims[axis] for axis in range(len(dims))] for dims in inputs))
            made = self.op.output_shapes(given)
            shapes = [made[tensor.name] for tensor in self.op.outputs]
            return [
                trt.DimsExprs([builder.constant(size) if isinstance(size, int) else size for size in shape])
                for shape in shapes
            ]

        @_kept
        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            known = (*self.op.inputs, *self.op.outputs)
            models = [index for index in range(position + 1) if known[index].dtype == "model"]
            tensor, found = tensors[position].desc, types.get(tensors[position].desc.type)
            if tensor.format != trt.TensorFormat.LINEAR:
                return False
            if known[position].dtype == "model":
                return found in MODEL_DTYPES and tensor.type == tensors[models[0]].desc.type
            return found == known[position].dtype

        @_kept
        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            self.dtype = self._model_dtype([types.get(tensor.desc.type) for tensor in inputs])

        @_kept
        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            shapes = named(self.op.inputs, (tuple(tensor.max) for tensor in inputs))
            return self.op.workspace(self.dtype or MODEL_DTYPES[0], shapes)

        def get_valid_tactics(self) -> list[int]:
            return []  # one way to run, TensorRT's tactic 0

        def set_tactic(self, tactic: int) -> None:
            pass

        @_kept
        def get_fields_to_serialize(self) -> Any:
            artifacts = self.artifacts
            if artifacts is None:
                if state.artifacts is None:
                    raise KernelError(
                        f"no compiled kernels for {NAMESPACE}::{self.op_name}", fix="build from a bundle with kernels"
                    )
                artifacts = state.artifacts.subset(self.op.kernels(self.dtype or MODEL_DTYPES[0]), state.sms)
            numbers = {**self.op.attributes, DTYPE: MODEL_DTYPES.index(self.dtype or MODEL_DTYPES[0])}
            int32, int8 = trt.PluginFieldType.INT32, trt.PluginFieldType.INT8
            data = [(name, np.array([value], np.int32), int32) for name, value in numbers.items()]
            data.append((KERNELS, np.frombuffer(artifacts.to_bytes(), np.int8), int8))
            fields = trt.PluginFieldCollection([trt.PluginField(*field) for field in data])
            # A field is but a pointer, which TensorRT follows after this returns: let the arrays live as the plugin.
            self._serialised = fields, data
            return fields

        # Running.

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass  # `enqueue` is told the shapes, and launches depend on nothing else

        @_kept
        def enqueue(
            self,
            input_descs: Sequence[Any],
            output_descs: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if self.building:
                return  # TensorRT times its only choice, on random numbers: random positions would write anywhere
            addresses = named(self.op.inputs, inputs) | named(self.op.outputs, outputs)
            nowhere = [tensor.name for tensor in self.op.outputs if not addresses[tensor.name]]
            if nowhere:  # an output that nobody reads is written all the same
                raise KernelError(
                    f"{self.op_name}: TensorRT gives no memory for {nowhere[0]}",
                    expected="an address for each output, whether another node reads it or not",
                    fix="build with --no-plugins, with TensorRT 10.15 or newer",
                )
            for output, source in self.op.in_place.items():
                if addresses[output] != addresses[source]:
                    raise KernelError(
                        f"{self.op_name}: {output} is at {addresses[output]:#x}, {source} at {addresses[source]:#x}",
                        expected="one buffer bound to both: the cache is updated in place",
                        fix="set the same address for both tensors; if it was, this TensorRT copies the cache",
                    )
            if state.run is None or self.artifacts is None or self.dtype is None:
                raise KernelError(
                    f"{self.op_name} was not told how to launch kernels",
                    fix="call plugins.tensorrt.register(trt, run=...) before the plan is opened",
                )
            shapes = named(self.op.inputs, (tuple(desc.dims) for desc in input_descs))
            sm = state.sms[0] if state.sms else None
            if sm not in self.code:  # asking takes longer than launching
                self.code[sm] = self.artifacts.on(self.op.kernels(self.dtype), sm)
            launches = self.op.launches(self.dtype, shapes, addresses, workspace, self.code[sm])
            state.run(self.artifacts, launches, stream)

        def _model_dtype(self, found: Sequence[str | None]) -> str:
            """The dtype the model computes in, by the dtypes of all inputs; KernelError if they do not fit the op."""
            if len(found) != len(self.op.inputs):
                raise KernelError(f"{self.op_name} has {len(found)} inputs", expected=f"{len(self.op.inputs)}")
            given = list(zip(found, self.op.inputs, strict=True))
            model = next((kind for kind, tensor in given if tensor.dtype == "model"), MODEL_DTYPES[0])
            usual = model if model in MODEL_DTYPES else " or ".join(MODEL_DTYPES)
            for kind, tensor in given:
                expected = usual if tensor.dtype == "model" else tensor.dtype
                if kind != expected:
                    raise KernelError(
                        f"{self.op_name}: {tensor.name} is {kind}", expected=expected, fix=REBUILD_KERNELS
                    )
            return str(model)

    class Creator(creator):  # type: ignore[misc]  # see above
        def __init__(self, op: type[Op]):
            creator.__init__(self)
            self.state, self.op, self.op_name = state, op, op.name
            self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            fields = [trt.PluginField(name, b"", trt.PluginFieldType.INT32) for name in op.attribute_names]
            self.field_names = trt.PluginFieldCollection(fields)

        @_kept
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Plugin:
            """`fields`: attributes of an ONNX node, or everything a plan stores."""
            given = {field.name: field for field in fields}
            missing = [name for name in self.op.attribute_names if name not in given and name not in self.op.defaults]
            if missing:
                raise KernelError(
                    f"{self.op_name} ({name}) has no attribute {missing[0]}",
                    expected=", ".join(self.op.attribute_names),
                    fix=REBUILD_KERNELS,
                )
            names = [key for key in self.op.attribute_names if key in given]
            op = self.op(**{key: int(np.asarray(given[key].data).ravel()[0]) for key in names})
            if KERNELS not in given:
                return Plugin(op, building=True)
            dtype = MODEL_DTYPES[int(np.asarray(given[DTYPE].data).ravel()[0])]
            artifacts = _kernels_of(np.asarray(given[KERNELS].data).tobytes())
            return Plugin(op, phase == trt.TensorRTPhase.BUILD, dtype, artifacts)

    return tuple(Creator(op) for op in OPS.values())
