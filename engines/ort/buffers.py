"""Tensors on a device: made from the host's arrays, or there, so that nothing is copied that nobody computed."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from engines.errors import BackendError
from engines.ort.library import PROVIDER_OPTIONS, failed, import_library, provider_of

if TYPE_CHECKING:
    import onnxruntime as ort

Shape = tuple[int, ...]
PIECE = 1 << 30  # bytes cleared or copied at once: CUDA's kernel counts them in 32 bits
UINT8, INT64 = 2, 7  # types of elements, as ONNX numbers them


class Buffers:
    """Makes tensors for a device, "cpu" or "cuda". On the GPU their memory comes from ONNX Runtime's arena and goes
    back there: the next request of the same sizes gets it without asking the driver."""

    def __init__(self, device: str) -> None:
        """BackendError when onnxruntime or the device is missing."""
        self.device = device
        self._ort = import_library()
        self.provider = provider_of(self._ort, device)
        self._filling: dict[str, ort.InferenceSession] = {}  # by operator

    def of(self, array: np.ndarray) -> ort.OrtValue:
        """A tensor with what the array holds. On the CPU it is a view: it shares the array's memory and keeps it
        alive."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def empty(self, shape: Shape, dtype: type | str) -> ort.OrtValue:
        """A tensor that holds anything: for what is written before it is read."""
        return self.of(np.empty(shape, dtype)) if self.device == "cpu" else self.owned(shape, dtype)

    def owned(self, shape: Shape, dtype: type | str) -> ort.OrtValue:
        """As `empty`, of memory that is ONNX Runtime's: an array made of it may outlive it. BackendError when there is
        no room."""
        try:
            return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype).type, self.device, 0)
        except Exception as error:  # onnxruntime raises its own classes and RuntimeError alike
            size = prod(shape) * np.dtype(dtype).itemsize
            where = "this machine" if self.device == "cpu" else "the GPU"
            raise BackendError(f"{where} has no room for {size} bytes: {error}") from error

    def zeros(self, shape: Shape, dtype: type | str) -> ort.OrtValue:
        """A zeroed tensor. On the CPU the system zeroes its memory as it is first touched."""
        if self.device == "cpu":
            return self.of(np.zeros(shape, dtype))
        value = self.empty(shape, dtype)
        self.clear(value)
        return value

    def clear(self, value: ort.OrtValue) -> None:
        """Zero a tensor of this device where it lies. Raises BackendError."""
        size = value.tensor_size_in_bytes()
        for begin in range(0, size, PIECE):
            count = min(PIECE, size - begin)
            binding = self._session("ConstantOfShape").io_binding()
            binding.bind_cpu_input("given", np.array([count], np.int64))
            self._fill("ConstantOfShape", binding, value.data_ptr() + begin, count)

    def copy(self, source: ort.OrtValue, target: ort.OrtValue) -> None:
        """Copy a tensor of this device into another one of as many bytes, on the device. Raises BackendError."""
        size = target.tensor_size_in_bytes()
        if source.tensor_size_in_bytes() != size:
            raise BackendError(f"{source.tensor_size_in_bytes()} bytes for a tensor of {size}")
        for begin in range(0, size, PIECE):
            count = min(PIECE, size - begin)
            binding = self._session("Identity").io_binding()
            binding.bind_input("given", self.device, 0, np.uint8, [count], source.data_ptr() + begin)
            self._fill("Identity", binding, target.data_ptr() + begin, count)

    def _session(self, operator: str) -> ort.InferenceSession:
        """That of a graph which fills memory, kept."""
        if operator not in self._filling:
            options = self._ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            providers = [(self.provider, PROVIDER_OPTIONS[self.device])]
            self._filling[operator] = self._ort.InferenceSession(_filling_graph(operator), options, providers=providers)
        return self._filling[operator]

    def _fill(self, operator: str, binding: ort.IOBinding, address: int, count: int) -> None:
        """Run the graph of an operator, its input bound, into `count` bytes of the device."""
        binding.bind_output("filled", self.device, 0, np.uint8, [count], address)
        try:
            self._session(operator).run_with_iobinding(binding)
        except Exception as error:
            raise failed(f"{operator} of buffers", error) from error
        binding.synchronize_outputs()


def _filling_graph(operator: str) -> bytes:
    """given -> filled [size] uint8, as a file of ONNX: ONNX Runtime's ways to fill memory on a device. ConstantOfShape,
    of a shape [1] int64, clears it; Identity copies as many bytes. Fields of protobuf by their numbers in onnx.proto;
    the engines need no library that writes them."""

    def varint(number: int) -> bytes:
        return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

    def field(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return varint(number << 3) + varint(content)
        return varint(number << 3 | 2) + varint(len(content)) + content

    def tensor(name: bytes, element: int, size: bytes) -> bytes:  # of one dimension
        return field(1, name) + field(2, field(1, field(1, element) + field(2, field(1, field(2, size)))))

    node = field(1, b"given") + field(2, b"filled") + field(4, operator.encode())
    given = tensor(b"given", UINT8, b"size")
    if operator == "ConstantOfShape":
        zero = field(1, 1) + field(2, UINT8) + field(9, bytes(1))
        node += field(5, field(1, b"value") + field(5, zero) + field(20, 4))  # the attribute, a tensor
        given = tensor(b"given", INT64, b"rank")
    inputs, outputs = field(11, given), field(12, tensor(b"filled", UINT8, b"size"))
    graph = field(1, node) + field(2, b"fill") + inputs + outputs
    return field(1, 8) + field(7, graph) + field(8, field(2, 19))  # the version of the format, and of the operators
