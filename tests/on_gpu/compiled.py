"""Compiled kernels of the tests on a GPU, where an archive has brought them: minutes that the GPU need not wait."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from plugins.artifacts import Artifacts
from plugins.compiler.kernels import compile_kernels
from plugins.op import Kernel
from tests.paths import BUILT

FOLDER = BUILT / "kernels"


def compiled(kernels: Sequence[Kernel], sms: Sequence[int], folder: Path = FOLDER) -> Artifacts:
    """What compile_kernels makes of them: from `folder` if it is there, else now."""
    path = folder / f"{key(kernels, sms)}.zip"
    return Artifacts.read(path) if path.is_file() else compile_kernels(kernels, sms)


def key(kernels: Sequence[Kernel], sms: Sequence[int]) -> str:
    """What their code depends on, beside the sources of this project, which come in the same archive."""
    return hashlib.sha256(repr((tuple(kernels), tuple(sms))).encode()).hexdigest()
