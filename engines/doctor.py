"""What this machine has, and what each backend lacks: `python -m engines.doctor`. Nothing missing makes it fail.

With a bundle it checks that instead: `python -m engines.doctor BUNDLE --expect sha256:...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path

from engines import ort
from engines.bundle.folder import Bundle
from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.cuda import Cuda
from engines.errors import FlexError
from engines.sizing.machine import Gpu, attempt, host, jetson, look_at, matching
from engines.sizing.needs import size
from engines.targets import TARGETS, Target
from engines.trt import library as trt
from engines.trt.options import RTX_SMS
from flexattention_deploy import PACKAGES, folder_of
from plugins.child import ROOT
from plugins.command import run
from plugins.compiler.ptxas import SMS
from plugins.tensorrt import require_fields

OURS = "flexattention-deploy"


@dataclass(frozen=True)
class Usable:
    """Whether something works here. found: version, or what is missing; fix: the command, where there is one."""

    what: str
    works: bool
    found: str
    fix: str | None = None


def examine(cuda: Cuda | None = None, root: Path = Path("/")) -> str:
    """The report, several lines. `cuda`, `root`: to look at something else than this machine's own GPU and files."""
    gpu, board, machine = attempt(lambda: look_at(cuda, root)), jetson(root), host(root)
    memory = "unknown" if machine.memory is None else size(machine.memory)
    rows = [
        ("python", machine.python),
        ("cpu", f"{machine.cpu}, {machine.cores} cores"),
        ("memory", memory),
    ]
    if board:
        versions = f"L4T {board.l4t or 'unknown'}, JetPack {board.jetpack or 'unknown'}"
        rows.append(("board", f"{board.model}, {versions}"))
    rows.append(("driver", machine.driver or "no NVIDIA kernel driver"))
    if isinstance(gpu, Gpu):
        shared = ", shared with the CPU" if gpu.integrated else ""
        version = f"CUDA {gpu.cuda // 1000}.{gpu.cuda % 1000 // 10}"
        found = f"{gpu.name}, SM {gpu.sm}, {size(gpu.memory)}{shared}, {size(gpu.free)} free, {version}"
        rows += [("gpu", found), ("target", _target(gpu.target, gpu.sm))]
    else:
        rows.append(("gpu", gpu.found))
        if board:
            rows.append(("target", _target(matching(board.model, None, machine.memory or 0), None)))
    lines = [f"{name:<8}{text}" for name, text in rows]
    for each in backends(gpu):
        lines.append(f"\n{each.what}: {'yes' if each.works else 'no'}: {each.found}")
        if each.fix:
            lines.append(f"  fix: {each.fix}")
    return "\n".join([*lines, *(f"\n{line}" for line in collisions(packages_distributions()))])


def collisions(owners: Mapping[str, Sequence[str]], root: Path = ROOT) -> list[str]:
    """What is wrong with the names of our packages, which others may have as well: pip writes one over the other
    without a word, and a folder of that name that is found first is imported in their place.

    owners: distributions by top-level package, as importlib.metadata has them. root: where our packages lie.
    """
    found = []
    for name in PACKAGES:
        others = sorted({each for each in owners.get(name, ()) if each.lower().replace("_", "-") != OURS})
        if others:
            found.append(
                f"package {name}: {' and '.join(others)} installed one of this name, too; only one can be imported\n"
                f"  fix: a virtual environment for {OURS} without {' and '.join(others)}"
            )
        place = folder_of(name)
        if place is not None and place != root / name:
            found.append(
                f"package {name}: Python finds {place}, not {root / name}\n"
                f"  fix: rename that one, or start Python where it does not come first: {root} in PYTHONPATH"
            )
    return found


def check(path: Path, expect: str | None) -> str:
    """What a bundle is, after every file of it was checked; its digest in the first line. BundleError, OptionError."""
    bundle = Bundle(path, expect=expect)
    manifest, size_of = bundle.manifest, sum(file.bytes for file in bundle.manifest.files.values())
    engines = sorted({backend for part in manifest.parts.values() for backend in part.plans})
    lines = [
        f"digest  {bundle.digest}",
        f"bundle  {path}: {manifest.precision}, {len(manifest.files)} files of {size(size_of)}, unchanged",
        f"opens   with {manifest.backend}, residency {manifest.residency}; engines: {', '.join(engines) or 'none'}",
    ]
    return "\n".join(lines + ["expect  the digest is the one expected"] * (expect is not None))


def backends(gpu: Gpu | FlexError) -> list[Usable]:
    """What can be run and built here. `gpu`: the one there is, or why there is none."""
    runtime = attempt(ort.installed)
    rtx, full = (attempt(partial(_version, name)) for name in (TENSORRT_RTX, TENSORRT))
    if isinstance(runtime, FlexError):
        rows = [Usable("run onnxruntime", False, runtime.found, runtime.fix)]
    else:
        version, providers = f"ONNX Runtime {runtime[0]}", runtime[1]
        rows = [Usable("run onnxruntime on the CPU", True, version)]
        on_gpu = _on_gpu("run onnxruntime on the GPU", version, gpu, None)
        if on_gpu.works and ort.PROVIDERS["cuda"] not in providers:
            fix = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
            on_gpu = Usable(on_gpu.what, False, f"{version} has only {', '.join(providers)}", fix)
        rows.append(on_gpu)
    rows.append(_of(full, "build and run tensorrt", gpu, SMS))
    needless = f"{rtx}, needs no GPU for that"
    built = (
        Usable("build tensorrt-rtx", True, needless) if isinstance(rtx, str) else _of(rtx, "build tensorrt-rtx", gpu)
    )
    return [*rows, built, _of(rtx, "run tensorrt-rtx", gpu, RTX_SMS)]


def _version(backend: str) -> str:
    """The version of a TensorRT that works with the NumPy that is here; BackendError, KernelError."""
    module = trt.load(backend)
    require_fields(module)
    return str(module.__version__)


def _of(found: str | FlexError, what: str, gpu: Gpu | FlexError, sms: Container[int] | None = None) -> Usable:
    if isinstance(found, FlexError):
        return Usable(what, False, found.found, found.fix)
    return _on_gpu(what, found, gpu, sms)


def _on_gpu(what: str, version: str, gpu: Gpu | FlexError, sms: Container[int] | None) -> Usable:
    if isinstance(gpu, FlexError):
        return Usable(what, False, gpu.found, gpu.fix)
    if sms is not None and gpu.sm not in sms:
        other = "use --backend tensorrt" if gpu.sm in SMS else "use onnxruntime"
        return Usable(what, False, f"{version} has nothing for SM {gpu.sm}", other)
    return Usable(what, True, version)


def _target(board: Target | None, sm: int | None) -> str:
    if board is None:
        same = [each.name for each in TARGETS.values() if each.sm == sm]
        return "no row in engines/targets.py" + (f"; of SM {sm} there are {', '.join(same)}" if same else "")
    served = ", ".join(board.precisions)
    return f"{board.name}: {served}; kernels {board.status.kernels}, engines {board.status.engines}"


def main(arguments: list[str] | None = None) -> int:
    """Entry of the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m engines.doctor", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle to check, instead of this machine")
    parser.add_argument("--expect", metavar="DIGEST", help="what the bundle's digest must be")
    given = parser.parse_args(arguments)
    if given.expect is not None and given.bundle is None:
        parser.error("--expect without a bundle")
    return run(lambda: print(examine() if given.bundle is None else check(given.bundle, given.expect)))


if __name__ == "__main__":
    sys.exit(main())
