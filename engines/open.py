"""Which backend opens a bundle, and where: the only place that chooses."""

from __future__ import annotations

from typing import Any

from engines.backend import Model, Opening
from engines.bundle.folder import Bundle
from engines.bundle.kinds import BACKENDS, ONNXRUNTIME
from engines.errors import BackendError

DEVICES = ("cpu", "cuda")


def chosen(bundle: Bundle, opening: Opening) -> tuple[str, str]:
    """(backend, device) that a bundle is opened with, what `opening` leaves open decided. Raises BackendError for a
    backend that there is not, and for a device that it does not know."""
    backend = bundle.manifest.backend if opening.backend is None else opening.backend
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r}", expected=f"one of {list(BACKENDS)}")
    if backend == ONNXRUNTIME:
        return backend, "cpu" if opening.device is None else opening.device
    if opening.device not in (None, "cuda"):  # TensorRT, in both its kinds
        raise BackendError(
            f"device {opening.device!r} with the backend {backend}",
            expected="'cuda'",
            fix="leave the device out, or open the bundle with backend='onnxruntime'",
        )
    return backend, "cuda"


def open_model(bundle: Bundle, opening: Opening) -> Model[Any]:
    """The three parts of a bundle, ready to run; what their tensors are is the backend's own affair.

    Raises BackendError, and BundleError when it was not built for this. Only what the backend needs is imported.
    """
    backend, device = chosen(bundle, opening)
    if backend == ONNXRUNTIME:
        from engines.ort import OrtModel

        return OrtModel(bundle, device=device, threads=opening.threads)
    if opening.threads is not None:
        raise BackendError(
            f"threads={opening.threads!r} with the backend {backend}, which computes on the GPU", fix="leave it out"
        )
    from engines.trt.model import TrtModel

    return TrtModel(bundle, backend)
