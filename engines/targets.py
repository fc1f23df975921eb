"""The boards and GPUs this project builds engines for, as data; `python -m engines.targets` prints them as Markdown."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.errors import OptionError
from plugins.command import run


@dataclass(frozen=True)
class Software:
    """NVIDIA software that runs on a target. `jetpack` is None off Jetson; a version may be a range."""

    jetpack: str | None
    cuda: str
    tensorrt: str
    rtx: str | None = None  # TensorRT-RTX, where it serves the target

    @property
    def tensorrt_version(self) -> tuple[int, ...]:
        """Of TensorRT, the oldest of a range: "10.3" is (10, 3)."""
        return tuple(map(int, self.tensorrt.split("-")[0].split(".")))


@dataclass(frozen=True)
class Status:
    """What of this project has been seen to work on a target. kernels: "run" on the target, where the GPU tests of all
    kernels passed, or "compiled" by its SM's own assembler. engines: "run" on the target, "built" for its SM in the
    tests, or "untested"."""

    kernels: str
    engines: str


@dataclass(frozen=True)
class Target:
    """A board or GPU.

    sm: compute capability, 87 is 8.7. memory: bytes, shared with the CPU where `integrated`. bandwidth: of the memory,
    GB/s. precisions: by name, those this project builds whose weights its tensor cores and TensorRT serve.
    """

    name: str
    title: str
    sm: int
    memory: int
    bandwidth: int
    integrated: bool
    software: tuple[Software, ...]
    precisions: tuple[str, ...]
    status: Status

    @property
    def backend(self) -> str:
        """What its engines are built with unless told otherwise: TensorRT-RTX where it serves the target."""
        return TENSORRT_RTX if any(each.rtx for each in self.software) else TENSORRT


_ORIN = (Software("6.1-6.2.2", "12.6", "10.3"), Software("7.2", "13.2", "10.16"))
_AGX_ORIN = (*_ORIN, Software("7.2.2", "13.2", "11.4"))
_THOR = (Software("7.0-7.1", "13.0", "10.13"), Software("7.2", "13.2", "10.16"), Software("7.2.2", "13.2", "11.4"))
_DESKTOP = (Software(None, "12-13", "10-11", "1.7"),)
_SERVER = (Software(None, "12-13", "10-11"),)
_AMPERE = ("fp16", "bf16", "int8", "int4")
_FP8 = (*_AMPERE, "fp8")
_GB = 10**9  # boards are named by the round number; what is free is less: engines/sizing/fit.py
_UNTESTED, _BUILT = Status("compiled", "untested"), Status("compiled", "built")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("orin-nano-8", "Jetson Orin Nano 8 GB", 87, 8 * _GB, 68, True, _ORIN, _AMPERE, _UNTESTED),
        Target("orin-nano-8-super", "Jetson Orin Nano 8 GB, Super", 87, 8 * _GB, 102, True, _ORIN, _AMPERE, _UNTESTED),
        Target("orin-nx-16", "Jetson Orin NX 16 GB", 87, 16 * _GB, 102, True, _ORIN, _AMPERE, _UNTESTED),
        Target("agx-orin-64", "Jetson AGX Orin 64 GB", 87, 64 * _GB, 205, True, _AGX_ORIN, _AMPERE, _UNTESTED),
        Target("agx-thor-128", "Jetson AGX Thor 128 GB", 110, 128 * _GB, 273, True, _THOR, _FP8, _UNTESTED),
        Target("rtx-3090", "GeForce RTX 3090 24 GB", 86, 24 * _GB, 936, False, _DESKTOP, _AMPERE, _BUILT),
        Target("rtx-4090", "GeForce RTX 4090 24 GB", 89, 24 * _GB, 1008, False, _DESKTOP, _FP8, _BUILT),
        Target("rtx-5090", "GeForce RTX 5090 32 GB", 120, 32 * _GB, 1792, False, _DESKTOP, _FP8, _BUILT),
        Target("h100-80", "H100 80 GB", 90, 80 * _GB, 3350, False, _SERVER, _FP8, _UNTESTED),
    )
}


def target(name: str) -> Target:
    """The target of this name; OptionError, which lists the names, if there is none."""
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}", expected=f"one of {', '.join(TARGETS)}")
    return TARGETS[name]


def markdown() -> str:
    """The targets as a Markdown table."""

    def software(each: Software) -> str:
        place = f"JetPack {each.jetpack}: " if each.jetpack else ""
        return f"{place}CUDA {each.cuda}, TensorRT {each.tensorrt}" + (f", TensorRT-RTX {each.rtx}" if each.rtx else "")

    header = "target", "GPU", "SM", "GB/s", "software", "precisions here", "kernels", "engines"
    rows = [
        (
            f"`{each.name}`",
            each.title,
            str(each.sm),
            str(each.bandwidth),
            "; ".join(map(software, each.software)),
            ", ".join(each.precisions),
            each.status.kernels,
            each.status.engines,
        )
        for each in TARGETS.values()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


if __name__ == "__main__":
    sys.exit(run(lambda: print(markdown())))
