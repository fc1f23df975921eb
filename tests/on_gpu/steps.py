"""What is to be proved on a GPU, as data: the most valuable first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.on_gpu.machine import Machine
from tests.paths import ROOT


@dataclass(frozen=True)
class Step:
    """One thing to prove, by a process of its own.

    name: of its files. command: arguments of Python; {out} stands for the folder of the results, {name} for the name.
    dry: what a dry run on the CPU runs in its place, None = the same. limit: seconds. missing: what of the machine
    keeps it from running, or None. prefix: of a program that starts Python. table: what it prints is the result, and
    goes into the report as it is; of others the last line does.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: int
    dry: tuple[str, ...] | None = None
    missing: Callable[[Machine], str | None] = lambda machine: None
    prefix: Callable[[Machine], tuple[str, ...]] = lambda machine: ()
    table: bool = False


def _tests(*arguments: str) -> tuple[str, ...]:
    """GPU tests, one after the other: two at a time would share the GPU. pytest-xdist may not be there."""
    return "-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", *arguments


def _without_provider(machine: Machine) -> str | None:
    """Why ONNX Runtime cannot use the GPU, or None."""
    if machine.gpu is None or "CUDAExecutionProvider" in machine.providers:
        return None  # without a GPU the tests say so themselves
    return "needs onnxruntime-gpu in place of onnxruntime"


def _exists(folder: str) -> Callable[[Machine], str | None]:
    return lambda machine: None if (ROOT / folder).is_dir() else f"there is no {folder}"


KERNEL_TESTS = "tests/plugins/test_gpu_kernels.py"
STEPS = (
    Step("kernels", "Every kernel against its reference", _tests(KERNEL_TESTS), 180),
    Step(
        "step",
        "A whole decode step of 7B's shape, and its kernels beside SDPA and cuBLAS",
        ("-m", "tests.bench.gpu_step", "--json", "{out}/{name}.json"),
        90,
        dry=("-m", "tests.bench.gpu_step", "--emulated", "--json", "{out}/{name}.json"),
        table=True,
    ),
    Step(
        "rehearsal",
        "The TensorRT path with all but libnvinfer",
        _tests("tests/rehearsal"),
        150,
        missing=_exists("tests/rehearsal"),
    ),
    Step(
        "provider",
        "The ladder of official runs in ONNX Runtime's CUDA provider",
        _tests("tests/parity/gpu/test_onnxruntime.py"),
        150,
        missing=_without_provider,
    ),
    Step(
        "bundle",
        "A bundle of 7B's shape with random weights, through the public interface",
        ("-m", "tests.on_gpu.seven_b"),
        150,
        dry=("-m", "tests.on_gpu.seven_b", "--shape", "tiny", "--device", "cpu"),
        missing=_without_provider,
        table=True,
    ),
    Step(
        "bandwidth",
        "The kernels of a decode step against the memory's bandwidth",
        ("-m", "tests.bench.kernels", "--gpu"),
        60,
        dry=("-m", "tests.bench.kernels"),
        table=True,
    ),
    Step("tensorrt", "The ladder in engines of TensorRT", _tests("tests/parity/gpu/test_tensorrt.py"), 240),
    *(
        Step(
            tool,
            f"compute-sanitizer {tool} over attention, selection and projection in float16",
            _tests(KERNEL_TESTS, "-k", "float16 or selection"),
            120,
            missing=lambda machine: None if machine.sanitizer else "compute-sanitizer was not found",
            prefix=lambda machine, tool=tool: (str(machine.sanitizer), f"--tool={tool}", "--error-exitcode=1"),
        )
        for tool in ("memcheck", "racecheck", "initcheck")
    ),
)


def arguments(step: Step, out: Path, dry: bool) -> list[str]:
    """Of Python, to run a step, or its dry run."""
    command = step.dry if dry and step.dry is not None else step.command
    return [each.format(out=out, name=step.name) for each in command]
