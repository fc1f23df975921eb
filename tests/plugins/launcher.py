"""Run an op's kernels through the driver: on a GPU, or on the emulated driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engines.cuda import Buffer, Cuda
from plugins.artifacts import Artifacts
from plugins.op import Kernel, Launch, Op
from tests.emulator.interpreter import NUMPY


class Launcher:
    """Launches ops on `cuda`; `compile` makes the code of kernels."""

    def __init__(self, cuda: Cuda, compile: Callable[[Sequence[Kernel]], Artifacts]) -> None:
        self.cuda, self._compile = cuda, compile
        self.stream = cuda.stream()
        self._artifacts: dict[tuple[Kernel, ...], Artifacts] = {}

    def artifacts(self, op: Op, dtype: str) -> Artifacts:
        """The compiled kernels of an op."""
        kernels = op.kernels(dtype)
        if kernels not in self._artifacts:
            self._artifacts[kernels] = self._compile(kernels)
        return self._artifacts[kernels]

    def prepare(
        self, op: Op, dtype: str, inputs: Sequence[np.ndarray]
    ) -> tuple[list[Launch], list[Buffer], list[tuple[Buffer, np.ndarray]]]:
        """The launches, what keeps their memory, and of each output its buffer and an array of its kind.

        Whatever the op writes is NaN beforehand. Inputs as in tests.emulator.interpreter.call.
        """
        shapes = [array.shape for array in inputs]
        given = [self._filled(array) for array in inputs]
        results: list[tuple[Buffer, np.ndarray]] = []
        for index, (tensor, shape) in enumerate(zip(op.outputs, op.output_shapes(shapes), strict=True)):
            array = np.full(shape, 0, NUMPY[dtype if tensor.dtype == "model" else tensor.dtype])
            if index in op.in_place:
                results.append((given[op.in_place[index]], array))
            else:
                results.append((self._empty(array.nbytes), array))
        scratch = self._empty(max(1, op.workspace(shapes)))
        addresses = [buffer.address for buffer in given], [buffer.address for buffer, _ in results]
        launches = op.launches(dtype, shapes, *addresses, scratch.address)
        return launches, [*given, scratch], results

    def __call__(self, op: Op, dtype: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What `op` makes of `inputs`, as tests.emulator.interpreter.call gives it."""
        launches, _kept, results = self.prepare(op, dtype, inputs)
        self.cuda.run(self.artifacts(op, dtype), launches, int(self.stream))
        return [buffer.download(array, self.stream) for buffer, array in results]

    def _filled(self, array: np.ndarray) -> Buffer:
        buffer = self.cuda.buffer(array.nbytes, "a test")
        buffer.upload(np.ascontiguousarray(array), self.stream)
        return buffer

    def _empty(self, size: int) -> Buffer:
        buffer = self.cuda.buffer(size, "a test")
        buffer.fill(0xFF, self.stream)
        return buffer
