"""The onnxruntime package of this machine: whether it is there, what it can run on, and what it calls things."""

from __future__ import annotations

import os
import re
from importlib.metadata import packages_distributions
from types import ModuleType
from typing import TYPE_CHECKING

from engines.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime as ort

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OLDEST = 1, 25
# On the GPU a float32 bundle means float32, not TF32's 10-bit mantissa.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}


# From here on what a CUDA graph copies from the host's memory stays there; before, other runs wrote over it (its pull
# request 32121; of the wheels, those from 1.30 on have it).
CAPTURES = 1, 30


def installed() -> tuple[str, list[str]]:
    """Version and providers of this machine's ONNX Runtime; BackendError when it is missing."""
    module = import_library()
    return module.__version__, module.get_available_providers()


def import_library() -> ModuleType:
    """onnxruntime; BackendError when it is missing or too old."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else its wheels report to their maker when imported
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise BackendError("onnxruntime is not installed", fix="pip install onnxruntime") from error
        raise BackendError(  # also a Ctrl-C in the middle of it
            f"onnxruntime cannot be imported: {error!s:.200}",
            fix="try again; if it stays, reinstall it: pip install --force-reinstall onnxruntime",
        ) from error
    module: ModuleType = onnxruntime
    if _version(module) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        found, place = getattr(module, "__version__", "of no version"), getattr(module, "__file__", "an unknown place")
        raise BackendError(
            f"onnxruntime {found} in {place}",
            expected=f"{oldest} or newer: older ones lack TensorScatter, which keeps the cache in place",
            fix=f"upgrade it: pip install --upgrade '{_package()}>={oldest}'",
        )
    return module


def captures() -> str | None:
    """Why this ONNX Runtime cannot be trusted to record CUDA graphs, and what would help; None where it can."""
    module, needed = import_library(), ".".join(map(str, CAPTURES))
    if _version(module) >= CAPTURES:
        return None
    return (
        f"onnxruntime {module.__version__} writes over what graphs still read; {needed} or newer does not: "
        f"pip install --upgrade '{_package()}>={needed}'"
    )


def arena_shrinking() -> ort.RunOptions:
    """Options of a run on the CPU behind which the session's arena gives back what it does not use."""
    return run_options({"memory.enable_memory_arena_shrinkage": "cpu:0"})


def run_options(entries: dict[str, str]) -> ort.RunOptions:
    """Options of a run, by their keys in onnxruntime_run_options_config_keys.h."""
    options: ort.RunOptions = import_library().RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options


def _version(module: ModuleType) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", str(getattr(module, "__version__", "")))
    return (0, 0) if numbers is None else (int(numbers[1]), int(numbers[2]))


def _package() -> str:
    """The distribution that ONNX Runtime was installed from: there are some, by what they run on."""
    names = packages_distributions().get("onnxruntime", [])
    return next((name for name in names if name != "onnxruntime"), "onnxruntime")


def provider_of(ort_module: ModuleType, device: str) -> str:
    """The provider for a device, "cpu" or "cuda"; BackendError when this ONNX Runtime does not have it."""
    if not isinstance(device, str) or device not in PROVIDERS:
        raise BackendError(f"device {device!r}", expected=f"one of {list(PROVIDERS)}")
    provider, available = PROVIDERS[device], ort_module.get_available_providers()
    if provider not in available:
        fix = (
            "pip uninstall onnxruntime && pip install onnxruntime-gpu" if device == "cuda" else "reinstall onnxruntime"
        )
        raise BackendError(f"this ONNX Runtime has no {provider}, only {available}", fix=fix)
    if device == "cuda":
        ort_module.preload_dlls()  # finds CUDA and cuDNN where pip installed them
    return provider


def onnx_type(dtype: str) -> str:
    """What a session calls a dtype."""
    return f"tensor({'float' if dtype == 'float32' else dtype})"


def failed(part: str, error: Exception) -> BackendError:
    """Of whatever a run raised: onnxruntime has its own classes and raises RuntimeError alike."""
    return BackendError(f"ONNX Runtime failed in the {part} part: {error}")
