"""TensorRT without its library: what the runtime uses of it, over the emulated driver (`install`) or on a real GPU
(`rehearse`), where all but the library runs for real.

An engine file says which graph it stands for, and its profiles. A run reads and writes the bound addresses; it must not
be recorded before a first run with the same shapes and addresses, and a recording is void once they change. Engines
with plugins are of traced graphs (traced.py); others, which the emulated driver alone runs, of ONNX Runtime's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from engines import cuda
from engines.bundle.folder import Bundle, sha256
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA, TRACED
from engines.bundle.manifest import MANIFEST, File, Link, Plan
from engines.bundle.specs import TensorSpec, in_place, plan_io
from engines.bundle.writer import write_manifest
from engines.cuda import Cuda
from engines.trt import library
from engines.trt.build import attributes
from engines.trt.cut import cut
from engines.trt.options import EngineOptions
from engines.trt.tasks import profiles
from plugins.artifacts import Artifacts
from plugins.registry import kernels_of_model
from tests.emulator.device import Device, OnGpu, OnHost
from tests.emulator.driver import Driver, emulated_artifacts
from tests.emulator.plugins import CLASSES, Registry
from tests.emulator.traced import TORCH, Program, Traced, TracedRun

SCRATCH = 1 << 16
_REGISTRIES: dict[str, Registry] = {}  # one per module, as long as the process
TAG, KERNELS = "emulated engine", "kernels.zip"


def with_plans(
    folder: Path,
    out: Path,
    backend: str,
    *,
    version: str = "10.3.0",
    sms: tuple[int, ...] = (86,),
    most: int = 2,
    plugins: bool = False,
    prefill: bool = True,
    layers_per_engine: int | None = None,
    page_layers: int | None = None,
    artifacts: Artifacts | None = None,
) -> Path:
    """A copy of a bundle that has emulated engines for `backend`, and opens with them unless told otherwise.

    `plugins`: they are of the traced graphs, custom ops go through the project's plugins; without `prefill` the
    decoder's only where there is one new token, to save time. `layers_per_engine`: of the decoder, `page_layers`: of
    the projection of pages, where they are several engines. `artifacts`: the kernels, for a real GPU; else those that
    the emulated driver loads.
    """
    out.mkdir()
    for file in folder.iterdir():
        if file.name != MANIFEST:
            shutil.copy(file, out / file.name)  # onnx reads no hard links
    bundle = Bundle(folder, verify=False)
    manifest, files, parts = bundle.manifest, dict(bundle.manifest.files), {}
    g = manifest.geometry
    if plugins:
        if artifacts is None:
            artifacts = emulated_artifacts(kernels_of_model(attributes(g), bundle.precision.dtype), sms)
        artifacts.write(out / KERNELS)
        files[KERNELS] = File((out / KERNELS).stat().st_size, artifacts.sha256)
    for name, part in manifest.parts.items():
        with_kernels = plugins and name == "decoder"
        inputs, outputs = plan_io(name, g, bundle.precision)
        options = EngineOptions(backend, batch=most)
        plan = Plan(
            f"{name}.{backend}.plan", inputs, outputs, profiles(name, g, options), plugins=with_kernels,
            tensorrt=version, cuda="12.6", sms=sms, kernels=files[KERNELS].sha256 if with_kernels else None,
        )  # fmt: skip
        engines = [(plan, part.graphs[TRACED if plugins else ONNXRUNTIME].file)]
        size = {"pages": page_layers, "decoder": layers_per_engine}.get(name)
        if size:
            assert prefill or name == "pages", "a prefill by another graph is of the whole decoder"
            # Of ONNX Runtime's graphs the one that has no branches, whose nodes name all that they read.
            kind, links = TRACED if plugins else ONNXRUNTIME_CUDA if name == "decoder" else ONNXRUNTIME, []
            traced, graph = (out / part.graphs[TRACED].file).read_bytes(), out / part.graphs[kind].file
            how = {"rebuild": "python export/build.py", "traced": None if plugins or name == "pages" else traced}
            for piece in cut(name, graph.read_bytes(), graph.name, g, size, inputs, outputs, **how):
                stem = f"{name}-{piece.begin}-{piece.end - 1}"
                (out / f"{stem}.onnx").write_bytes(piece.graph)
                links.append(Link(f"{stem}.{backend}.plan", (piece.begin, piece.end), piece.inputs, piece.outputs))
            plan = replace(plan, file=links[0].file, chain=tuple(links))
            engines = [(each, f"{each.file.removesuffix(f'.{backend}.plan')}.onnx") for each in plan.engines]
        for each, graph in engines:
            content = {"tag": TAG, "plan": asdict(each)}
            if plugins:
                content["traced"] = str((out / graph).resolve())
            else:
                content["graph"] = str((out / graph).resolve())
            if with_kernels:
                content["kernels"] = str((out / KERNELS).resolve())
            if with_kernels and not prefill:
                content["graph"] = str((out / part.graphs[ONNXRUNTIME].file).resolve())
            (out / each.file).write_text(json.dumps(content))
            files[each.file] = File((out / each.file).stat().st_size, sha256(out / each.file))
        parts[name] = replace(part, plans={backend: plan})
    changed = replace(manifest, parts=parts, files=files, backend=backend, kernels=KERNELS if plugins else None)
    write_manifest(out, changed)
    return out


def module(device: Device, name: str = "tensorrt", version: str = "10.3.0") -> SimpleNamespace:
    """The module a backend imports."""
    registry = _REGISTRIES.setdefault(name, Registry())
    names = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
    severity = IntEnum("Severity", names)

    class ILogger:
        Severity = severity

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            try:
                content = json.loads(bytes(data))
                assert content["tag"] == TAG
            except (ValueError, KeyError, AssertionError):
                self.logger.log(severity.ERROR, "Serialization assertion failed: magic tag does not match")
                return None
            return Engine(device, registry, content, lambda text: self.logger.log(severity.ERROR, text))

    strategy = IntEnum("ExecutionContextAllocationStrategy", {"STATIC": 0, "USER_MANAGED": 2})
    return SimpleNamespace(
        __name__=f"emulated_{name}",  # plugins are registered once per module of this name
        __version__=version,
        ILogger=ILogger,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=strategy,
        get_plugin_registry=lambda: registry,
        **CLASSES,
    )


def install(driver: Driver, monkeypatch: pytest.MonkeyPatch, **change: str) -> None:
    """Let this process find the emulated driver and TensorRT, for as long as `monkeypatch` lasts. `change`: of
    `module`."""
    monkeypatch.setattr(cuda, "_import", lambda: driver)
    device = OnHost(driver)
    monkeypatch.setattr(library, "load", lambda backend: module(device, backend.replace("-", "_"), **change))


def rehearse(gpu: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find, in place of TensorRT, its stand-in on a real GPU, for as long as `monkeypatch` lasts."""
    device = OnGpu(gpu)
    monkeypatch.setattr(library, "load", lambda backend: module(device, f"{backend.replace('-', '_')}_on_gpu"))


