"""PTX -> code of one GPU generation, by NVIDIA's assembler, in the versions the boards need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plugins.errors import KernelError
from plugins.op import FIRST_SM

# CUDA 12.6 is JetPack 6's, and its code runs under every later driver; newer SMs need CUDA 13.
SMS_OF_CUDA = {"12.6": (80, 86, 87, 89, 90), "13": (100, 110, 120, 121)}
SMS = tuple(sm for sms in SMS_OF_CUDA.values() for sm in sms)
NVCC = "nvidia-cuda-nvcc-cu12"
INSTALL = f"python -m pip install 'triton>=3.7.1,<3.10' '{NVCC}==12.6.*'"


@dataclass(frozen=True)
class Assembler:
    """A ptxas program: where it is, its full version, the SMs it serves and options it needs."""

    path: Path
    version: str
    sms: tuple[int, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Code:
    """What ptxas made. registers: per thread. shared: bytes, static and dynamic. slow: what it says of its own accord
    about code that is right and slower than it could be."""

    cubin: bytes
    registers: int
    shared: int
    slow: tuple[str, ...] = ()


def find_assemblers() -> dict[str, Assembler]:
    """The ptxas of CUDA 12.6 and of CUDA 13 among the installed packages, by key of SMS_OF_CUDA. KernelError if not."""
    try:
        package = importlib.metadata.distribution(NVCC)
        old = next(Path(str(package.locate_file(file))) for file in package.files or () if file.name == "ptxas")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise KernelError("no ptxas of CUDA 12.6 is installed", expected=f"{NVCC} 12.6", fix=INSTALL) from None
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise KernelError("Triton is not installed", expected="Triton, to compile kernels", fix=INSTALL)
    new = Path(triton.origin).parent / "backends/nvidia/bin/ptxas-blackwell"
    # Register allocation of ptxas 13 has a fault at its default level, says Triton, and chooses this one.
    found = {"12.6": (old, ()), "13": (new, ("--regAllocOptLevel=2",))}
    return {cuda: _assembler(path, cuda, options) for cuda, (path, options) in found.items()}


def _assembler(path: Path, cuda: str, options: tuple[str, ...]) -> Assembler:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelError(f"{path} does not run: {error}", expected=f"ptxas of CUDA {cuda}", fix=INSTALL) from error
    match = re.search(r"\bV(\d+(?:\.\d+)+)", text)
    version = match[1] if match else "unknown"
    if not f"{version}.".startswith(f"{cuda}."):
        raise KernelError(f"{path} is of version {version}", expected=f"ptxas of CUDA {cuda}", fix=INSTALL)
    return Assembler(path, version, SMS_OF_CUDA[cuda], options)


def assemble(assembler: Assembler, ptx: Path, sm: int, arch: int, shared: int, limit: int) -> Code:
    """Assemble a PTX file, NAME.NUMBER.ptx, for an SM. arch: whose instructions the text has, the SM's own or FIRST_SM.
    shared: bytes of dynamic shared memory its launch will ask for, of at most `limit` that a program may have.

    KernelError when it is refused, spills registers to memory, or needs more shared memory.
    """
    gpu = f"sm_{sm}" if arch == FIRST_SM else f"sm_{sm}a"
    name = ptx.name.partition(".")[0]
    cubin, log = _run(assembler, ptx, gpu)
    registers, spills, static = read_log(log)
    if spills:  # ptxas may choose a few spills so that one more program fits on an SM: tell it that one is enough
        cubin, log = _run(assembler, ptx, gpu, "--minnctapersm=1")
        registers, spills, static = read_log(log)
    if spills:
        raise KernelError(
            f"{name} for SM {sm} spills {spills} bytes of registers to memory (ptxas {assembler.version})",
            expected="no spills",
            fix="smaller tiles, or more warps, in its row of plugins/tiles.py",
        )
    if static + shared > limit:
        raise KernelError(
            f"{name} for SM {sm} needs {static + shared} bytes of shared memory",
            expected=f"at most {limit}",
            fix="smaller tiles, or fewer stages, in its row of plugins/tiles.py",
        )
    return Code(cubin, registers, static + shared, read_slow(log))


def _run(assembler: Assembler, ptx: Path, gpu: str, *options: str) -> tuple[bytes, str]:
    """The cubin, and what ptxas reports."""
    with tempfile.TemporaryDirectory(prefix="cubin-") as folder:
        cubin = Path(folder) / "cubin"
        command = [assembler.path, "-v", *assembler.options, *options, f"--gpu-name={gpu}", ptx, "-o", cubin]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        log = run.stdout + run.stderr
        if run.returncode:
            raise KernelError(
                f"ptxas {assembler.version} refuses {ptx.name} for {gpu} (status {run.returncode}): "
                f"{log.strip()[:1000]}",
                expected="PTX that every ptxas from 12.6 on takes",
            )
        return cubin.read_bytes(), log


def read_slow(log: str) -> tuple[str, ...]:
    """Each "potential performance loss" in the output of ptxas, with its code: C7514, for one, where it runs wgmma one
    at a time."""
    return tuple(re.findall(r"\(C\d+\) Potential Performance Loss: [^\n]+", log))


def read_log(log: str) -> tuple[int, int, int]:
    """(registers per thread, bytes spilled, bytes of static shared memory) from the output of `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if len(registers) != 1 or len(spills) != 1:
        raise KernelError(f"cannot read what ptxas reports: {log.strip()[:1000]}", expected="one function", fix=INSTALL)
    static = re.search(r"(\d+) bytes smem", log)
    return int(registers[0]), sum(map(int, spills[0])), int(static[1]) if static else 0
