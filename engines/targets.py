"""The boards and GPUs this project builds engines for, as data."""

from __future__ import annotations

from dataclasses import dataclass

from engines.errors import OptionError


@dataclass(frozen=True)
class Software:
    """NVIDIA software that runs on a target. `jetpack` is None off Jetson; a version may be a range."""

    jetpack: str | None
    cuda: str
    tensorrt: str


@dataclass(frozen=True)
class Target:
    """A board or GPU.

    sm: compute capability, 87 is 8.7. memory: bytes, shared with the CPU where `integrated`. bandwidth: of the memory,
    GB/s. precisions: of the weights that its tensor cores and TensorRT serve.
    """

    name: str
    title: str
    sm: int
    memory: int
    bandwidth: int
    integrated: bool
    software: tuple[Software, ...]
    precisions: tuple[str, ...]


_ORIN = (Software("6.1-6.2.2", "12.6", "10.3"), Software("7.2", "13.2", "10.16"))
_THOR = (Software("7.0-7.1", "13.0", "10.13"), Software("7.2", "13.2", "10.16"))
_DESKTOP = (Software(None, "12-13", "10-11, RTX 1"),)
_SERVER = (Software(None, "12-13", "10-11"),)
_AMPERE = ("fp16", "bf16", "int8", "int4")
_FP8 = (*_AMPERE, "fp8")
_FP4 = (*_FP8, "nvfp4")
_GB = 10**9  # boards are named by the round number; what is free is less: ask the driver

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("orin-nano-8", "Jetson Orin Nano 8 GB", 87, 8 * _GB, 68, True, _ORIN, _AMPERE),
        Target("orin-nano-8-super", "Jetson Orin Nano 8 GB, Super mode", 87, 8 * _GB, 102, True, _ORIN, _AMPERE),
        Target("orin-nx-16", "Jetson Orin NX 16 GB", 87, 16 * _GB, 102, True, _ORIN, _AMPERE),
        Target("agx-orin-64", "Jetson AGX Orin 64 GB", 87, 64 * _GB, 205, True, _ORIN, _AMPERE),
        Target("agx-thor-128", "Jetson AGX Thor 128 GB", 110, 128 * _GB, 273, True, _THOR, _FP4),
        Target("rtx-3090", "GeForce RTX 3090 24 GB", 86, 24 * _GB, 936, False, _DESKTOP, _AMPERE),
        Target("rtx-4090", "GeForce RTX 4090 24 GB", 89, 24 * _GB, 1008, False, _DESKTOP, _FP8),
        Target("rtx-5090", "GeForce RTX 5090 32 GB", 120, 32 * _GB, 1792, False, _DESKTOP, _FP4),
        Target("h100-80", "H100 80 GB", 90, 80 * _GB, 3350, False, _SERVER, _FP8),
    )
}


def target(name: str) -> Target:
    """The target of this name; OptionError, which lists the names, if there is none."""
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}", expected=f"one of {', '.join(TARGETS)}")
    return TARGETS[name]
