"""Host memory that stands for device memory: known ranges, and arrays with the alignment the kernels are promised."""

from __future__ import annotations

from bisect import bisect_right, insort

import numpy as np

ALIGNMENT = 256  # what cuMemAlloc gives


class MemoryFault(Exception):
    """A kernel, copy or graph touched memory nobody allocated."""


class Memory:
    """The ranges of addresses that may be touched."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: dict[int, tuple[int, str, object]] = {}  # start -> (end, name, what keeps the memory alive)

    def add(self, array: np.ndarray, name: str = "") -> int:
        """Allow the bytes of a C-contiguous array, keep it alive, and return its address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name or 'array'} is not contiguous")
        start = array.ctypes.data
        if start not in self._ranges:
            insort(self._starts, start)
        self._ranges[start] = (start + array.nbytes, name, array)
        return start

    def remove(self, start: int) -> None:
        """Forbid the range that begins at `start` again; MemoryFault if none does."""
        if self._ranges.pop(start, None) is None:
            raise MemoryFault(f"{start:#x} is not the begin of an allocation")
        self._starts.remove(start)

    def __len__(self) -> int:
        return len(self._starts)

    def bytes(self) -> int:
        """Bytes of all ranges together."""
        return sum(end - start for start, (end, _, _) in self._ranges.items())

    def check(self, start: int, size: int, what: str) -> None:
        """MemoryFault unless the `size` bytes at `start` lie within one range."""
        if size == 0:
            return
        position = bisect_right(self._starts, start) - 1
        begin = self._starts[position] if position >= 0 else None
        if begin is None or start + size > self._ranges[begin][0]:
            near = "below every allocation" if begin is None else self._near(start, begin)
            raise MemoryFault(f"{what} touches {size} bytes at {start:#x}, {near}")

    def check_all(self, addresses: np.ndarray, size: int, what: str) -> None:
        """MemoryFault unless each of `addresses` (uint64) begins `size` allowed bytes."""
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        position = bisect_right(self._starts, low) - 1
        if position >= 0 and high + size <= self._ranges[self._starts[position]][0]:
            return  # all within one range, the usual case
        for address in np.unique(addresses).tolist():
            self.check(address, size, what)

    def view(self, start: int, shape: tuple[int, ...], dtype: np.dtype, what: str) -> np.ndarray:
        """The allowed memory at `start` as an array that shares it."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self.check(start, size, what)
        if size == 0:
            return np.empty(shape, dtype)
        begin = self._starts[bisect_right(self._starts, start) - 1]
        whole = self._ranges[begin][2].reshape(-1).view(np.uint8)
        return whole[start - begin : start - begin + size].view(dtype).reshape(shape)

    def _near(self, address: int, begin: int) -> str:
        end, name, _ = self._ranges[begin]
        return f"{address - begin} bytes into {name or 'an allocation'} of {end - begin}"


def aligned(shape: tuple[int, ...] | int, dtype: object, fill: int = 0xFF) -> np.ndarray:
    """An array at a multiple of ALIGNMENT, every byte `fill`; 0xFF is NaN in every float type and -1 in int64."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    whole = np.full(size + 2 * ALIGNMENT, fill, np.uint8)  # never ends where another array may begin
    offset = -whole.ctypes.data % ALIGNMENT
    return whole[offset : offset + size].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A copy of `array` that is aligned and contiguous."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy
