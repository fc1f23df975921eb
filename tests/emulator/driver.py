"""A CUDA driver without a GPU: what engines/cuda.py calls of cuda.bindings.driver, over host memory.

Stricter than hardware: work asked of a stream is done only when somebody waits for it, memory is NaN until written,
every address is checked when it is used, a graph may record nothing that capture forbids, and no thread may ask a
stream for anything before what another has asked of it is done. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from enum import IntEnum
from time import perf_counter
from types import SimpleNamespace

import numpy as np

from plugins.artifacts import Artifacts, Compiled, kernel_of
from plugins.op import Kernel, Launch
from tests.emulator.interpreter import run
from tests.emulator.memory import Memory, aligned

OK, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, INVALID_IMAGE, INVALID_CONTEXT, NOT_FOUND = 0, 1, 2, 100, 200, 201, 500
UNSUPPORTED_IN_CAPTURE, CAPTURE_INVALIDATED = 900, 901
TEXTS = {
    INVALID_VALUE: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    OUT_OF_MEMORY: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    NO_DEVICE: ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
    INVALID_IMAGE: ("CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"),
    INVALID_CONTEXT: ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
    NOT_FOUND: ("CUDA_ERROR_NOT_FOUND", "named symbol not found"),
    UNSUPPORTED_IN_CAPTURE: ("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when capturing"),
    CAPTURE_INVALIDATED: ("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "capture failed due to a previous error"),
}


def emulated_artifacts(kernels: Iterable[Kernel], sms: Iterable[int] = (86,)) -> Artifacts:
    """Compiled kernels that the emulated driver loads."""
    return Artifacts(tuple(emulated(kernel, kernel.name, sms) for kernel in kernels), {})


def emulated(kernel: Kernel, entry: str, sms: Iterable[int] = (86,)) -> Compiled:
    """A compiled kernel, whose symbol is `entry`: in place of code, which kernel it is."""
    code = json.dumps(asdict(kernel) | {"name": entry}).encode()
    cubins = {sm: b"cubin:" + code for sm in sms}
    return Compiled(kernel, entry, 0, 32 * kernel.warps, b"ptx:" + code, cubins, dict.fromkeys(cubins, 0))


WITHOUT_CONTEXT = "cuInit", "cuDriver", "cuDevice", "cuCtx", "cuGetError"  # how functions begin that need none


class _Stream:
    def __init__(self) -> None:
        self.asker: int | None = None  # the thread that has asked for what waits, or that captures
        self.waiting: list[Callable[[], None]] = []
        self.graph: list[Callable[[], None]] | None = None  # while capturing
        self.broken = False  # something forbidden was done


class Driver:
    """The functions and constants. `counts`: calls by name; `memory`: the device's; `pinned`: the host's."""

    CUDA_VERSION = 12080  # of the bindings
    CU_MEMHOSTALLOC_DEVICEMAP = 2
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUstream_flags = IntEnum("CUstream_flags", {"CU_STREAM_NON_BLOCKING": 1})
    CUevent_flags = IntEnum("CUevent_flags", {"CU_EVENT_DEFAULT": 0})
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_INTEGRATED="integrated",
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared",
    )

    def __init__(
        self, *, sm: int = 86, integrated: bool = False, total: int = 8 << 30, version: int = 12060, devices: int = 1
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.memory, self.pinned = Memory(), Memory()
        self.launches: list[str] = []  # names of the kernels that ran
        self._attributes = {"major": sm // 10, "minor": sm % 10, "integrated": int(integrated), "shared": 99 << 10}
        self._sm, self._total, self._version, self._devices = sm, total, version, devices
        self._objects: dict[int, object] = {}
        self._calling, self._thread = threading.RLock(), threading.local()

    def __getattribute__(self, name: str) -> object:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found
        self.counts[name] += 1

        def call(*arguments: object) -> tuple:
            if not name.startswith(WITHOUT_CONTEXT) and not getattr(self._thread, "current", False):
                return INVALID_CONTEXT, None
            with self._calling:
                return found(*arguments)

        return call

    # What the emulated TensorRT uses.

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Ask a stream to do something, or record it."""
        queue, asker = self._objects[int(stream)], threading.get_ident()
        if queue.waiting or queue.graph is not None:
            assert queue.asker == asker, "a stream is asked while another thread's work waits in it"
        queue.asker = asker
        (queue.waiting if queue.graph is None else queue.graph).append(work)

    def capturing(self, stream: int) -> bool:
        """Whether what is asked of the stream is recorded."""
        return self._objects[int(stream)].graph is not None

    def break_capture(self, stream: int) -> None:
        """Something forbidden was asked of a stream that is recorded."""
        self._objects[int(stream)].broken = True

    # Device and context.

    def cuInit(self, flags: int) -> tuple:
        return (OK if self._devices else NO_DEVICE,)

    def cuDriverGetVersion(self) -> tuple:
        return OK, self._version

    def cuDeviceGetCount(self) -> tuple:
        return OK, self._devices

    def cuDeviceGet(self, ordinal: int) -> tuple:
        return OK, ordinal

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple:
        return OK, self._attributes[attribute]

    def cuDeviceGetName(self, length: int, device: int) -> tuple:
        return OK, b"Emulated GPU".ljust(length, b"\0")

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple:
        return OK, "context"

    def cuCtxSetCurrent(self, context: str) -> tuple:
        self._thread.current = context == "context"
        return (OK if self._thread.current else INVALID_VALUE,)

    def cuGetErrorName(self, status: int) -> tuple:
        return OK, TEXTS[int(status)][0].encode()

    def cuGetErrorString(self, status: int) -> tuple:
        return OK, TEXTS[int(status)][1].encode()

    # Memory.

    def cuMemGetInfo(self) -> tuple:
        return OK, (self._total - self.memory.bytes()), self._total

    def cuMemAlloc(self, size: int) -> tuple:
        if self._forbidden():
            return UNSUPPORTED_IN_CAPTURE, None
        if size <= 0:
            return INVALID_VALUE, None
        if self.memory.bytes() + size > self._total:
            return OUT_OF_MEMORY, None
        return OK, self.memory.add(aligned(size, np.uint8), "device memory")

    def cuMemFree(self, address: int) -> tuple:
        if self._forbidden():
            return (UNSUPPORTED_IN_CAPTURE,)
        for each in self._streams():
            self._drain(each)
        self.memory.remove(int(address))
        return (OK,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple:
        if self._forbidden():
            return UNSUPPORTED_IN_CAPTURE, None
        array = aligned(size, np.uint8)
        if flags & self.CU_MEMHOSTALLOC_DEVICEMAP:
            self.memory.add(array, "mapped memory")
        return OK, self.pinned.add(array, "pinned memory")

    def cuMemFreeHost(self, address: int) -> tuple:
        for each in self._streams():
            self._drain(each)
        self.pinned.remove(address)
        if self._attributes["integrated"]:
            self.memory.remove(address)
        return (OK,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple:
        self.memory.check(address, 1, "cuMemHostGetDevicePointer")
        return OK, address

    def cuMemsetD8Async(self, address: int, byte: int, size: int, stream: int) -> tuple:
        self.submit(stream, lambda: self._bytes(address, size, "cuMemsetD8Async").fill(byte))
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple:
        return self._copy(stream, target, source, size, host=source)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple:
        return self._copy(stream, target, source, size, host=target)

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple:
        def copy() -> None:
            self._bytes(target, size, "a copy")[:] = self._bytes(source, size, "a copy")

        self.submit(stream, copy)
        return (OK,)

    def _copy(self, stream: int, target: int, source: int, size: int, host: int) -> tuple:
        if self.capturing(stream):  # of pageable memory the copy would read now, not when the graph runs
            self.pinned.check(host, size, "a recorded copy")
        device = target if host == source else source

        def copy() -> None:
            self.memory.check(device, size, "a copy")
            ctypes.memmove(target, source, size)

        self.submit(stream, copy)
        return (OK,)

    def _bytes(self, address: int, size: int, what: str) -> np.ndarray:
        return self.memory.view(int(address), (size,), np.uint8, what)

    # Streams and events.

    def cuStreamCreate(self, flags: int) -> tuple:
        return OK, self._keep(_Stream())

    def cuStreamDestroy(self, stream: int) -> tuple:
        self._drain(self._objects.pop(int(stream)))
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> tuple:
        if self._forbidden():
            return (UNSUPPORTED_IN_CAPTURE,)
        self._drain(self._objects[int(stream)])
        return (OK,)

    def cuEventCreate(self, flags: int) -> tuple:
        return OK, self._keep(SimpleNamespace(time=None, stream=None))

    def cuEventDestroy(self, event: int) -> tuple:
        del self._objects[event]
        return (OK,)

    def cuEventRecord(self, event: int, stream: int) -> tuple:
        record = self._objects[event]
        record.time, record.stream = None, int(stream)

        def pass_by() -> None:
            record.time = perf_counter()

        self.submit(stream, pass_by)
        return (OK,)

    def cuEventSynchronize(self, event: int) -> tuple:
        if self._forbidden():
            return (UNSUPPORTED_IN_CAPTURE,)
        record = self._objects[event]
        queue = self._objects[record.stream].waiting
        while record.time is None:
            queue.pop(0)()
        return (OK,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple:
        if self._forbidden():
            return UNSUPPORTED_IN_CAPTURE, None
        return OK, 1000 * (self._objects[end].time - self._objects[start].time)

    # Graphs.

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        queue = self._objects[int(stream)]
        queue.graph, queue.asker = [], threading.get_ident()
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple:
        queue = self._objects[int(stream)]
        graph, broken = queue.graph, queue.broken
        queue.graph, queue.broken = None, False
        return (CAPTURE_INVALIDATED, None) if broken else (OK, self._keep(graph))

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple:
        return OK, self._keep(list(self._objects[graph]))

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple:
        work = self._objects[graph]
        self.submit(stream, lambda: [each() for each in work])
        return (OK,)

    def cuGraphDestroy(self, graph: int) -> tuple:
        del self._objects[graph]
        return (OK,)

    def cuGraphExecDestroy(self, graph: int) -> tuple:
        del self._objects[graph]
        return (OK,)

    # Kernels.

    def cuModuleLoadData(self, image: bytes) -> tuple:
        if self._forbidden():
            return UNSUPPORTED_IN_CAPTURE, None
        kind, _, code = image.partition(b":")
        if kind == b"ptx":
            if not code.endswith(b"\0"):
                return INVALID_IMAGE, None
            code = code[:-1]
        elif kind != b"cubin":
            return INVALID_IMAGE, None
        return OK, self._keep(kernel_of(json.loads(code)))

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple:
        kernel = self._objects[module]
        if name.decode() != kernel.name:
            return NOT_FOUND, None
        return OK, self._keep(SimpleNamespace(kernel=kernel, shared=48 << 10))

    def cuFuncSetAttribute(self, function: int, attribute: str, value: int) -> tuple:
        self._objects[function].shared = value
        return (OK,)

    def cuLaunchKernel(
        self, function: int, x: int, y: int, z: int, bx: int, by: int, bz: int, shared: int, stream: int,
        parameters: int, extra: int,
    ) -> tuple:  # fmt: skip
        loaded = self._objects[function]
        kernel: Kernel = loaded.kernel
        if (bx, by, bz) != (32 * kernel.warps, 1, 1) or shared > loaded.shared:
            return (INVALID_VALUE,)
        kinds = [ctypes.c_int32 if kind == "i32" else ctypes.c_uint64 for _, kind in kernel.parameters]
        pointers = (ctypes.c_void_p * len(kinds)).from_address(parameters)
        values = [kind.from_address(at).value for kind, at in zip(kinds, pointers, strict=True)]
        names = [name for name, _ in kernel.parameters]
        launch = Launch(kernel, (x, y, z), dict(zip(names, values, strict=True)))

        def execute() -> None:
            self.launches.append(kernel.name)
            run([launch], self.memory)

        self.submit(stream, execute)
        return (OK,)

    def _keep(self, thing: object) -> int:
        handle = id(thing)
        self._objects[handle] = thing
        return handle

    def _streams(self) -> list[_Stream]:
        return [each for each in list(self._objects.values()) if isinstance(each, _Stream)]

    def _drain(self, stream: _Stream) -> None:
        while stream.waiting:
            stream.waiting.pop(0)()

    def _forbidden(self) -> bool:
        """Whether this thread records a stream; what asks this then spoils the recording."""
        thread = threading.get_ident()
        recording = [each for each in self._streams() if each.graph is not None and each.asker == thread]
        for each in recording:
            each.broken = True
        return bool(recording)
