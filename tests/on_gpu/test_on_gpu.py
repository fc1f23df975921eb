"""The one command for a GPU: its dry run, what it does when something goes wrong, and what an archive holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

from engines.errors import BackendError
from plugins.registry import kernels_of_model
from tests.bench import gpu_step
from tests.bench.contenders.gpu_layers import Model
from tests.emulator.driver import emulated_artifacts
from tests.geometries import official, tiny
from tests.on_gpu import compiled, pack, packages
from tests.on_gpu.device import Emulated
from tests.on_gpu.machine import Machine
from tests.on_gpu.report import FAILED, LATE, PASSED, SKIPPED, WAITS, run_all
from tests.on_gpu.steps import STEPS, Step
from tests.on_gpu.unweighted import bundle_without_weights
from tests.paths import ROOT
from tests.shapes import sizes

NOWHERE = Machine(None, None, "none here", (), None, {})


def python(program: str) -> tuple[str, ...]:
    return "-c", program


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A dry run of every step, as a user asks for it."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "tests.on_gpu", "--dry-run", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True), out


def test_every_step_runs_or_says_why_not(dry):
    run, out = dry
    assert run.returncode == 0, run.stdout + run.stderr
    steps = json.loads((out / "gpu-report.json").read_text())["steps"]
    assert [step["name"] for step in steps] == [step.name for step in STEPS]
    for step in steps:
        assert step["status"] in (PASSED, SKIPPED), step
        assert step["status"] == PASSED or step["summary"], step
        assert step["name"] not in ("kernels", "rehearsal") or " tests (needs an NVIDIA GPU)" in step["summary"]
    ran = {step["name"] for step in steps if step["status"] == PASSED}
    assert {"step", "bundle", "bandwidth"} <= ran
    found = json.loads((out / "step.json").read_text())
    assert found["steps, ms"]["plain, ours, nothing selected"] > 0 and found["difference"] <= gpu_step.BOUND


def test_the_report_is_for_people(dry):
    text = (dry[1] / "gpu-report.md").read_text()
    assert "A dry run" in text and all(step.title in text for step in STEPS)
    assert "| flex, ours, 2 pages |" in text and "| attend_pages" not in text


def test_without_a_gpu_only_a_dry_run(tmp_path):
    command = [sys.executable, "-m", "tests.on_gpu", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "no GPU" in run.stderr and "--dry-run" in run.stderr
    run = subprocess.run([*command, "--only", "kernel"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "--only kernel" in run.stderr and "kernels,step" in run.stderr


def test_nothing_stops_the_others(tmp_path):
    """One fails, one takes too long with a process of its own, one cannot run; the last is right."""
    asleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    steps = (
        Step("wrong", "Wrong", python("import sys; print('so far'); sys.exit('a fault')"), 60),
        Step("slow", "Slow", python(asleep), 1),
        Step("lacking", "Lacking", python(""), 60, missing=lambda machine: "there is none"),
        Step("right", "Right", python("print('| a table |')"), 60, table=True),
    )
    report = run_all(steps, NOWHERE, tmp_path, minutes=5)
    assert [result.status for result in report.results] == [FAILED, LATE, SKIPPED, PASSED]
    assert report.failed
    assert report.results[0].summary == "status 1, a fault" and "so far" in report.results[0].shown
    assert report.results[1].seconds < 20
    text = (tmp_path / "gpu-report.md").read_text()
    assert "| Lacking | skipped | 0 | there is none |" in text and "\n| a table |" in text
    assert (tmp_path / "wrong.err").read_text() == "a fault\n"
    assert not run_all(steps[2:], NOWHERE, tmp_path / "other", minutes=5).failed


def test_when_the_minutes_are_over_nothing_is_started(tmp_path):
    report = run_all([Step("one", "One", python(""), 60)], NOWHERE, tmp_path, minutes=0)
    assert report.results[0].status == WAITS and not report.failed
    assert "| One | not reached |" in (tmp_path / "gpu-report.md").read_text()


def test_what_is_killed_leaves_the_report_so_far(tmp_path):
    program = f"""
