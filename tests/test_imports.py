"""The house: imports go down one chain, no two rooms import each other, every foreign library has its place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.geometries import tiny
from tests.paths import ROOT

CHAIN = ("export", "runtime", "engines", "plugins")  # each imports itself and what comes after it
FLOOR = {"numpy", "pydantic", "PIL", "tokenizers"}  # what an app that runs bundles installs, a backend apart
# Where each other library is imported: patterns of files. A backend and the driver are behind one file each.
HOMES = {
    "torch": ("export/*", "plugins/*/reference.py"),
    "onnx": ("export/graph/*",),
    "onnx_ir": ("export/*",),
    "onnxscript": ("export/graph/*", "plugins/*/onnx_*.py"),
    "rich": ("export/*", "engines/progress.py"),
    "sentencepiece": ("export/checkpoint/tokenizer.py",),
    "google": ("export/checkpoint/tokenizer.py",),  # protobuf
    "huggingface_hub": ("export/checkpoint/tower.py",),
    "safetensors": ("export/default_model/*", "export/second_opinion.py"),
    "transformers": ("export/second_opinion.py",),
    "triton": ("plugins/*/*kernel.py", "plugins/compiler/*"),
    "onnxruntime": ("engines/ort/*",),
    "tensorrt": ("engines/trt/library.py",),
    "tensorrt_rtx": ("engines/trt/library.py",),
    "cuda": ("engines/cuda.py",),
    "starlette": ("runtime/serve/*",),
    "uvicorn": ("runtime/serve/__main__.py",),
    "prometheus_client": ("runtime/serve/metrics.py",),
    "prompt_toolkit": ("runtime/terminal/*",),
    "scipy": ("runtime/evaluate/significance.py",),
    "lmms_eval": ("runtime/evaluate/lmms.py",),
    "ray": ("runtime/serve/ray/*",),
    "fsspec": ("runtime/serve/ray/bundles.py",),
}
BACKENDS = ("cuda", "onnxruntime", "tensorrt", "tensorrt_rtx")
HEAVY = ("torch", "transformers", "triton", "onnx", "onnx_ir", "onnxscript", "safetensors", "sentencepiece", "rich")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they go"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> Path | None:
    """The file of one of our modules, or of the one that has this name in it."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def room(path: Path) -> str:
    """A folder of a package, or a file beside the folders."""
    inside = path.relative_to(ROOT).parts
    return "/".join(inside[:2])


@pytest.mark.parametrize("package", CHAIN)
def test_imports_go_down_the_chain(package):
    below = CHAIN[CHAIN.index(package) :]
    assert files(package)
    for path in files(package):
        ours = {name.split(".")[0] for name in imports(path)} & {*CHAIN, "tests"}
        assert ours <= set(below), path


def test_no_circles():
    """Neither between the rooms of the house nor between its files. What is imported inside a function counts too."""
    for place in (room, lambda path: str(path.relative_to(ROOT))):
        graph: dict[str, set[str]] = {}
        for path in (path for package in CHAIN for path in files(package)):
            found = {place(module) for name in imports(path) if (module := module_of(name)) is not None}
            graph.setdefault(place(path), set()).update(found - {place(path)})
        TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", CHAIN)
def test_every_library_has_its_place(package):
    for path in files(package):
        where = path.relative_to(ROOT).as_posix()
        for library in {name.split(".")[0] for name in imports(path)} - {*CHAIN} - sys.stdlib_module_names:
            homes = HOMES.get(library, ())
            assert library in FLOOR | {"flexattention_deploy"} or any(fnmatch(where, home) for home in homes), (
                f"{where} imports {library}"
            )


def test_plugins_need_no_package_to_run():
    """Of what a board runs of plugins, only numpy is not Python's own."""
    for path in files("plugins"):
        if (
            path.name in ("kernel.py", "int8_kernel.py", "reference.py")
            or path.name.startswith("onnx_")
            or path.parent.name == "compiler"
        ):
            continue
        assert {name.split(".")[0] for name in imports(path)} <= {"plugins", "numpy"} | sys.stdlib_module_names, path


def test_folders_stay_small():
    for package in (*CHAIN, "tests"):
        for folder in {path.parent for path in files(package)}:
            count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
            assert count <= 13, f"{folder}: {count} files; a room of its own for what belongs together?"


def test_no_test_imports_a_test():
    """What tests share lies in modules of its own: a test can then be read, run and dropped alone."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files("tests")
        for name in imports(path)
        if (module := module_of(name)) is not None and module.name.startswith("test_")
    ]
    assert not found, "\n".join(found)


def test_backends_are_imported_when_needed():
    program = f"import sys, runtime; print([name for name in {BACKENDS} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr


def test_answers_without_the_export_packages(random_model):
    _, bundle = random_model("tiny", tiny())
    program = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None  # import raises ImportError
import numpy as np
from runtime import Engine
answer = Engine({str(bundle)!r}).generate(
    np.zeros((9, 9, 3), np.uint8), input_ids=[1, -200, 5], max_new_tokens=2, stop_at_eos=False)
print(len(answer.token_ids))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "2", result.stderr
