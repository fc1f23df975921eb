"""Processes that builds start: what lies in the current folder is never imported, whatever names it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins import child
from plugins.child import environment, python
from tests.paths import ROOT

NAMES = ("numpy", "triton", "pydantic", "json", "runpy", "site", "tensorrt_rtx")  # modules of others
PACKAGES = ("plugins", "engines", "export", "runtime")


@pytest.fixture
def trap(tmp_path) -> Path:
    """A folder, such as a downloaded checkpoint, in which every module there is leaves a file when it is imported."""
    code = f"open({str(tmp_path / 'HIJACKED')!r}, 'a').write(__name__ + '\\n')\n"
    folder = tmp_path / "trap"
    for package in PACKAGES:
        for inner in ("", "compiler", "trt", "bundle"):
            (folder / package / inner).mkdir(parents=True, exist_ok=True)
            (folder / package / inner / "__init__.py").write_text(code)
    for name in (*NAMES, "plugins/compiler/ptx", "plugins/errors", "engines/trt/worker", "engines/errors"):
        (folder / f"{name}.py").write_text(code)
    return folder


def hijacked(trap: Path) -> str:
    path = trap.parent / "HIJACKED"
    return path.read_text() if path.exists() else ""


def test_the_trap_works(trap):
    subprocess.run([sys.executable, "-m", "plugins.compiler.ptx"], cwd=trap, capture_output=True, check=False)
    assert "plugins" in hijacked(trap)


@pytest.mark.parametrize("safe_path", [True, False], ids=["-P", "as Python 3.10"])
@pytest.mark.parametrize("path", [None, "", ":", ".", "trap", f".:{os.pathsep}"])
@pytest.mark.parametrize("module", ["plugins.compiler.ptx", "engines.trt.worker"])
def test_modules_are_ours_wherever_a_build_is_started(trap, monkeypatch, module, path, safe_path):
    if safe_path and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    run = subprocess.run(
        python(module, str(trap.parent / "result"), safe_path=safe_path),
        cwd=trap.parent if path == "trap" else trap, env=environment(), input="[]", capture_output=True, text=True,
    )  # fmt: skip
    assert hijacked(trap) == ""
    if module == "plugins.compiler.ptx":  # of no kernels, no code
        assert run.returncode == 0 and json.loads((trap.parent / "result").read_text()) == []
    else:
        assert "validation error" in run.stderr  # it read its job, and that [] is none


def test_what_the_user_names_in_full_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "relative", str(tmp_path), "."]))
    assert environment()["PYTHONPATH"] == os.pathsep.join([str(ROOT), str(tmp_path)])
    assert environment()["PATH"] == os.environ["PATH"] and child.ROOT == ROOT


COMPILE = """
import sys
sys.path.insert(0, {root!r})
from plugins.compiler.kernels import compile_kernels
from plugins.registry import kernels_of_model
from plugins.compile import OFFICIAL_7B
kernels = [kernel for kernel in kernels_of_model(OFFICIAL_7B, "float16") if kernel.name == "select_pages"]
print(len(compile_kernels(kernels, (89,)).compiled))
"""


def test_compiling_kernels_from_inside_a_hostile_folder(trap):
    """A script whose own folder is another, so that nothing but the processes it starts could look into this one."""
    pytest.importorskip("triton")
    script = trap.parent / "script.py"
    script.write_text(COMPILE.format(root=str(ROOT)))
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = subprocess.run([sys.executable, str(script)], cwd=trap, env=alone, capture_output=True, text=True)
    assert run.stdout.strip() == "1", run.stderr
    assert hijacked(trap) == ""