@cache
def _session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Engine:
    """ICudaEngine."""

    def __init__(self, device: Device, registry: Registry, content: dict, say: Callable[[str], None]) -> None:
        self.device, self.say = device, say
        self.plan = plan = content["plan"]
        self.specs = {spec["name"]: spec for spec in (*plan["inputs"], *plan["outputs"])}
        self.inputs = [spec["name"] for spec in plan["inputs"]]
        self.in_place = in_place(TensorSpec(**spec) for spec in plan["outputs"])
        self.num_io_tensors = len(self.specs)
        self.device_memory_size_v2 = SCRATCH
        self.session = _session(content["graph"]) if "graph" in content else None
        self.traced = None
        if "traced" in content:
            self.traced = Traced(device, registry, content["traced"], content.get("kernels"))
            largest = [{symbol: size[2] for symbol, size in each["sizes"].items()} for each in plan["profiles"]]
            self.device_memory_size_v2 += max(self.program(self.shapes(each)).scratch for each in largest)

    def shapes(self, symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Of all inputs and outputs, where symbols have these sizes."""
        return {
            name: tuple(symbols[size] if isinstance(size, str) else size for size in spec["shape"])
            for name, spec in self.specs.items()
        }

    def program(self, shapes: Mapping[str, tuple[int, ...]]) -> Program:
        """What a traced graph has to do for these shapes."""
        assert self.traced
        return self.traced.program({name: (shapes[name], TORCH[self.specs[name]["dtype"]]) for name in self.inputs})

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def create_execution_context(self, strategy: int) -> Context:
        assert strategy == 2, "the executor brings its own scratch memory"
        return Context(self)


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.scratch: int | None = None
        self.sizes: dict | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.version = 0  # of shapes and addresses; a recording is of one
        self.ready = -1  # the version of the last run that was not recorded
        self._run = TracedRun(engine.traced) if engine.traced else None
        self._bound: tuple[int, dict[str, Tensor]] = -1, {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2 and address % 256 == 0
        assert self.sizes is not None, "which profile, before the memory it works in"
        self.engine.device.check(address, size, "scratch memory")
        self.scratch = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        known = self.engine.plan["profiles"]
        if not 0 <= index < len(known):
            raise RuntimeError("CUDA error in setting optimization profile")
        self.sizes = known[index]["sizes"]
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        spec = self.engine.specs[name]["shape"]
        if len(shape) != len(spec):
            return False
        for size, known in zip(shape, spec, strict=True):
            low, _, high = self.sizes[known] if isinstance(known, str) else (known, known, known)
            if not low <= size <= high:
                self.engine.say(f"{name}: {size} is not within {low} .. {high}")
                return False
        if self.shapes.get(name) != tuple(shape):
            self.version += 1
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.addresses.get(name) != address:
            self.version += 1
        self.addresses[name] = address
        return name in self.engine.specs and address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        engine, device, addresses = self.engine, self.engine.device, dict(self.addresses)
        if set(addresses) != set(engine.specs) or not set(engine.inputs) <= set(self.shapes) or not self.scratch:
            engine.say("a tensor has no address or shape")
            return False
        for name, source in engine.in_place.items():
            assert addresses[name] == addresses[source], f"{name} is not updated in place"
        recorded, version = device.capturing(stream), self.version
        if recorded and self.ready != version:
            device.break_capture(stream)
        if not recorded:
            self.ready = version
        shapes = self._all_shapes()

        def check() -> None:
            assert not recorded or self.version == version, "the context has changed since this was recorded"

        with device.working(stream) as ask:
            ask(check)
        if self._run and (engine.session is None or shapes["input_ids"][1] == 1):
            if self._bound[0] != version:  # not while recording: torch asks the driver what memory that is
                self._bound = version, self._tensors(shapes, addresses)
            return self._run.enqueue(engine.program(shapes), self._bound[1], self.scratch, stream)
        tensors = self._tensors(shapes, addresses)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        with device.working(stream) as ask:
            ask(lambda: self._execute(arrays))
        return True

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.engine.shapes(
            {
                symbol: size
                for name, shape in self.shapes.items()
                for symbol, size in zip(self.engine.specs[name]["shape"], shape, strict=True)
                if isinstance(symbol, str)
            }
        )

    def _tensors(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> dict[str, Tensor]:
        """The memory of all inputs and outputs."""
        return {
            name: self.engine.device.at(addresses[name], shapes[name], TORCH[spec["dtype"]], f"tensor {name}")
            for name, spec in self.engine.specs.items()
        }

    def _execute(self, arrays: dict[str, np.ndarray]) -> None:
        assert self.scratch
        self.engine.device.at(self.scratch, (SCRATCH,), torch.uint8, "scratch memory").fill_(0xFF)  # see traced.py
        inputs = {name: arrays[name] for name in self.engine.inputs}
        outputs = {name: array for name, array in arrays.items() if name not in inputs}
        if np.float16 in {array.dtype for array in arrays.values()}:  # ONNX Runtime's graphs of it compute in float32
            floats = {each.name for each in self.engine.session.get_inputs() if each.type == "tensor(float)"}
            inputs = {name: array.astype(np.float32) if name in floats else array for name, array in inputs.items()}
        results = self.engine.session.run(list(outputs), inputs)
        for view, result in zip(outputs.values(), results, strict=True):
            assert view.shape == result.shape and view.dtype.kind == result.dtype.kind
            view[...] = result
