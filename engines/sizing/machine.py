"""What this machine is: GPU, board, versions, CPU, memory. Nothing is required; what is missing is None or an error."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from engines.errors import FlexError
from engines.targets import TARGETS, Target

if TYPE_CHECKING:
    from engines.cuda import Cuda

# What the targets call themselves, or on a card the driver calls it: regular expressions.
NAMES = {
    "orin-nano-8": r"Orin Nano(?!.*Super)",
    "orin-nano-8-super": r"Orin Nano.*Super",
    "orin-nx-16": r"Orin NX",
    "agx-orin-64": r"AGX Orin",
    "agx-thor-128": r"Thor",
    "rtx-3090": r"RTX 3090(?! Ti)",
    "rtx-4090": r"RTX 4090(?! Laptop| D)",
    "rtx-5090": r"RTX 5090(?! Laptop| D)",
    "h100-80": r"H100(?!.*(PCIe|NVL))",
}
SLACK = 0.2  # how far a target's memory may be from its round number
JETPACK_OF_L4T = {35: "5", 36: "6", 38: "7"}  # of its major version, where no package says more
Found = TypeVar("Found")


@dataclass(frozen=True)
class Gpu:
    """name: the board's where there is one, else as the driver says. sm: 86 is 8.6. memory, free: bytes. integrated:
    memory is shared with the CPU. cuda: version the driver supports, 12060 is 12.6. target: its row, if it has one."""

    name: str
    sm: int
    memory: int
    free: int
    integrated: bool
    cuda: int
    target: Target | None


@dataclass(frozen=True)
class Jetson:
    """model: as the device tree says. l4t, jetpack: versions, None when nothing says."""

    model: str
    l4t: str | None
    jetpack: str | None


@dataclass(frozen=True)
class Host:
    """CPU, its cores, memory in bytes (None when the system does not say), NVIDIA's kernel driver, Python."""

    cpu: str
    cores: int
    memory: int | None
    driver: str | None
    python: str


def look_at(cuda: Cuda | None = None, root: Path = Path("/")) -> Gpu:
    """The first GPU, or the one of `cuda`; BackendError when there is none. `root`: of the file system."""
    if cuda is None:
        from engines.cuda import Cuda

        cuda = Cuda()
    board = jetson(root) if cuda.integrated else None
    name = board.model if board else cuda.name
    free, total = cuda.memory()
    version = int(cuda.call("cuDriverGetVersion"))
    return Gpu(name, cuda.sm, total, free, cuda.integrated, version, matching(name, cuda.sm, total))


def jetson(root: Path = Path("/")) -> Jetson | None:
    """The Jetson this is, None for other machines."""
    model = _read(root / "proc/device-tree/model").strip("\0\n ")
    release = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _read(root / "etc/nv_tegra_release"))
    if "Jetson" not in model and not release:
        return None
    l4t = f"{release[1]}.{release[2]}" if release else None
    package = re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: ([\d.]+)", _read(_packages(root)), re.MULTILINE)
    jetpack = package[1] if package else JETPACK_OF_L4T.get(int(release[1])) if release else None
    return Jetson(model or "unnamed Jetson", l4t, jetpack)


def host(root: Path = Path("/")) -> Host:
    """CPU, memory, driver, Python."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    driver = re.search(r"Kernel Module\D*?\s(\d+\.[\d.]+)", _read(root / "proc/driver/nvidia/version"))
    return Host(
        cpu=f"{cpu[1].strip()}, {platform.machine()}" if cpu else platform.machine(),
        cores=os.cpu_count() or 1,
        memory=int(memory[1]) * 1024 if memory else None,
        driver=driver[1] if driver else None,
        python=platform.python_version(),
    )


def matching(name: str, sm: int | None, memory: int) -> Target | None:
    """The target that calls itself `name`, has this SM (None: unknown) and about these bytes of memory; or None."""
    for key, pattern in NAMES.items():
        board = TARGETS[key]
        if sm in (None, board.sm) and re.search(pattern, name) and abs(memory / board.memory - 1) <= SLACK:
            return board
    return None


def attempt(look: Callable[[], Found]) -> Found | FlexError:
    """What `look` finds, or the error that says why it cannot."""
    try:
        return look()
    except FlexError as error:
        return error


def _packages(root: Path) -> Path:
    return root / "var/lib/dpkg/status"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
