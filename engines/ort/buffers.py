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
PIECE = 1 << 30  # bytes cleared at once: CUDA's kernel counts them in 32 bits


class Buffers:
    """Makes tensors for a device, "cpu" or "cuda". On the GPU their memory comes from ONNX Runtime's arena and goes
    back there: the next request of the same sizes gets it without asking the driver."""

    def __init__(self, device: str) -> None:
        """BackendError when onnxruntime or the device is missing."""
        self.device = device
        self._ort = import_library()
        self.provider = provider_of(self._ort, device)
        self._clearing: ort.InferenceSession | None = None

    def of(self, array: np.ndarray) -> ort.OrtValue:
        """A tensor with what the array holds. On the CPU it is a view: it shares the array's memory and keeps it
        alive."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def empty(self, shape: Shape, dtype: type | str) -> ort.OrtValue:
        """A tensor that holds anything: for what is written before it is read."""
        if self.device == "cpu":
            return self.of(np.empty(shape, dtype))
        try:
            return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype).type, self.device, 0)
        except Exception as error:  # onnxruntime raises its own classes and RuntimeError alike
            size = prod(shape) * np.dtype(dtype).itemsize
            raise BackendError(f"the GPU has no room for {size} bytes: {error}") from error

    def zeros(self, shape: Shape, dtype: type | str) -> ort.OrtValue:
        """A zeroed tensor. On the CPU the system zeroes its memory as it is first touched."""
        if self.device == "cpu":
            return self.of(np.zeros(shape, dtype))
        value = self.empty(shape, dtype)
        self.clear(value)
        return value

    def clear(self, value: ort.OrtValue) -> None:
        """Zero a tensor of this device where it lies. Raises BackendError."""
        if self._clearing is None:
            options = self._ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            providers = [(self.provider, PROVIDER_OPTIONS[self.device])]
            self._clearing = self._ort.InferenceSession(_clearing_graph(), options, providers=providers)
        address, size = value.data_ptr(), value.tensor_size_in_bytes()
        for begin in range(0, size, PIECE):
            count = min(PIECE, size - begin)
            binding = self._clearing.io_binding()
            binding.bind_cpu_input("shape", np.array([count], np.int64))
            binding.bind_output("zeros", self.device, 0, np.uint8, [count], address + begin)
            try:
                self._clearing.run_with_iobinding(binding)
            except Exception as error:
                raise failed("clearing", error) from error
            binding.synchronize_outputs()


def _clearing_graph() -> bytes:
    """shape [1] int64 -> zeros [shape] uint8, as a file of ONNX: a ConstantOfShape is ONNX Runtime's way to fill memory
    on a device. Fields of protobuf by their numbers in onnx.proto; the engines need no library that writes them."""

    def varint(number: int) -> bytes:
        return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)

    def field(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return varint(number << 3) + varint(content)
        return varint(number << 3 | 2) + varint(len(content)) + content

    def tensor(name: bytes, element: int, size: bytes) -> bytes:  # of one dimension
        return field(1, name) + field(2, field(1, field(1, element) + field(2, field(1, field(2, size)))))

    uint8, int64 = 2, 7
    zero = field(1, 1) + field(2, uint8) + field(9, bytes(1))
    value = field(1, b"value") + field(5, zero) + field(20, 4)  # the attribute, a tensor
    node = field(1, b"shape") + field(2, b"zeros") + field(4, b"ConstantOfShape") + field(5, value)
    inputs, outputs = field(11, tensor(b"shape", int64, b"rank")), field(12, tensor(b"zeros", uint8, b"size"))
    graph = field(1, node) + field(2, b"clear") + inputs + outputs
    return field(1, 8) + field(7, graph) + field(8, field(2, 19))  # the version of the format, and of the operators
