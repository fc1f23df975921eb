"""One TensorRT build in a process of its own, so that whatever the builder does to it can be told: see build.py.

Reads a Job as JSON from standard input, writes JSON lines to standard output: progress, then the result or an error.
The builder's own log goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from engines.bundle.kinds import TENSORRT_RTX
from engines.bundle.manifest import Profile
from engines.bundle.specs import TensorSpec
from engines.bundle.work import locked, write_whole
from engines.errors import BackendError, FlexError
from engines.memory import peak_rss
from engines.trt import library as tensorrt
from plugins.artifacts import Artifacts, with_command
from plugins.tensorrt import DTYPE_OF_KIND, register

REPORT_EVERY = 0.1  # seconds between lines of progress


@dataclass(frozen=True)
class Job:
    """What to build; every path is absolute.

    weights: the folder where the graph's weights lie. kernels: file of compiled kernels, None without plugins. inputs,
    outputs: of the graph; profiles: the sizes of their symbols. workspace: bytes, None = no limit. timing_cache: a
    file, None = none.
    """

    backend: str
    graph: str
    weights: str
    plan: str
    kernels: str | None
    sms: tuple[int, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    workspace: int | None
    optimization_level: int
    timing_cache: str | None
    rebuild: str  # the command that makes the graph anew


@dataclass(frozen=True)
class Built:
    """A finished build: versions of the builder and of its CUDA, seconds, and the largest memory of the process."""

    tensorrt: str
    cuda: str
    seconds: float
    peak_bytes: int


def build(job: Job, report: Callable[[float], None], log: Callable[[str], object]) -> Built:
    """Build the plan of a job; `report` is told the part that is done, 0 .. 1. Raises BackendError."""
    started = time.perf_counter()
    trt = tensorrt.load(job.backend)
    if job.kernels:
        register(trt, artifacts=Artifacts.read(job.kernels), sms=job.sms)
    logger = tensorrt.make_logger(trt, log)
    builder = trt.Builder(logger)
    os.chdir(job.weights)  # by names alone: the order of an engine's tensors would depend on where the bundle lies
    network, parser = tensorrt.parse(trt, logger, builder, Path(job.graph), rebuild=job.rebuild)
    _fix_and_check(trt, network, job)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # a float32 engine means float32, not TF32's 10-bit mantissa
    config.builder_optimization_level = job.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers keep their names, for profilers and the log
    config.progress_monitor = _monitor(trt, report)
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if job.backend == TENSORRT_RTX:
        config.num_compute_capabilities = len(job.sms)
        for index, sm in enumerate(job.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    for profile in job.profiles:
        shapes = builder.create_optimization_profile()
        for spec in job.inputs:
            shapes.set_shape(spec.name, *(_shape(spec, profile, index) for index in range(3)))
        if config.add_optimization_profile(shapes) < 0:
            raise BackendError(f"TensorRT does not accept the profile {profile.name}: {profile.sizes}")
    save = _use_timing_cache(config, job.timing_cache) if job.timing_cache else None
    plan = tensorrt.build(trt, logger, builder, network, config)
    with open(job.plan, "wb") as file:
        file.write(plan)
    if save:
        save()
    del parser  # it has lived as long as the network
    return Built(trt.__version__, tensorrt.cuda_version(job.backend), time.perf_counter() - started, peak_rss())


def _shape(spec: TensorSpec, profile: Profile, index: int) -> tuple[int, ...]:
    """A shape at the minimum (0), optimum (1) or maximum (2) of a profile."""
    return tuple(profile.sizes[size][index] if isinstance(size, str) else size for size in spec.shape)


def _fix_and_check(trt: ModuleType, network: Any, job: Job) -> None:
    """Make sizes that never change part of the network, and check that it is the graph the manifest describes.

    The parser takes an empty file for an empty graph, without a word.
    """
    found = [
        {(tensor.name, DTYPE_OF_KIND.get(tensor.dtype.name, tensor.dtype.name)) for tensor in tensors}
        for tensors in (
            [network.get_input(index) for index in range(network.num_inputs)],
            [network.get_output(index) for index in range(network.num_outputs)],
        )
    ]
    for name, there, specs in zip(("inputs", "outputs"), found, (job.inputs, job.outputs), strict=True):
        expected = {(spec.name, spec.dtype) for spec in specs}
        if there != expected:
            odd = sorted(there ^ expected)[0]
            raise BackendError(
                f"{job.graph} does not have the {name} of its manifest: {' '.join(odd)}, among {len(there ^ expected)}",
                expected=f"{len(expected)} {name}",
                fix=job.rebuild,
            )
    constant = {
        symbol: sizes[0]
        for symbol, sizes in job.profiles[0].sizes.items()
        if all(set(profile.sizes[symbol]) == {sizes[0]} for profile in job.profiles)
    }
    shapes = {spec.name: spec.shape for spec in job.inputs}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tensor.shape = tuple(constant.get(size, -1) if isinstance(size, str) else size for size in shapes[tensor.name])
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
    for index in range(network.num_outputs):
        network.get_output(index).allowed_formats = 1 << int(trt.TensorFormat.LINEAR)


def _use_timing_cache(config: Any, path: str) -> Callable[[], None]:
    """Load the cache into `config`; returns what adds this build's timings to the file."""
    file = Path(path)

    def read() -> bytes:
        return file.read_bytes() if file.exists() else b""

    def usable(data: bytes) -> Any:
        return config.create_timing_cache(data) or config.create_timing_cache(b"")  # a damaged file counts as none

    with _as_backend_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f"{file.name}.lock")):
            config.set_timing_cache(usable(read()), False)

    def save() -> None:
        cache = config.get_timing_cache()
        with _as_backend_error(file), locked(file.with_name(f"{file.name}.lock")):
            cache.combine(usable(read()), True)  # what other builds have added meanwhile
            write_whole(file, cache.serialize())

    return save


