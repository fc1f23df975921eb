"""The Python packages that a machine with only PRESENT lacks, of the versions that are installed here."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from engines.errors import BackendError
from plugins.compiler.ptxas import NVCC

PRESENT = "torch", "triton", "onnx", "onnxruntime", "numpy", "cuda-bindings"
WANTED = (
    "pytest", "filelock", "pydantic", "pillow", "tokenizers", "safetensors", "onnx-ir", "onnxscript", "rich",
    "sentencepiece", NVCC,
)  # fmt: skip
LEFT_OUT = ("huggingface-hub",)  # tokenizers asks for it, and uses it for downloads alone
PARTS = {NVCC: r"bin/ptxas$|\.dist-info/"}  # of these packages no more than such files; the rest is 50 MB


def normal(name: str) -> str:
    """A package's name as indexes have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: Iterable[str]) -> set[str]:
    """Those packages and all that they ask for, as far as it is installed here."""
    found: set[str] = set()
    waiting = [normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in LEFT_OUT:
            continue
        try:
            asks = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # of another system, or optional
        found.add(name)
        needed = (Requirement(each) for each in asks)
        waiting += [normal(each.name) for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def missing() -> list[Distribution]:
    """What is to be carried. BackendError when one of them is not installed here."""
    for name in WANTED:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise BackendError(f"{name} is not installed", fix="python -m pip install -e '.[export,test]'") from None
    return [distribution(name) for name in sorted(closure(WANTED) - closure(PRESENT))]


def carry(folder: Path, python: str) -> list[str]:
    """Put the missing packages into `folder`, for Python `python` ("3.12") on Linux on this kind of processor; returns
    names and versions. For another Python than this one pip fetches them. BackendError when it cannot."""
    packages = missing()
    if python == ".".join(platform.python_version_tuple()[:2]):
        for package in packages:
            copy(package, folder)
    else:
        fetch([f"{package.name}=={package.version}" for package in packages], folder, python)
    for name, pattern in PARTS.items():
        trim(folder, name, pattern)
    return [f"{package.name} {package.version}" for package in packages]


def copy(package: Distribution, folder: Path) -> None:
    """The files of an installed package, but commands and what Python made of them."""
    for file in package.files or ():
        if ".." in file.parts or file.suffix == ".pyc":
            continue
        target = folder / Path(str(file))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(str(package.locate_file(file)), target)


def fetch(requirements: list[str], folder: Path, python: str) -> None:
    """Packages as an index has them for that Python: pure ones, or manylinux."""
    machine = platform.machine()
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in (34, 28, 27, 26, 24, 17, 5)]
    platforms += [f"manylinux{name}_{machine}" for name in ("2014", "2010", "1")]
    options = [option for each in platforms for option in ("--platform", each)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, *options, "--target", str(folder), *requirements]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise BackendError(f"pip finds no packages for Python {python}: {run.stderr.strip()[-500:]}")


def trim(folder: Path, name: str, pattern: str) -> None:
    """Delete what of a package's files does not match."""
    (info,) = folder.glob(f"{name.replace('-', '_')}-*.dist-info")
    listed = [line.rsplit(",", 2)[0] for line in (info / "RECORD").read_text().splitlines()]
    for file in listed:
        if ".." not in Path(file).parts and not re.search(pattern, file):
            (folder / file).unlink(missing_ok=True)
