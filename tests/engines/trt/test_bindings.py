"""TensorRT's own Python bindings, version by version, over a library that is not there: what the project uses of them
exists in each, and its plugins live through them from the node of a graph to a launch. Their core is closed: nothing is
parsed, built or run here.

The packages of the bindings come without the library, 1 MB each: they are fetched with pip, or found as wheels in the
folder that FLEX_TENSORRT_BINDINGS names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from plugins.registry import OPS
from tests.conftest import once
from tests.paths import ROOT

VERSIONS = {
    "10.1.0": "cu12",
    "10.3.0": "cu12",
    "10.7.0": "cu12",
    "10.13.3.9": "cu12",
    "10.16.1.11": "cu12",
    "11.1.0.106": "cu12",
    "11.4.0.106": "cu13",
}
NUMPY_1 = "1.26.4"
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
# What the bindings link to. Whatever they ask for is not there.
SOURCE = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in is a library of Linux")


def unpacked(shared: Path, package: str, version: str) -> Path:
    """A folder with what a package of this version installs; skips the test when it is not to be had."""

    def fetch(folder: Path) -> None:
        given = os.environ.get("FLEX_TENSORRT_BINDINGS")
        source = ["--no-index", "--find-links", given] if given else []
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "0"]
        command += ["--timeout", "10", "--quiet", *source, "--dest", str(folder), f"{package}=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            done = None
        folder.mkdir(exist_ok=True)
        for wheel in folder.glob("*.whl") if done and done.returncode == 0 else ():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            wheel.unlink()

    folder = once(shared / f"{package}-{version}", fetch)
    if not any(folder.iterdir()):
        pytest.skip(f"pip finds no such package: {package}=={version}")
    return folder


@pytest.fixture
def libraries(shared):
    """libraries(major) -> the libraries that bindings of a major version link to."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, for a library of nothing")

    def make(major: str) -> list[str]:
        def compile_all(folder: Path) -> None:
            folder.mkdir()
            source = folder / "nothing.c"
            source.write_text(SOURCE)
            for name in LIBRARIES:
                file = f"lib{name}.so.{major}"
                command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", str(source), "-o", str(folder / file)]
                subprocess.run(command, check=True)

        folder = once(shared / f"no-tensorrt-{major}", compile_all)
        return [str(folder / f"lib{name}.so.{major}") for name in LIBRARIES]

    return make


@pytest.fixture
def probe(shared, libraries):
    """probe(version, numpy=None) -> what tests.engines.trt.bindings_probe prints, under that NumPy, else this one."""

    def ask(version: str, numpy: str | None = None) -> dict:
        folder = unpacked(shared, f"tensorrt-{VERSIONS[version]}-bindings", version)
        path = [str(unpacked(shared, "numpy", numpy))] if numpy else []
        command = [sys.executable, "-m", "tests.engines.trt.bindings_probe", str(folder)]
        done = subprocess.run(
            [*command, *libraries(version.split(".")[0])], cwd=ROOT, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_used_exists_and_plugins_live(probe, version):
    """Under the NumPy that is installed: before 10.16 the bindings misread a field under NumPy 2, which is told."""
    found = probe(version)
    assert found["missing"] == []
    assert found["version"].split(".")[:2] == version.split(".")[:2] and found["numpy"] == np.__version__
    if tuple(map(int, version.split(".")[:2])) < (10, 16) and not np.__version__.startswith("1."):
        assert "read the numbers [1, 2] as [1, 1]" in found["refused"] and "'numpy<2'" in found["fix"]
    else:
        assert found["plugins"] == sorted(OPS)


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9"])
def test_the_fix_for_older_bindings_works(probe, version):
    """With NumPy 1, what JetPack 6 and JetPack 7.0 have runs as the newer ones do."""
    found = probe(version, NUMPY_1)
    assert found["numpy"] == NUMPY_1 and found["plugins"] == sorted(OPS) and "refused" not in found