@contextmanager
def _as_backend_error(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendError(
            f"the timing cache {file} cannot be used: {error.strerror or error}",
            fix="set XDG_CACHE_HOME to a folder that can be written, or add --no-timing-cache",
        ) from error


@dataclass
class _Phase:
    """A part of the builder's work, inside the one before it."""

    name: str
    steps: int
    done: int = 0


def _monitor(trt: ModuleType, report: Callable[[float], None]) -> Any:
    """An IProgressMonitor that adds the nested phases up to one part of the whole."""

    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # the library is loaded by name: its classes have no types
        def __init__(self) -> None:
            base.__init__(self)
            self.phases: list[_Phase] = []
            self.last, self.most = 0.0, 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.append(_Phase(name, max(steps, 1)))

        def phase_finish(self, name: str) -> None:
            for index in reversed(range(len(self.phases))):
                if self.phases[index].name == name:
                    del self.phases[index:]
                    break

        def step_complete(self, name: str, step: int) -> bool:
            for phase in reversed(self.phases):
                if phase.name == name:
                    phase.done = step + 1
                    break
            done, width = 0.0, 1.0
            for phase in self.phases:
                width /= phase.steps
                done += width * phase.done
            self.most = min(max(self.most, done), 1.0)
            if time.monotonic() - self.last > REPORT_EVERY:
                self.last = time.monotonic()
                report(self.most)
            return True

    return Monitor()


def main() -> int:
    """Entry of the process."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # native code that prints must not get between the lines

    def send(**message: object) -> None:
        channel.write(json.dumps(message) + "\n")

    job = TypeAdapter(Job).validate_json(sys.stdin.read())
    try:
        built = build(job, lambda part: send(progress=part), lambda line: print(line, file=sys.stderr))
    except FlexError as failure:
        error = with_command(failure, job.rebuild)
        told = {"found": error.found, "expected": error.expected, "fix": error.fix}
        send(error={"type": type(error).__name__, **told})
        return 1
    except OSError as error:
        told = {"found": f"the plan cannot be written: {error}", "expected": None, "fix": "free disk space"}
        send(error={"type": BackendError.__name__, **told})
        return 1
    send(built=asdict(built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
