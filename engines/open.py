"""Which backend opens a bundle, and where: the only place that chooses, and what command lines say of it."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, NamedTuple

from engines.backend import Model, Opening
from engines.bundle.folder import Bundle
from engines.bundle.kinds import BACKENDS, ONNXRUNTIME
from engines.errors import BackendError
from engines.residency import RESIDENCIES

DEVICES = ("cpu", "cuda")


def add_opening_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that opens a bundle to ask it: of `Opening`, and how the bundle is checked."""
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default=Opening.backend, help="None = what the bundle was built for")
    add("--device", choices=DEVICES, default=Opening.device, help="None = cpu for onnxruntime, cuda for TensorRT")
    add("--threads", type=int, default=Opening.threads, help="of one operator; None = every core")
    kept = "of what encodes images: all = always in memory, shared = while one is encoded, opened for each"
    kept += "; None = what the bundle was built for"
    add("--residency", choices=RESIDENCIES, default=Opening.residency, help=kept)
    chunk = "tokens of a prompt in one run: with several slots, and on the CPU with --residency shared"
    add("--prefill-chunk", type=int, default=Opening.prefill_chunk, help=chunk)
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="check the SHA-256 of each file")
    add("--expect", metavar="DIGEST", help="of the bundle, as python -m engines.doctor BUNDLE prints it; or an error")


def add_slot_options(parser: argparse.ArgumentParser) -> None:
    """Options of `Opening` for commands that have several requests at a time."""
    add = parser.add_argument
    add("--slots", type=int, default=Opening.slots, help="requests that share decode steps; 1 = one after the other")


def opening_options(given: argparse.Namespace) -> dict[str, Any]:
    """What those options say, as keyword arguments of `runtime.Engine`."""
    names = [*(each.name for each in fields(Opening)), "verify", "expect"]
    return {name: getattr(given, name) for name in names if hasattr(given, name)}


class Chosen(NamedTuple):
    """What `Opening` leaves open, decided for one bundle."""

    backend: str
    device: str
    residency: str


def chosen(bundle: Bundle, opening: Opening) -> Chosen:
    """What a bundle is opened with: as `opening` says, else as the bundle does. Raises BackendError for a backend that
    there is not, and for a device that it does not know."""
    residency = bundle.manifest.residency if opening.residency is None else opening.residency
    backend = bundle.manifest.backend if opening.backend is None else opening.backend
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r}", expected=f"one of {list(BACKENDS)}")
    if backend == ONNXRUNTIME:
        return Chosen(backend, "cpu" if opening.device is None else opening.device, residency)
    if opening.device not in (None, "cuda"):  # TensorRT, in both its kinds
        raise BackendError(
            f"device {opening.device!r} with the backend {backend}",
            expected="'cuda'",
            fix="leave the device out, or open the bundle with backend='onnxruntime'",
        )
    return Chosen(backend, "cuda", residency)


def open_model(bundle: Bundle, opening: Opening) -> Model[Any]:
    """The three parts of a bundle, ready to run; what their tensors are is the backend's own affair.

    Raises BackendError, and BundleError when it was not built for this. Only what the backend needs is imported.
    """
    backend, device, residency = chosen(bundle, opening)
    if backend == ONNXRUNTIME:
        from engines.ort import OrtModel

        chunk = opening.prefill_chunk
        return OrtModel(bundle, device=device, threads=opening.threads, residency=residency, prefill_chunk=chunk)
    if opening.threads is not None:
        raise BackendError(
            f"threads={opening.threads!r} with the backend {backend}, which computes on the GPU", fix="leave it out"
        )
    from engines.trt.model import TrtModel

    return TrtModel(bundle, backend, residency=residency)
