"""An archive for a machine with a GPU, without a network, and with little installed: `scripts/gpu.sh --pack ARCHIVE`.

It holds the project as far as GPU tests need it, Python packages that the machine lacks, and whatever a GPU need not
wait for: compiled kernels, traced graphs, bundles. There: `tar xf ARCHIVE && bash flexattention/scripts/gpu.sh`.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tests import traces  # before whatever imports the tracer

from engines.bundle.folder import Bundle  # isort: skip
from engines.bundle.kinds import PARTS
from engines.errors import BackendError
from plugins.artifacts import Artifacts, Compiled
from plugins.compiler.kernels import compile_kernels
from plugins.op import Kernel
from plugins.registry import kernels_of_model
from tests.bench import gpu_step
from tests.geometries import official
from tests.on_gpu import compiled, packages, seven_b
from tests.on_gpu.asked_kernels import ASKED, SM
from tests.on_gpu.steps import KERNEL_TESTS
from tests.on_gpu.unweighted import bundle_without_weights
from tests.parity.gates import GPU_BOUNDS
from tests.parity.gpu.built import official_bundle
from tests.paths import BUILT, ROOT
from tests.shapes import sizes

NAME = "flexattention"  # the folder in the archive
MOST = 60_000_000  # bytes of an archive
PROJECT = (
    "engines", "export", "plugins", "runtime", "tests", "scripts/gpu.sh", "flexattention_deploy.py", "pyproject.toml",
)  # fmt: skip
NOT_NEEDED = ("__pycache__", "tests/parity/data/preprocess", "runtime/serve/page", "tests/campaign", "tests/typing")
SMS = (90,)  # GPUs whose kernels for the tests are compiled beforehand; others compile them when they run

Asked = tuple[tuple[Kernel, ...], tuple[int, ...]]  # kernels that are compiled together, and for which SMs


def pack(archive: Path, python: str, say: Callable[[str], None]) -> str:
    """Write `archive` (.tar.xz) for a machine with Python `python`, and return what it holds, for people. Takes some
    minutes; `say` is told what is made. BackendError when it becomes too large, or a package is not to be had."""
    with tempfile.TemporaryDirectory(prefix="pack-") as name:
        folder = Path(name) / NAME
        shutil.copytree(ROOT, folder, ignore=_unneeded)
        say("packages")
        carried = packages.carry(folder / "packages", python)
        built = folder / BUILT.name
        (built / "traces").mkdir(parents=True)
        os.environ[traces.FOLDER] = str(built / "traces")
        say("bundles")
        for precision in GPU_BOUNDS:
            for weights in ("plain", "degenerate"):
                bundle = official_bundle(built, precision, weights)
            trace_lazily(Bundle(bundle))
        (folder / seven_b.PACKED.name).mkdir()
        bundle_without_weights(official(), folder / seven_b.PACKED.name)
        say("kernels")
        kernels_of_step(folder / gpu_step.PACKED.name)
        (built / compiled.FOLDER.name).mkdir()
        keep(asked(SMS), built / compiled.FOLDER.name)
        for lock in built.rglob("*.lock"):
            lock.unlink()
        say("archive")
        size = write(archive, folder)
    return f"{archive}: {size / 1e6:.1f} MB, for Python {python}, with {', '.join(carried)}"


def _unneeded(folder: str, names: list[str]) -> set[str]:
    """Of the names in a folder of the project, those that are not packed."""
    inside = Path(folder).relative_to(ROOT)
    found = set()
    for name in names:
        path = (inside / name).as_posix()
        wanted = any(path == each or each.startswith(f"{path}/") or path.startswith(f"{each}/") for each in PROJECT)
        if not wanted or name in NOT_NEEDED or path in NOT_NEEDED:
            found.add(name)
    return found


def trace_lazily(bundle: Bundle) -> None:
    """The graphs of the same model with pages that are projected when they are selected, kept where traces are."""
    for int8_pages in (False, True):
        g = replace(bundle.manifest.geometry, lazy_pages=True, int8_pages=int8_pages)
        for part in PARTS:
            traces.cached(part, g, getattr(torch, bundle.precision.dtype))


def kernels_of_step(path: Path) -> None:
    """The kernels of 7B, for every GPU there is code for."""
    compile_kernels(kernels_of_model(sizes(official()), "float16")).write(path)


def asked(sms: Sequence[int]) -> list[Asked]:
    """What the GPU tests of the kernels compile on such GPUs, by running them with the references in the place of
    kernels. BackendError when they fail."""
    found: list[Asked] = []
    for sm in sms:
        with tempfile.TemporaryDirectory(prefix="asked-") as name:
            path = Path(name) / "asked"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "tests.on_gpu.asked_kernels"]
            environment = {**os.environ, ASKED: str(path), SM: str(sm)}
            run = subprocess.run([*command, KERNEL_TESTS], cwd=ROOT, env=environment, capture_output=True, text=True)
            if run.returncode:
                raise BackendError(f"the GPU tests of the kernels fail: {run.stdout[-1000:]}{run.stderr[-500:]}")
            found += pickle.loads(path.read_bytes())
    return list(dict.fromkeys(found))


def keep(sets: Sequence[Asked], folder: Path) -> None:
    """Compile them, each kernel once, and write every set to its file in `folder`."""
    made: dict[tuple[Kernel, tuple[int, ...]], list[Compiled]] = {}  # the variants of each
    versions: dict[str, str] = {}
    for kernels, sms in batches(sets):
        artifacts = compile_kernels(kernels, sms)
        versions |= artifacts.versions
        for kernel in kernels:  # of which no two have one name
            made[kernel, sms] = [each for each in artifacts.compiled if each.kernel.name == kernel.name]
    for kernels, sms in sets:
        whole = Artifacts(tuple(each for kernel in kernels for each in made[kernel, sms]), versions)
        whole.write(folder / f"{compiled.key(kernels, sms)}.zip")


def batches(sets: Sequence[Asked]) -> Iterator[Asked]:
    """The kernels of all sets, each once for its SMs, in as few sets as have no two of one name."""
    waiting = list(dict.fromkeys((kernel, sms) for kernels, sms in sets for kernel in kernels))
    while waiting:
        sms = waiting[0][1]
        batch: dict[str, Kernel] = {}
        for kernel, its in waiting:
            if its == sms:
                batch.setdefault(kernel.name, kernel)
        yield tuple(batch.values()), sms
        waiting = [each for each in waiting if each[1] != sms or batch.get(each[0].name) != each[0]]


def write(archive: Path, folder: Path) -> int:
    """Pack `folder`; the size of the archive. BackendError when it is larger than MOST: then there is none."""
    part = archive.with_name(f".{archive.name}.part")
    try:
        with tarfile.open(part, "w:xz", preset=6) as tar:
            tar.add(folder, folder.name)
        size = part.stat().st_size
        if size > MOST:
            raise BackendError(f"an archive of {size / 1e6:.1f} MB", expected=f"at most {MOST / 1e6:.0f} MB")
        part.replace(archive)
        return size
    finally:
        part.unlink(missing_ok=True)