from pathlib import Path
from plugins.command import run
from plugins.signals import interrupt_when_asked_to_end
from tests.on_gpu.machine import Machine
from tests.on_gpu.report import run_all
from tests.on_gpu.steps import Step
interrupt_when_asked_to_end()
sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
steps = Step("one", "One", ("-c", "print(7)"), 60), Step("two", "Two", ("-c", sleep), 600)
machine = Machine(None, None, "", (), None, {{}})
raise SystemExit(run(lambda: run_all(steps, machine, Path({str(tmp_path)!r}), minutes=9) and None))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    started = tmp_path / "two.out"
    end = time.monotonic() + 60
    while not (started.exists() and started.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    first, second = json.loads((tmp_path / "gpu-report.json").read_text())["steps"]
    assert first["status"] == PASSED and first["summary"] == "7"
    assert second["status"] == WAITS and second["summary"] == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_the_step_is_checked_before_it_is_timed():
    """Ours against the official way; a page that holds something else is found."""
    gpu, g = Emulated(), tiny(layers=3)
    with torch.no_grad():
        model = Model(gpu, g, 70, gpu.artifacts(g, None))
        assert gpu_step.check(model, 2) <= gpu_step.BOUND
        model.reading[0].page_value += 1
        with pytest.raises(AssertionError, match="from the official way"):
            gpu_step.check(model, 2)


def test_a_bundle_without_weights_is_that_of_a_build(tmp_path, random_model):
    _, built = random_model("tiny", tiny(), "fp16")
    bundle_without_weights(tiny(), tmp_path)
    ours, theirs = (json.loads((folder / "bundle.json").read_text()) for folder in (tmp_path, built))
    weights = {name: file["bytes"] for name, file in theirs["files"].items() if name.endswith(".weights")}
    assert weights and {name: ours["files"][name]["bytes"] for name in weights} == weights
    assert ours["parts"] == theirs["parts"] and ours["geometry"] == theirs["geometry"]
    assert not list(tmp_path.glob("*.weights"))


def test_kernels_that_came_along_are_not_compiled(tmp_path, monkeypatch):
    kernels = kernels_of_model(sizes(tiny()), "float16")
    path = tmp_path / f"{compiled.key(kernels, (90,))}.zip"
    emulated_artifacts(kernels, (90,)).write(path)
    monkeypatch.setattr(compiled, "compile_kernels", lambda kernels, sms: pytest.fail("compiled"))
    assert compiled.compiled(kernels, (90,), tmp_path).sms == (90,)
    with pytest.raises(pytest.fail.Exception):
        compiled.compiled(kernels, (80,), tmp_path)


def test_kernels_are_compiled_once_each_and_kept_by_set(tmp_path, monkeypatch):
    small, large = (tuple(kernels_of_model(sizes(g), "float16")) for g in (tiny(), official()))
    sets = [(small, (90,)), (large, (90,)), (small[:2], (90,)), (small[:1], (80,))]
    calls = []

    def compile(kernels, sms):
        calls.append((kernels, sms))
        return emulated_artifacts(kernels, sms)

    monkeypatch.setattr(pack, "compile_kernels", compile)
    pack.keep(sets, tmp_path)
    done = [(kernel, sms) for kernels, sms in calls for kernel in kernels]
    assert len(set(done)) == len(done) == len({(kernel, sms) for kernels, sms in sets for kernel in kernels})
    for kernels, sms in sets:
        found = compiled.compiled(kernels, sms, tmp_path)
        assert tuple(each.kernel for each in found.compiled) == kernels and found.sms == sms


def test_what_is_compiled_beforehand_is_asked_for_without_a_gpu(monkeypatch):
    """Here of the tests of 8 bits, where comparisons are left out."""
    run, few = subprocess.run, ["-k", "8_bits and float16 and not bfloat16"]
    monkeypatch.setattr(subprocess, "run", lambda command, **named: run([*command, *few], **named))
    found = pack.asked((90,))
    names = {kernel.name for kernels, sms in found for kernel in kernels if sms == (90,)}
    assert {"append", "project_pages"} <= names, names


def test_what_a_bare_machine_lacks_is_carried(tmp_path):
    """All that the steps import comes with the archive or with the few packages that the machine has; ptxas runs."""
    packages.carry(tmp_path, ".".join(map(str, sys.version_info[:2])))
    program = """
import sys, sysconfig
import tests.bench.gpu_step, tests.on_gpu.seven_b, tests.parity.gpu.test_onnxruntime, tests.parity.gpu.test_tensorrt
import sentencepiece, tests.plugins.test_gpu_kernels
site = sysconfig.get_paths()["purelib"]
files = {name.split(".")[0]: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
print(*(name for name, file in files.items() if file.startswith(site)))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    there = packages.closure(packages.PRESENT) | {"tqdm"}  # which torch.hub takes if it is there
    known = packages_distributions()
    owners = {name: known.get(name, []) for name in run.stdout.split()}
    assert "torch" in owners and "tokenizers" not in owners
    for name, names in owners.items():  # several share the name google
        assert not names or there & {*map(packages.normal, names)}, name
    (ptxas,) = (path for path in (tmp_path / "nvidia").rglob("*") if path.is_file())
    assert "release 12.6" in subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout


def test_what_of_the_project_is_packed():
    left_out = ["docs", "README.md", ".git", "build", "checkpoints", "examples"]
    assert pack._unneeded(str(ROOT), left_out) == set(left_out)
    kept = ["engines", "tests", "scripts", "pyproject.toml"]
    assert not pack._unneeded(str(ROOT), kept)
    assert pack._unneeded(str(ROOT / "scripts"), ["gpu.sh", "test.sh"]) == {"test.sh"}
    assert pack._unneeded(str(ROOT / "engines"), ["cuda.py", "__pycache__"]) == {"__pycache__"}


def test_an_archive_that_is_too_large_is_none(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(os.urandom(5000))
    archive = tmp_path / "archive.tar.xz"
    assert pack.write(archive, folder) == archive.stat().st_size
    archive.unlink()
    monkeypatch.setattr(pack, "MOST", 1000)
    with pytest.raises(BackendError, match="at most"):
        pack.write(archive, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
