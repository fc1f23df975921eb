"""What torch and our kernels run on together: a GPU, or the emulated driver over the memory of torch on the CPU."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from engines.bundle.geometry import Geometry
from engines.cuda import Cuda
from engines.errors import BackendError
from plugins.artifacts import Artifacts
from plugins.compiler.kernels import compile_kernels
from plugins.compiler.ptxas import SMS
from plugins.op import Launch
from plugins.registry import kernels_of_model
from tests.shapes import sizes

REPLAYS = 20


class Gpu:
    """A GPU that torch and the kernels share."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError("torch finds no GPU", expected="an NVIDIA GPU and torch for CUDA", fix="--emulated")
        torch.zeros(1, device=self.device)  # makes the context, which the driver's side then shares
        torch.backends.cuda.matmul.allow_tf32 = False
        self.cuda = Cuda()

    def artifacts(self, g: Geometry, packed: Path | None) -> Artifacts:
        """The kernels of a model of this size: those of the file `packed`, else compiled now."""
        if packed is not None:
            return Artifacts.read(packed)
        sms = (self.cuda.sm,) if self.cuda.sm in SMS else SMS[:1]  # the driver compiles the PTX for others
        return compile_kernels(kernels_of_model(sizes(g), "float16"), sms)

    def launch(self, artifacts: Artifacts, make: Callable[[], list[Launch]], tensors: Sequence[Tensor]) -> None:
        """Launch what `make` returns, in the order of torch's stream."""
        self.cuda.run(artifacts, make(), torch.cuda.current_stream().cuda_stream)

    def milliseconds(self, work: Callable[[], object], *, graph: bool = True, replays: int = REPLAYS) -> float:
        """The median of what `work` takes: recorded as a CUDA graph, or asked anew each time."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what allocates or chooses algorithms does it here
            work()
            work()
        torch.cuda.synchronize()
        if not graph:
            times = []
            for _ in range(replays):
                started = perf_counter()
                work()
                torch.cuda.synchronize()
                times.append(1000 * (perf_counter() - started))
            return statistics.median(times)
        recorded, times = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(recorded):
            work()
        for _ in range(3):
            recorded.replay()
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            recorded.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


class Emulated(Gpu):
    """The CPU, and the emulated driver over torch's own memory."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which no GPU needs interpreted
        from tests.emulator.driver import Driver

        self.driver = Driver()
        self.cuda = Cuda(self.driver)
        self.stream = self.cuda.stream()

    def artifacts(self, g: Geometry, packed: Path | None) -> Artifacts:
        from tests.emulator.driver import emulated_artifacts

        return emulated_artifacts(kernels_of_model(sizes(g), "float16"))

    def launch(self, artifacts: Artifacts, make: Callable[[], list[Launch]], tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self.driver.memory.add(tensor.detach().numpy().reshape(-1))
        self.cuda.run(artifacts, make(), int(self.stream))
        self.stream.wait()
        for start in {tensor.data_ptr() for tensor in tensors}:
            self.driver.memory.remove(start)

    def milliseconds(self, work: Callable[[], object], *, graph: bool = True, replays: int = REPLAYS) -> float:
        started = perf_counter()
        work()
        return 1000 * (perf_counter() - started)
