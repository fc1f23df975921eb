"""The runtime runs without the export's packages, and imports go down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.geometries import tiny

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "triton", "onnx", "onnx_ir", "onnxscript", "safetensors", "sentencepiece", "rich")
COMPILERS = {"kernel.py", "compile.py", "ptx.py"}  # of plugins: not for running
# Of engines, what no runtime imports, and the packages it takes beyond those: the extras of pyproject.toml.
BUILDERS = {
    "bind.py": {"onnx_ir", "onnxscript"},
    "tidy.py": {"onnx_ir"},
    "progress.py": {"rich"},
    "trt_worker.py": {"filelock"},
}
ASKING = {f"export/{name}.py" for name in ("default_model/evaluate", "calibrate", "calibration_data")}
OURS = {"export", "engines", "plugins", "runtime"}
ALLOWED = {
    "runtime": {"runtime", "engines"},
    "engines": {"engines", "plugins"},
    "plugins": {"plugins"},
    "export": {"export", "engines", "plugins"},
}


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


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down_only(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        # The evaluation of the default model asks through the runtime, as its users do; calibration looks through it.
        extra = {"runtime"} if path.relative_to(ROOT).as_posix() in ASKING else set()
        assert imports(path) & OURS <= ALLOWED[package] | extra, path


def test_the_runtime_needs_what_it_says_it_needs():
    known = {"runtime", "engines", "plugins", "numpy", "PIL", "tokenizers", "pydantic", "onnxruntime"}
    files = [*(ROOT / "runtime").rglob("*.py"), *(ROOT / "engines").rglob("*.py")]
    for path in files:
        extra = BUILDERS.get(path.name, set())
        extra = extra | ({"cuda"} if path == ROOT / "engines" / "cuda.py" else set())  # cuda-bindings: the driver
        assert imports(path) <= known | extra | sys.stdlib_module_names, path


def test_each_backend_is_imported_in_one_place():
    """The driver, ONNX Runtime and TensorRT are each behind one file, and imported only when a bundle needs them."""
    places = {"cuda": "cuda.py", "onnxruntime": "ort.py", "tensorrt": "trt.py", "tensorrt_rtx": "trt.py"}
    for package in ("runtime", "engines", "plugins"):
        for path in (ROOT / package).rglob("*.py"):
            for name in imports(path) & set(places):
                assert path == ROOT / "engines" / places[name], path
    program = f"import sys, runtime; print([name for name in {list(places)} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr


def test_torch_stays_in_export_and_the_references():
    for package in ("runtime", "engines", "plugins"):
        for path in (ROOT / package).rglob("*.py"):
            heavy = imports(path) & set(HEAVY)
            allowed = {"torch"} if path.name == "reference.py" else set()
            allowed |= {"onnxscript"} if path.name.startswith("onnx_") else set()
            allowed |= {"onnx_ir", "onnxscript"} if path == ROOT / "engines" / "bind.py" else set()
            allowed |= {"onnx_ir"} if path == ROOT / "engines" / "tidy.py" else set()
            allowed |= {"triton"} if package == "plugins" and path.name in COMPILERS else set()
            allowed |= {"rich"} if path == ROOT / "engines" / "progress.py" else set()
            assert heavy <= allowed, path
