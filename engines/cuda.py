"""The CUDA driver: device, memory, streams, graphs, kernels. Only this file imports cuda.bindings (12.8 or newer)."""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.errors import BackendError
from plugins.artifacts import REBUILD_KERNELS

if TYPE_CHECKING:
    from plugins.artifacts import Artifacts, Compiled
    from plugins.op import Kernel, Launch

OLDEST_DRIVER = 12000  # CUDA 12.0: graphs are instantiated with this signature since
# CUDA 12.8: cuda-bindings 13 asks a driver for functions as they are since then, and times no event on an older one.
# Those of version 12 ask for what CUDA 12.0 has, and are good for drivers of CUDA 13, too.
OLDEST_DRIVER_OF_BINDINGS_13 = 12080
DEFAULT_SHARED = 48 << 10  # bytes of shared memory a kernel gets without asking


class Cuda:
    """One GPU, through its primary context, which TensorRT uses too.

    sm: compute capability, 86 is 8.6. integrated: host and device share one memory (Jetson). name: as the driver says.
    """

    def __init__(self, api: Any = None, ordinal: int = 0) -> None:
        """`api`: cuda.bindings.driver, or something with the same functions; `ordinal`: which GPU.

        Raises BackendError when there is no driver, no such device, or the driver is too old.
        """
        self.api = _import() if api is None else api
        _initialise(self)
        if ordinal >= self.call("cuDeviceGetCount"):
            raise BackendError(f"there is no GPU {ordinal}", fix="check CUDA_VISIBLE_DEVICES, or use another device")
        self._device = self.call("cuDeviceGet", ordinal)
        major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        self.sm = 10 * major + minor
        self.integrated = bool(self._attribute("INTEGRATED"))
        self.name = self.call("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self._modules: dict[bytes, Any] = {}  # by content
        self._functions: dict[tuple[int, str], _Function] = {}
        self.make_current()

    def make_current(self) -> None:
        """Use this GPU in the calling thread; called before work that may come from another thread."""
        self.call("cuCtxSetCurrent", self._context)

    def freed_with(self, owner: object, function: str, handle: Any) -> None:
        """Give `handle` to a driver function when `owner` goes, in whatever thread that is."""
        weakref.finalize(owner, self._free, function, handle)

    def _free(self, function: str, handle: Any) -> None:
        self.api.cuCtxSetCurrent(self._context)  # without one, the driver frees nothing
        getattr(self.api, function)(handle)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device's memory."""
        free, total = self.call("cuMemGetInfo")
        return free, total

    def buffer(self, size: int, what: str, fix: str | None = None) -> Buffer:
        """`size` bytes of device memory, not initialised. BackendError when it does not fit: `what` needs them, and
        `fix` says how to need less."""
        address = self._allocate(size, what, fix, "cuMemAlloc", size)
        return Buffer(self, int(address), size)

    def shared(self, size: int, what: str) -> Shared:
        """`size` bytes, zeroed, that the host and the device both see: see Shared."""
        flags = self.api.CU_MEMHOSTALLOC_DEVICEMAP if self.integrated else 0
        host = int(self._allocate(size, what, None, "cuMemHostAlloc", size, flags))
        return Shared(self, host, size)

    def stream(self) -> Stream:
        """A new stream that does not wait for the default stream."""
        return Stream(self)

    def event(self) -> Event:
        """A new event that takes the time."""
        return Event(self)

    def capture(self, stream: Stream, record: Callable[[], None]) -> Graph:
        """What `record` asks of `stream`, recorded and not run, as a graph.

        `record` may not allocate, wait, or touch another stream that has not been forked from this one.
        """
        self.call(
            "cuStreamBeginCapture", stream.handle, self.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        )
        try:
            record()
        except BaseException:
            result, graph = self.api.cuStreamEndCapture(stream.handle)  # what went wrong before matters more
            if int(result) == 0 and graph is not None:
                self.api.cuGraphDestroy(graph)
            raise
        graph = self.call("cuStreamEndCapture", stream.handle)
        try:
            return Graph(self, self.call("cuGraphInstantiate", graph, 0))
        finally:
            self.api.cuGraphDestroy(graph)

    def run(self, artifacts: Artifacts, launches: Sequence[Launch], stream: int) -> None:
        """Launch compiled kernels in order; does not wait. Raises KernelError when `artifacts` does not hold one,
        BackendError when the driver refuses it."""
        for launch in launches:
            function = self._functions.get((id(artifacts), launch.kernel.name))
            if function is None or function.asked != launch.kernel:
                function = self._load(artifacts, launch.kernel)
            function.launch(launch, stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """A driver function's result, without the status that comes first; BackendError with the driver's text."""
        status, *results = self._ask(name, *arguments)
        if int(status):
            raise BackendError(f"CUDA: {name} failed: {self.text(status)}", fix=_FIXES.get(int(status)))
        return results[0] if len(results) == 1 else tuple(results)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What a driver function returns, status first; BackendError when the bindings do not find it in the driver."""
        try:
            return getattr(self.api, name)(*arguments)
        except RuntimeError as error:
            raise BackendError(
                f"CUDA: cuda-bindings has no {name} of this driver: {error}",
                expected="cuda-bindings that are no newer than the driver",
                fix=f"update the NVIDIA driver, or {OLD_BINDINGS}",
            ) from error

    def text(self, status: Any) -> str:
        """What the driver calls a status."""
        parts = [getattr(self.api, name)(status)[1] for name in ("cuGetErrorName", "cuGetErrorString")]
        return " - ".join(part.decode() for part in parts if part) or f"status {int(status)}"

    def _attribute(self, name: str) -> int:
        attribute = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", attribute, self._device))

    def _allocate(self, size: int, what: str, fix: str | None, function: str, *arguments: Any) -> Any:
        status, address = self._ask(function, *arguments)
        if int(status) == _OUT_OF_MEMORY:
            free, total = self.memory()
            raise BackendError(
                f"{what} needs {size / 1e9:.2f} GB of {self.name}'s memory",
                expected=f"no more than the {free / 1e9:.2f} GB that are free of {total / 1e9:.2f} GB",
                fix=fix or "close what else uses the GPU",
            )
        if int(status):
            raise BackendError(f"CUDA: {function} failed for {what} ({size} bytes): {self.text(status)}")
        return address

    def _load(self, artifacts: Artifacts, kernel: Kernel) -> _Function:
        compiled = artifacts.get(kernel, self.sm)
        native = self.sm in compiled.cubins
        image = compiled.code(self.sm) + (b"" if native else b"\0")  # PTX is a C string
        if image not in self._modules:
            status, module = self._ask("cuModuleLoadData", image)
            if int(status):
                kind = f"code for SM {self.sm}" if native else "PTX"
                raise BackendError(
                    f"the driver does not take the {kind} of kernel {kernel.name}: {self.text(status)}",
                    expected=f"compiled kernels that {self.name} (SM {self.sm}) runs; there are {artifacts.sms}",
                    fix=f"update the NVIDIA driver, or {REBUILD_KERNELS}",
                )
            self._modules[image] = module
        function = _Function(self, self._modules[image], artifacts, compiled, kernel)
        self._functions[id(artifacts), kernel.name] = function
        return function


def this_gpu() -> Cuda:
    """The first GPU, one object for the whole process: plugins launch through it whatever engine they belong to."""
    return _gpu_of(_import())


@functools.cache
def _gpu_of(api: Any) -> Cuda:
    return Cuda(api)


class Buffer:
    """Device memory, freed with the object. address: multiple of 256. size: bytes."""

    def __init__(self, cuda: Cuda, address: int, size: int) -> None:
        self.address, self.size, self._cuda = address, size, cuda
        cuda.freed_with(self, "cuMemFree", address)

    def fill(self, byte: int, stream: Stream, offset: int = 0, size: int | None = None) -> None:
        """Set every byte, or `size` bytes from `offset` on, in the order of the stream."""
        count = self.size - offset if size is None else size
        self._cuda.call("cuMemsetD8Async", self.address + offset, byte, count, stream.handle)

    def take(self, source: int, size: int, stream: Stream, offset: int = 0) -> None:
        """Copy `size` bytes of device memory at `source` to `offset`, in the order of the stream."""
        self._cuda.call("cuMemcpyDtoDAsync", self.address + offset, source, size, stream.handle)

    def upload(self, array: np.ndarray, stream: Stream) -> None:
        """Copy a contiguous array to the begin of the buffer; returns when the array may change again."""
        if array.nbytes > self.size or not array.flags.c_contiguous:
            raise ValueError(f"an array of {array.nbytes} bytes for a buffer of {self.size}")
        self._cuda.call("cuMemcpyHtoDAsync", self.address, array.ctypes.data, array.nbytes, stream.handle)
        stream.wait()

    def download(self, array: np.ndarray, stream: Stream, offset: int = 0) -> np.ndarray:
        """Fill a contiguous array with what lies `offset` bytes into the buffer; waits for the stream."""
        if offset + array.nbytes > self.size or not array.flags.c_contiguous:
            raise ValueError(f"{array.nbytes} bytes at {offset} of a buffer of {self.size}")
        self._cuda.call("cuMemcpyDtoHAsync", array.ctypes.data, self.address + offset, array.nbytes, stream.handle)
        stream.wait()
        return array


class Shared:
    """Memory for both sides. host: uint8 array [size]. address: for the device.

    On an integrated GPU there is one memory, mapped, and `upload` and `download` do nothing; elsewhere the host's side
    is pinned memory, the device's a buffer, and they copy, in the order of the stream and without waiting.
    """

    def __init__(self, cuda: Cuda, host: int, size: int) -> None:
        self.size, self._cuda, self._pointer = size, cuda, host
        cuda.freed_with(self, "cuMemFreeHost", host)
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
        self.host[:] = 0
        self._buffer = None if cuda.integrated else cuda.buffer(size, "input and output of a step")
        mapped = self._buffer.address if self._buffer else cuda.call("cuMemHostGetDevicePointer", host, 0)
        self.address = int(mapped)

    def view(self, offset: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The host's side from `offset` on as an array. It must not outlive this object."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array: np.ndarray = self.host[offset : offset + count].view(dtype)
        return array.reshape(shape)

    def upload(self, stream: Stream, size: int | None = None) -> None:
        """Show the device the first `size` bytes (all) as the host has written them."""
        if self._buffer:
            self._cuda.call("cuMemcpyHtoDAsync", self.address, self._pointer, self._bytes(size), stream.handle)

    def download(self, stream: Stream, size: int | None = None) -> None:
        """Show the host the first `size` bytes (all) as the device has written them, once the stream has got there."""
        if self._buffer:
            self._cuda.call("cuMemcpyDtoHAsync", self._pointer, self.address, self._bytes(size), stream.handle)

    def _bytes(self, size: int | None) -> int:
        if size is not None and not 0 < size <= self.size:
            raise ValueError(f"{size} of {self.size} bytes")
        return self.size if size is None else size


class Stream:
    """An ordered queue of device work; int(stream) is its address for other libraries."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cuStreamCreate", int(cuda.api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        cuda.freed_with(self, "cuStreamDestroy", self.handle)

    def __int__(self) -> int:
        return int(self.handle)

    def wait(self) -> None:
        """Until the device has done everything asked so far."""
        self._cuda.call("cuStreamSynchronize", self.handle)


class Event:
    """A point in a stream."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._handle = cuda.call("cuEventCreate", int(cuda.api.CUevent_flags.CU_EVENT_DEFAULT))
        cuda.freed_with(self, "cuEventDestroy", self._handle)

    def record(self, stream: Stream) -> None:
        """Move to the current end of the stream."""
        self._cuda.call("cuEventRecord", self._handle, stream.handle)

    def wait(self) -> None:
        """Until the device has passed this point."""
        self._cuda.call("cuEventSynchronize", self._handle)

    def since(self, earlier: Event) -> float:
        """Milliseconds on the device between two points it has passed."""
        return float(self._cuda.call("cuEventElapsedTime", earlier._handle, self._handle))


class Graph:
    """Recorded work, launched at once."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda, self._handle = cuda, handle
        cuda.freed_with(self, "cuGraphExecDestroy", handle)

    def launch(self, stream: Stream) -> None:
        """Do the recorded work in the order of the stream; does not wait."""
        self._cuda.call("cuGraphLaunch", self._handle, stream.handle)


class _Function:
    """A loaded kernel, and one argument block that every launch fills anew: the driver copies it during the call.

    asked: the kernel it was loaded for; that of the code may have its parameters in another order.
    """

    def __init__(self, cuda: Cuda, module: Any, artifacts: Artifacts, compiled: Compiled, asked: Kernel) -> None:
        self.kernel, self.asked, self._cuda = compiled.kernel, asked, cuda
        self._artifacts = artifacts  # its id is the key of this function
        self._threads, self._shared = compiled.threads, compiled.shared
        self._handle = cuda.call("cuModuleGetFunction", module, compiled.entry.encode())
        if compiled.shared > DEFAULT_SHARED:
            limit = cuda._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
            if compiled.shared > limit:
                raise BackendError(
                    f"kernel {self.kernel.name} needs {compiled.shared} bytes of shared memory",
                    expected=f"at most the {limit} of {cuda.name}",
                    fix="build without plugins: --no-plugins",
                )
            attribute = cuda.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            cuda.call("cuFuncSetAttribute", self._handle, attribute, compiled.shared)
        kinds = [ctypes.c_int32 if kind == "i32" else ctypes.c_uint64 for _, kind in self.kernel.parameters]
        self._values = [kind(0) for kind in kinds]
        self._pointers = (ctypes.c_void_p * max(1, len(kinds)))(*map(ctypes.addressof, self._values))
        self._lock = threading.Lock()  # the driver call lets other threads run

    def launch(self, launch: Launch, stream: int) -> None:
        """Launch it; does not wait. ValueError unless the launch has an argument for each parameter of the code."""
        arguments = launch.ordered(self.kernel)
        block = self._threads, 1, 1
        with self._lock:
            for value, argument in zip(self._values, arguments, strict=True):
                value.value = argument
            self._cuda.call(
                "cuLaunchKernel", self._handle, *launch.grid, *block, self._shared, stream,
                ctypes.addressof(self._pointers), 0,
            )  # fmt: skip


OLD_BINDINGS = "pip install 'cuda-bindings>=12.8,<13'"
_OUT_OF_MEMORY, _NO_DEVICE, _OLD_DRIVER = 2, 100, 35
_INSTALL = "install the NVIDIA driver (on a Jetson: JetPack), or open the bundle with backend='onnxruntime'"
_FIXES = {
    _OUT_OF_MEMORY: "close what else uses the GPU",
    _NO_DEVICE: "check nvidia-smi and CUDA_VISIBLE_DEVICES, or open the bundle with backend='onnxruntime'",
    _OLD_DRIVER: "update the NVIDIA driver",
    803: "update the NVIDIA driver: it does not fit its kernel module",
    804: "update the NVIDIA driver: it is older than CUDA's compatibility libraries",
}


def _import() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            "cuda-bindings is not installed",
            fix=f"{OLD_BINDINGS}  # it is good for every driver from CUDA 12.0 on",
        ) from error
    return driver


def _initialise(cuda: Cuda) -> None:
    """cuInit and the driver's version; BackendError unless there is a driver that is new enough and sees a GPU."""
    try:
        status = cuda.api.cuInit(0)[0]
    except Exception as error:  # the bindings find no libcuda: the class of the error depends on their version
        raise BackendError(
            f"no NVIDIA driver on this machine: {str(error).splitlines()[0]}", expected="libcuda.so.1", fix=_INSTALL
        ) from error
    if int(status):
        fix = _FIXES.get(int(status), _INSTALL)
        raise BackendError(f"CUDA does not start: {cuda.text(status)}", expected="a driver and a GPU", fix=fix)
    version = int(cuda.call("cuDriverGetVersion"))
    if version < OLDEST_DRIVER:
        raise BackendError(
            f"the NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10}",
            expected=f"CUDA {OLDEST_DRIVER // 1000}.{OLDEST_DRIVER % 1000 // 10} or newer",
            fix="update the NVIDIA driver (on a Jetson: JetPack 6 or newer)",
        )
    bindings = int(cuda.api.CUDA_VERSION)
    if bindings >= 13000 and version < OLDEST_DRIVER_OF_BINDINGS_13:
        raise BackendError(
            f"cuda-bindings {bindings // 1000}.{bindings % 1000 // 10} with a driver of CUDA "
            f"{version // 1000}.{version % 1000 // 10}",
            expected="cuda-bindings 12 with drivers before CUDA 12.8",
            fix=OLD_BINDINGS,
        )
