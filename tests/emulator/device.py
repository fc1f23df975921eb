"""Where the emulated TensorRT computes: over the emulated driver's host memory, or on a real GPU. Both do it in torch,
at the addresses that are bound, in the order of the stream they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from engines.cuda import Cuda
from tests.emulator.driver import Driver
from tests.emulator.memory import aligned


class OnHost:
    """The emulated driver's: what is asked of a stream is done when somebody waits for it."""

    torch_device = torch.device("cpu")

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def at(self, address: int, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
        """The memory at an address as a tensor that shares it; MemoryFault unless it was allocated."""
        size = prod(shape) * dtype.itemsize
        memory = self.driver.memory.view(address, (size,), np.uint8, what)
        return torch.from_numpy(memory).view(dtype).reshape(shape)

    def put(self, values: Tensor) -> Tensor:
        """A copy on the device, aligned as kernels are promised, for as long as the device lives."""
        array = aligned(values.numel() * values.dtype.itemsize, np.uint8)
        if array.nbytes:
            self.driver.memory.add(array, "a weight")
        copy = torch.from_numpy(array).view(values.dtype).reshape(values.shape)
        return copy.copy_(values)

    def check(self, address: int, size: int, what: str) -> None:
        """MemoryFault unless so many bytes at an address were allocated."""
        self.driver.memory.check(address, size, what)

    @contextmanager
    def working(self, stream: int) -> Iterator[Callable[[Callable[[], None]], None]]:
        """What asks `stream` to do something in torch, within the block."""
        yield lambda work: self.driver.submit(stream, work)

    def capturing(self, stream: int) -> bool:
        """Whether what is asked of the stream is recorded."""
        return self.driver.capturing(stream)

    def break_capture(self, stream: int) -> None:
        """Something forbidden was asked of a stream that is recorded."""
        self.driver.break_capture(stream)


class OnGpu:
    """A real GPU's, through the context of `cuda`. Work goes to the device at once, and may be recorded there."""

    torch_device = torch.device("cuda")

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        # What torch needs between two nodes comes from memory that nobody else is given: a recorded graph goes on
        # using it. All contexts can share it, as all work follows each other in one stream and nothing stays there.
        self._pool = torch.cuda.MemPool()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def at(self, address: int, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
        """The memory at an address as a tensor that shares it."""
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype, device=self.torch_device)
        interface = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
        memory = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=self.torch_device)
        assert memory.data_ptr() == address, f"{what} was copied"
        return memory.view(dtype).reshape(shape)

    def put(self, values: Tensor) -> Tensor:
        """A copy on the device; torch aligns it to 512 bytes."""
        copy = values.to(self.torch_device)
        torch.cuda.synchronize()  # it was asked of another stream than those that read it
        return copy

    def check(self, address: int, size: int, what: str) -> None:
        """The driver alone knows what was allocated."""

    @contextmanager
    def working(self, stream: int) -> Iterator[Callable[[Callable[[], None]], None]]:
        """What asks `stream` to do something in torch, within the block."""
        modes = self.cuda.api.CUstreamCaptureMode

        def ask(work: Callable[[], None]) -> None:
            # Torch may have to make itself ready in a thread that it has not worked in: a recording would forbid that.
            mode = self.cuda.call("cuThreadExchangeStreamCaptureMode", modes.CU_STREAM_CAPTURE_MODE_RELAXED)
            try:
                work()
            finally:
                self.cuda.call("cuThreadExchangeStreamCaptureMode", mode)

        with torch.cuda.stream(torch.cuda.ExternalStream(stream)), torch.cuda.use_mem_pool(self._pool):
            yield ask

    def capturing(self, stream: int) -> bool:
        """Whether what is asked of the stream is recorded."""
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            return torch.cuda.is_current_stream_capturing()

    def break_capture(self, stream: int) -> None:
        """Something forbidden was asked of a stream that is recorded."""
        raise AssertionError("a run was recorded before a first run with these shapes and addresses")


Device = OnHost | OnGpu
