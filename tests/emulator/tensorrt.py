"""TensorRT without a GPU: what the runtime uses of it, over a bundle's ONNX Runtime graphs and the emulated driver.

An engine file says which graph it stands for, and its profiles. A run reads and writes the bound addresses; it must not
be recorded before a first run with the same shapes and addresses, and a recording is void once they change. Engines
with plugins: see plugins.py beside this file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from engines import cuda
from engines.bundle.folder import Bundle, sha256
from engines.bundle.kinds import ONNXRUNTIME, TRACED
from engines.bundle.manifest import MANIFEST, File, Plan
from engines.bundle.specs import TensorSpec, in_place, plan_io
from engines.bundle.writer import write_manifest
from engines.trt import library
from engines.trt.build import attributes, profiles
from engines.trt.options import EngineOptions
from plugins.registry import kernels_of_model
from tests.emulator.driver import Driver, emulated_artifacts
from tests.emulator.plugins import CLASSES, PluginGraph, PluginRun, Registry

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
) -> Path:
    """A copy of a bundle that has emulated engines for `backend`, and opens with them unless told otherwise.

    `plugins`: the decoder's is of the traced graph, its custom ops go through the project's plugins; without `prefill`
    only where there is one new token, to save time.
    """
    out.mkdir()
    for file in folder.iterdir():
        if file.name != MANIFEST:
            shutil.copy(file, out / file.name)  # onnx reads no hard links
    bundle = Bundle(folder, verify=False)
    manifest, files, parts = bundle.manifest, dict(bundle.manifest.files), {}
    g = manifest.geometry
    if plugins:
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
        content = {"tag": TAG, "graph": str((out / part.graphs[ONNXRUNTIME].file).resolve()), "plan": asdict(plan)}
        if with_kernels:
            traced, kernels = (str((out / file).resolve()) for file in (part.graphs[TRACED].file, KERNELS))
            content |= {"traced": traced, "kernels": kernels, "prefill": prefill}
        (out / plan.file).write_text(json.dumps(content))
        files[plan.file] = File((out / plan.file).stat().st_size, sha256(out / plan.file))
        parts[name] = replace(part, plans={backend: plan})
    changed = replace(manifest, parts=parts, files=files, backend=backend, kernels=KERNELS if plugins else None)
    write_manifest(out, changed)
    return out


def module(driver: Driver, name: str = "tensorrt", version: str = "10.3.0") -> SimpleNamespace:
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
            return Engine(driver, registry, content, lambda text: self.logger.log(severity.ERROR, text))

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
    monkeypatch.setattr(library, "load", lambda backend: module(driver, backend.replace("-", "_"), **change))


@cache
def _session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Engine:
    """ICudaEngine."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, driver: Driver, registry: Registry, content: dict, say: Callable[[str], None]) -> None:
        self.driver, self.say = driver, say
        self.plan = plan = content["plan"]
        self.session, self.graph, self.prefill = _session(content["graph"]), None, content.get("prefill")
        if plan["plugins"]:
            self.graph = PluginGraph(driver, registry, content["traced"], content["kernels"])
        self.specs = {spec["name"]: spec for spec in (*plan["inputs"], *plan["outputs"])}
        self.inputs = [spec["name"] for spec in plan["inputs"]]
        self.in_place = in_place(TensorSpec(**spec) for spec in plan["outputs"])
        self.num_io_tensors = len(self.specs)

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
        self._plugins = PluginRun(engine.graph) if engine.graph else None

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH and address % 256 == 0
        assert self.sizes is not None, "which profile, before the memory it works in"
        self.engine.driver.memory.check(address, size, "scratch memory")
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
        driver, shapes, addresses = self.engine.driver, dict(self.shapes), dict(self.addresses)
        if set(addresses) != set(self.engine.specs) or not set(self.engine.inputs) <= set(shapes) or not self.scratch:
            self.engine.say("a tensor has no address or shape")
            return False
        recorded, version = driver.capturing(stream), self.version
        if recorded and self.ready != version:
            driver.break_capture(stream)
        if not recorded:
            self.ready = version

        def check() -> None:
            assert not recorded or self.version == version, "the context has changed since this was recorded"

        driver.submit(stream, check)
        if self._plugins and (self.engine.prefill or shapes["input_ids"][1] == 1):
            return self._plugins.enqueue(*self._views(shapes, addresses), addresses, stream)
        driver.submit(stream, lambda: self._execute(*self._views(shapes, addresses)))
        return True

    def _views(
        self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The memory of all inputs, and of all outputs."""
        engine, memory = self.engine, self.engine.driver.memory
        symbols = {
            symbol: size
            for name, shape in shapes.items()
            for symbol, size in zip(engine.specs[name]["shape"], shape, strict=True)
            if isinstance(symbol, str)
        }
        views: tuple[dict, dict] = {}, {}
        for name, spec in engine.specs.items():
            shape = tuple(symbols[size] if isinstance(size, str) else size for size in spec["shape"])
            view = memory.view(addresses[name], shape, spec["dtype"], f"tensor {name}")
            views[name not in engine.inputs][name] = view
            assert addresses[engine.in_place.get(name, name)] == addresses[name], f"{name} is not updated in place"
        return views

    def _execute(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        scratch = self.engine.driver.memory.view(self.scratch, (SCRATCH,), np.uint8, "scratch memory")
        scratch.fill(0xFF)  # nobody may count on what another run left there
        results = self.engine.session.run(list(outputs), inputs)
        for view, result in zip(outputs.values(), results, strict=True):
            assert view.dtype == result.dtype and view.shape == result.shape
            view[...] = result
