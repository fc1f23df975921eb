"""Packages of somebody else under our names, and packages that are not installed: both say what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from flexattention_deploy import EXTRAS
from tests.paths import ROOT

WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run(*arguments: str, folder: Path, path: tuple[Path, ...] = (ROOT,)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def app(tmp_path) -> Path:
    """The folder of somebody's program."""
    (tmp_path / "app.py").write_text("from runtime import Engine; print('ok')")
    return tmp_path


def named(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()


@pytest.mark.parametrize("name", ["engines", "plugins"])
def test_a_package_of_somebody_elses_is_named(name, app):
    named(app, name)
    failed = run("app.py", folder=app)
    assert f"ImportError: the package '{name}' that Python finds is not flexattention-deploy's" in failed.stderr
    assert str(app / name) in failed.stderr and str(ROOT / name) in failed.stderr
    assert run("-P", "app.py", folder=app).stdout == "ok\n"  # as the message advises
    listed = run("-m", "flexattention_deploy", folder=app)
    assert listed.returncode == 1 and f"{name}: {app / name}, not this project's: {ROOT / name}" in listed.stdout


def test_packages_that_an_app_does_not_use_are_not_looked_at(app):
    named(app, "export", "tests")
    assert run("app.py", folder=app).stdout == "ok\n"
    listed = run("-m", "flexattention_deploy", folder=ROOT)
    assert listed.returncode == 0 and listed.stdout.count(str(ROOT)) == 4


@pytest.mark.parametrize("command", [("-m", "export.build"), (str(ROOT / "export/build.py"),)])
def test_a_command_without_its_extra_says_what_to_install(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    failed = run(*command, folder=tmp_path, path=(tmp_path, ROOT))
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: torch: not installed") and "pip install '.[export]'" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_an_import_without_its_extra_is_an_import_error(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    program = "try: import export.build\nexcept ImportError as error: print(error)"
    found = run("-c", program, folder=tmp_path, path=(tmp_path, ROOT))
    assert "pip install '.[export]'" in found.stdout
    runtime = run("-c", "from runtime import Engine; print('ok')", folder=tmp_path, path=(tmp_path, ROOT))
    assert runtime.stdout == "ok\n"


def test_extras_name_what_pyproject_installs():
    """A module for every package of the extra, under the name it is imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"protobuf": ["google.protobuf"], "ray": ["ray", "fastapi"]}  # ray[serve]
    for extra, modules in EXTRAS.items():
        named = [re.match(r"[\w-]+", entry)[0] for entry in project[extra]]
        packages = [name for name in named if name != "flexattention-deploy"]  # an extra that brings another
        found = [module for name in packages for module in imported.get(name, [name.replace("-", "_")])]
        assert sorted(found) == sorted(modules)
