"""What this machine has, as far as steps ask: `python -m tests.on_gpu.machine` prints it as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from engines.cuda import Cuda
from engines.errors import FlexError
from tests.paths import ROOT

PACKAGES = "torch", "triton", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "cuda-bindings", "tensorrt"
LIMIT = 60  # seconds: the first use of a GPU takes some


@dataclass(frozen=True)
class Machine:
    """gpu: the GPU's name, None when there is none, and `why` then. sm: its compute capability, 90 is 9.0. providers:
    of ONNX Runtime. sanitizer: where compute-sanitizer is, or None. versions: of packages that are installed."""

    gpu: str | None
    sm: int | None
    why: str
    providers: tuple[str, ...]
    sanitizer: str | None
    versions: dict[str, str]


def look() -> Machine:
    """This machine. Makes a context on the GPU, which stays as long as the process does."""
    try:
        cuda = Cuda()
        gpu, sm, why = cuda.name, cuda.sm, ""
    except FlexError as error:
        gpu, sm, why = None, None, error.found
    try:
        import onnxruntime

        providers = tuple(onnxruntime.get_available_providers())
    except ImportError:
        providers = ()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(gpu, sm, why, providers, sanitizer(), versions)


def sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, or in a CUDA toolkit that is not on it."""
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), reverse=True)
    return shutil.which("compute-sanitizer") or next((str(place) for place in places if place.is_file()), None)


def look_from_outside() -> Machine:
    """`look` in a process of its own, so that this one keeps nothing of the GPU for itself."""
    command = [sys.executable, "-m", "tests.on_gpu.machine"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        return Machine(None, None, f"the driver has not answered within {LIMIT} s", (), sanitizer(), {})
    except subprocess.CalledProcessError as error:
        return Machine(None, None, f"a look at it failed: {error.stderr.strip()[-500:]}", (), sanitizer(), {})
    found = json.loads(run.stdout)
    return Machine(**found | {"providers": tuple(found["providers"])})


if __name__ == "__main__":
    print(json.dumps(asdict(look())))
