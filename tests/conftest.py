"""What all tests share: a folder for the workers of one run, and small bundles built on demand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports triton (torch may): its functions are decorated for the interpreter or for the compiler. What
# tests compile, they compile in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
# Before anything imports onnxruntime, in processes that tests start as well: no test reports to anybody.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import pytest
from filelock import FileLock

from engines.bundle.geometry import Geometry
from export.build import BuildOptions, build
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder all test workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made by the first worker that needs it."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def random_model(shared):
    """random_model(name, geometry, precision="fp32", **checkpoint options) -> (checkpoint folder, bundle folder)."""

    def get(name: str, g: Geometry, precision: str = "fp32", **options: object) -> tuple[Path, Path]:
        checkpoint = once(shared / f"{name}-checkpoint", lambda folder: write_checkpoint(folder, g, **options))
        built = BuildOptions(model=checkpoint, precision=precision, out=shared / f"{name}-{precision}")
        return checkpoint, once(built.out, lambda _: build(built))

    return get
