"""ONNX Runtime with a CUDA provider, on the CPU: every session runs on the CPU's, behind the rules of CUDA graphs.

`Provider()` takes the place of the module onnxruntime. Tensors on "cuda" have memory of their own, filled with 0xFF
(NaN) when nobody has written it. A session with enable_cuda_graph refuses branches and loops, runs a new gpu_graph_id
three times, and from then on launches it. Where ONNX Runtime would compute something else without a word, or record
again, or fail, this raises RuleBroken: when other memory is bound than was recorded, or the host's; when a graph that
is known to one thread is asked for by another; when anybody uses the device while a graph is recorded, or another run
works in the arena.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as real

PROVIDER, DEFAULT = "CUDAExecutionProvider", "0"
BRANCHES = {"If", "Loop", "Scan"}
RUNS = 3  # of a step until it is recorded, and has happened: twice to warm up, and as a graph


class RuleBroken(BaseException):
    """No Exception: nobody takes it for an error of ONNX Runtime, and goes on without graphs."""


def require(holds: bool, rule: str) -> None:
    """RuleBroken unless it holds."""
    if not holds:
        raise RuleBroken(rule)


@dataclass(eq=False)
class Provider:
    """The module, and what happened: runs counts (part of a file's name, id, "run" | "recorded" | "launched"). room:
    bytes of the device's memory, None = enough. refuses: sessions that record are. breaks: recording fails with it."""

    version: str = "1.31.1"
    room: int | None = None
    refuses: str | None = None
    breaks: str | None = None
    runs: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    taken: int = 0

    GraphOptimizationLevel = real.GraphOptimizationLevel
    SessionOptions = real.SessionOptions
    RunOptions = real.RunOptions

    def __post_init__(self) -> None:
        self._busy: int | None = None
        provider = self

        class OrtValue(Value):
            _provider = provider

        class InferenceSession(Session):
            _provider = provider

        self.OrtValue, self.InferenceSession = OrtValue, InferenceSession

    @property
    def __version__(self) -> str:
        return self.version

    def get_available_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        """Finds CUDA and cuDNN, elsewhere."""

    def graphs(self) -> int:
        """How many were recorded."""
        return sum(count for (_, _, what), count in self.runs.items() if what == "recorded")

    def launched(self) -> int:
        """How many runs were graphs."""
        return sum(count for (_, _, what), count in self.runs.items() if what == "launched")

    def used(self) -> None:
        """Somebody uses the device."""
        require(self._busy in (None, threading.get_ident()), "the device was used by another thread during a run")

    @contextmanager
    def running(self) -> Iterator[None]:
        """A run: nobody else may use the device."""
        self.used()
        self._busy = threading.get_ident()
        try:
            yield
        finally:
            self._busy = None


class Value:
    """A tensor on the device; also what a session leaves there."""

    _provider: Provider

    def __init__(self, array: np.ndarray) -> None:
        provider = self._provider
        provider.used()
        if provider.room is not None and provider.taken + array.nbytes > provider.room:
            raise RuntimeError(f"Failed to allocate memory for requested buffer of size {array.nbytes}")
        self._array, self._size = array, array.nbytes
        provider.taken += self._size
        self._ortvalue = real.OrtValue.ortvalue_from_numpy(array)

    def __del__(self) -> None:
        self._provider.taken -= getattr(self, "_size", 0)

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str = "cpu", number: int = 0) -> Any:
        assert device == "cuda", "this is for the GPU"
        return cls(array.copy())

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: tuple[int, ...], dtype: type, device: str = "cpu", n: int = 0) -> Any:
        assert device == "cuda", "this is for the GPU"
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 255
        return cls(array)

    def update_inplace(self, array: np.ndarray) -> None:
        self._provider.used()
        assert array.shape == self._array.shape and array.dtype == self._array.dtype
        self._array[...] = array

    def numpy(self) -> np.ndarray:
        self._provider.used()
        return self._array.copy()

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def shape(self) -> list[int]:
        return list(self._array.shape)

    def tensor_size_in_bytes(self) -> int:
        return self._size


class Binding:
    """What is bound to a session's inputs and outputs: addresses by name, None in the host's memory."""

    def __init__(self, session: Session) -> None:
        self.real, self._session = session.real.io_binding(), session
        self.bound: dict[str, tuple[int, tuple[int, ...]] | None] = {}
        self._kept: dict[str, object] = {}

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        self.real.bind_ortvalue_input(name, value._ortvalue)
        self.bound[name], self._kept[f"in {name}"] = (value.data_ptr(), tuple(value.shape())), value

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        self.real.bind_ortvalue_output(name, value._ortvalue)
        self.bound[name], self._kept[f"out {name}"] = (value.data_ptr(), tuple(value.shape())), value

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.real.bind_cpu_input(name, array)
        self.bound[name] = None

    def bind_input(self, name: str, device: str, number: int, dtype: type, shape: list[int], address: int) -> None:
        assert device == "cuda"
        self.real.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(self, name: str, device: str, number: int = 0, dtype: Any = None, shape: Any = None,
                    address: Any = None) -> None:  # fmt: skip
        assert device == "cuda"
        self.real.bind_output(name, "cpu", 0, dtype, shape, address)

    def synchronize_outputs(self) -> None:
        self._session._provider.used()

    def get_outputs(self) -> list[Value]:
        return [self._session._provider.OrtValue(value.numpy().copy()) for value in self.real.get_outputs()]


class Session:
    """A session on the CPU's provider that keeps to the rules."""

    _provider: Provider

    def __init__(self, path: Path | bytes, options: real.SessionOptions, providers: list[tuple[str, dict]]) -> None:
        self._provider.used()
        ((name, given),) = providers
        assert name == PROVIDER and set(given) <= {"use_tf32", "enable_cuda_graph"}
        self.name = "bytes" if isinstance(path, bytes) else path.name.partition(".")[0]
        self.recording = given.get("enable_cuda_graph") == "1"
        if self.recording:
            nodes = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
            refused = "as the model has control flow nodes" if nodes & BRANCHES else self._provider.refuses
            if refused:
                raise RuntimeError(f"This session cannot use the graph capture feature as requested {refused}")
        self.real = real.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self._graphs: dict[str, tuple[int, dict]] = {}  # the thread, and what was bound

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, options: real.RunOptions | None = None) -> None:
        number = DEFAULT if options is None else options.get_run_config_entry("gpu_graph_id")
        with self._provider.running():
            if not self.recording or number == "-1":
                self._run(binding, number, "run")
                return
            require(number != DEFAULT, "the default id is ONNX Runtime's own")
            require(None not in binding.bound.values(), "a graph reads no memory of the host's")
            if number not in self._graphs:
                if self._provider.breaks:
                    self._run(binding, number, "run")
                    raise RuntimeError(self._provider.breaks)
                for _ in range(RUNS - 1):
                    self._run(binding, number, "run")
                self._graphs[number] = threading.get_ident(), dict(binding.bound)
                self._run(binding, number, "recorded")
                return
            thread, bound = self._graphs[number]
            require(thread == threading.get_ident(), "a graph is known to the thread that recorded it")
            require(bound == binding.bound, "a graph works where it was recorded")
            self._run(binding, number, "launched")

    def _run(self, binding: Binding, number: str, what: str) -> None:
        self.real.run_with_iobinding(binding.real)
        self._provider.runs[self.name, number, what] += 1
