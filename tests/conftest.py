"""What all tests share: a folder for the workers of one run, and small bundles built on demand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports triton (torch may): its functions are decorated for the interpreter or for the compiler. What
# tests compile, they compile in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
# Each worker of a parallel run keeps to a core of its own, and so do the processes that it starts: threads that spin
# for the cores of others took two fifths of the time.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest
from filelock import FileLock

from engines.bundle.geometry import Geometry
from tests import traces  # before whatever imports the tracer

from export.build import BuildOptions, build  # isort: skip
from tests.checkpoints import write_checkpoint
from tests.paths import BUILT
from tests.skips import in_one_line


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """What was skipped and why, in one line at the end."""
    if line := in_one_line(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder all test workers of this run share; what an archive for a GPU has in it, is there already."""
    if BUILT.is_dir():
        return BUILT
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def kept_traces(shared):
    """See tests/traces.py."""
    (shared / "traces").mkdir(exist_ok=True)
    os.environ[traces.FOLDER] = str(shared / "traces")


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


@pytest.fixture(scope="session")
def default_bundle(shared):
    """default_bundle(precision) -> a bundle of the default model; int8, int4: in the largest blocks that divide it."""

    def get(precision: str) -> Path:
        block = 32 if precision.startswith("int") else None
        options = BuildOptions(out=shared / f"default-{precision}", precision=precision, block_size=block)
        return once(options.out, lambda _: build(options))

    return get
