"""The doctor on machines that are not there: a fake file system, the emulated driver, modules that are missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines import doctor, ort
from engines.bundle.folder import Bundle
from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.cuda import Cuda
from engines.doctor import backends, examine
from engines.errors import BackendError
from engines.sizing.machine import NAMES, attempt, host, jetson, look_at, matching
from engines.targets import TARGETS, markdown
from engines.trt import library as trt
from tests.emulator.driver import Driver
from tests.emulator.plugins import CLASSES, PluginField
from tests.geometries import tiny
from tests.paths import ROOT

ORIN_NX = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0"
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
PACKAGES = """Package: nvidia-driver-daemon
Version: 1

Package: nvidia-jetpack
Status: install ok installed
Architecture: arm64
Version: 6.2+b77
Description: NVIDIA Jetpack Meta Package

Package: other
Version: 9.9
"""


@pytest.fixture
def root(tmp_path):
    """root(files): a file system with these files."""

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


@pytest.fixture
def installed(monkeypatch):
    """installed(tensorrt=version, ...): which versions of what are there; what is not named is missing."""

    def make(onnxruntime: tuple[str, list[str]] | None = None, **versions: str) -> None:
        def load(backend: str) -> SimpleNamespace:
            version = versions.get(backend.replace("-", "_"))
            if version is None:
                raise BackendError(f"{backend} is not installed", fix=trt.INSTALL[backend])
            return SimpleNamespace(__name__=backend, __version__=version, **CLASSES)

        def runtime() -> tuple[str, list[str]]:
            if onnxruntime is None:
                raise BackendError("onnxruntime is not installed", fix="pip install onnxruntime")
            return onnxruntime

        monkeypatch.setattr(trt, "load", load)
        monkeypatch.setattr(ort, "installed", runtime)

    return make


def test_a_jetson(root, installed):
    installed(("1.24.0", ["CPUExecutionProvider"]), tensorrt="10.3.0")
    files = {
        "proc/device-tree/model": ORIN_NX,
        "etc/nv_tegra_release": RELEASE,
        "var/lib/dpkg/status": PACKAGES,
        "proc/meminfo": "MemTotal:       15900000 kB\nMemFree: 1 kB\n",
        "proc/cpuinfo": "processor : 0\n",
    }
    text = examine(Cuda(Driver(sm=87, integrated=True, total=15_900_000 << 10)), root(files))
    for words in (
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit, L4T 36.4.3, JetPack 6.2",
        "SM 87, 16.3 GB, shared with the CPU",
        "CUDA 12.6",
        "orin-nx-16: fp16, bf16, int8, int4; kernels compiled, engines untested",
        "build and run tensorrt: yes: 10.3.0",
        "run onnxruntime on the CPU: yes",
        "run onnxruntime on the GPU: no: ONNX Runtime 1.24.0 has only CPUExecutionProvider",
        "fix: pip uninstall onnxruntime && pip install onnxruntime-gpu",
        "run tensorrt-rtx: no: tensorrt-rtx is not installed",
    ):
        assert words in text, words


class OfNumPy1(PluginField):
    """What a field is to bindings that were made for NumPy 1 when they meet NumPy 2."""

    def __init__(self, name: str, data: np.ndarray, kind: int) -> None:
        super().__init__(name, np.full_like(data, data[0]), kind)


def test_bindings_that_do_not_fit_numpy(installed, monkeypatch):
    """No engine with plugins would open, so a TensorRT that is there is of no use yet."""
    monkeypatch.setitem(CLASSES, "PluginField", OfNumPy1)
    installed(tensorrt="10.13.3")
    (row,) = [each for each in backends(BackendError("no GPU")) if each.what == "build and run tensorrt"]
    assert not row.works and "read the numbers [1, 2] as [1, 1]" in row.found and "'numpy<2'" in row.fix


def test_a_jetson_without_its_driver(root, installed, monkeypatch):
    """The board is known by its name all the same."""
    installed()
    gone = BackendError("cuda-bindings is not installed", fix="pip install cuda-bindings")

    def missing(*_):
        raise gone

    monkeypatch.setattr(doctor, "look_at", missing)
    model = "NVIDIA Jetson AGX Orin Developer Kit\0"
    text = examine(root=root({"proc/meminfo": "MemTotal: 65900000 kB\n", "proc/device-tree/model": model}))
    assert "cuda-bindings is not installed" in text and "agx-orin-64: " in text
    assert "L4T unknown, JetPack unknown" in text and "run onnxruntime: no" in text


def test_a_card(root, installed, monkeypatch):
    installed(("1.32.0", ["CUDAExecutionProvider", "CPUExecutionProvider"]), tensorrt_rtx="1.7.1", tensorrt="10.9.0")
    monkeypatch.setattr(Driver, "cuDeviceGetName", lambda *_: (0, b"NVIDIA GeForce RTX 4090\0"))
    driver = {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16\n"}
    text = examine(Cuda(Driver(sm=89, total=25_757_000_000)), root(driver))
    assert "560.35.03" in text and "rtx-4090: fp16, bf16, int8, int4, fp8; kernels compiled, engines built" in text
    assert ": no" not in text and "fix" not in text and "board" not in text
    other = examine(Cuda(Driver(sm=89, total=8 << 30)), root(driver))
    assert "no row in engines/targets.py; of SM 89 there are rtx-4090" in other


def test_a_card_that_ran_the_kernels(root, installed, monkeypatch):
    """The H100: TensorRT-RTX, installed as it may be, does not serve it."""
    installed(("1.32.0", ["CUDAExecutionProvider", "CPUExecutionProvider"]), tensorrt_rtx="1.7.1")
    monkeypatch.setattr(Driver, "cuDeviceGetName", lambda *_: (0, b"NVIDIA H100 80GB HBM3\0"))
    text = examine(Cuda(Driver(sm=90, total=85_500_000_000)), root({}))
    assert "h100-80: fp16, bf16, int8, int4, fp8; kernels compiled, engines untested" in text
    assert "run onnxruntime on the GPU: yes" in text and "run tensorrt-rtx: no: 1.7.1 has nothing for SM 90" in text


@pytest.mark.parametrize(("sm", "rtx", "full"), [(87, False, True), (75, False, False), (86, True, True)])
def test_gpus_that_a_backend_does_not_serve(installed, sm, rtx, full):
    installed(tensorrt="10.3.0", tensorrt_rtx="1.7.1")
    found = {each.what: each for each in backends(look_at(Cuda(Driver(sm=sm))))}
    assert found["run tensorrt-rtx"].works == rtx and found["build and run tensorrt"].works == full
    assert found["build tensorrt-rtx"].works  # anywhere
    assert rtx or ("--backend tensorrt" in found["run tensorrt-rtx"].fix) == full


def test_nothing_at_all(tmp_path, installed):
    installed()
    text = examine(root=tmp_path)  # this machine's own driver, if it has one; all else is empty
    assert "memory  unknown" in text and "no NVIDIA kernel driver" in text
    assert jetson(tmp_path) is None and host(tmp_path).memory is None
    gpu = attempt(lambda: look_at(Cuda(Driver(devices=0))))
    found = backends(gpu)
    assert isinstance(gpu, BackendError) and not any(each.works for each in found)
    assert all(each.fix for each in found)
    assert {trt.INSTALL[TENSORRT], trt.INSTALL[TENSORRT_RTX]} <= {each.fix for each in found}


@pytest.mark.parametrize(
    ("name", "sm", "memory", "found"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit", 87, 7.99e9, "orin-nano-8"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 87, 7.99e9, "orin-nano-8-super"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 87, 8e9, None),  # there is one of 8 GB
        ("NVIDIA Jetson AGX Orin Developer Kit", 87, 65.9e9, "agx-orin-64"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 87, 32e9, None),
        ("NVIDIA Jetson AGX Thor Developer Kit", 110, 131e9, "agx-thor-128"),
        ("NVIDIA GeForce RTX 4090", 89, 25.4e9, "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 89, 17e9, None),
        ("NVIDIA GeForce RTX 3090 Ti", 86, 25.4e9, None),
        ("NVIDIA GeForce RTX 5090", 120, 34.2e9, "rtx-5090"),
        ("NVIDIA H100 80GB HBM3", 90, 85.5e9, "h100-80"),
        ("NVIDIA H100 PCIe", 90, 85.5e9, None),
        ("NVIDIA H200", 90, 150e9, None),
    ],
)
def test_targets_are_recognised(name, sm, memory, found):
    board = matching(name, sm, memory)
    assert (board and board.name) == found


def test_every_target_can_be_recognised():
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        (RELEASE, "36.4.3", "6"),
        ("# R38 (release), REVISION: 2.0, GCID\n", "38.2.0", "7"),
        ("# R39 (release), REVISION: 1.0\n", "39.1.0", None),
        ("# R99 (release)", None, None),
    ],
)
def test_l4t_without_packages(root, release, l4t, jetpack):
    found = jetson(root({"proc/device-tree/model": ORIN_NX, "etc/nv_tegra_release": release}))
    assert (found.l4t, found.jetpack) == (l4t, jetpack)


def test_the_commands_need_no_torch_and_never_fail():
    block = "import sys, runpy\nfor name in ('torch', 'rich', 'onnx', 'triton'): sys.modules[name] = None\n"
    for module in ("engines.doctor", "engines.targets"):
        line = [sys.executable, "-c", f"{block}runpy.run_module({module!r}, run_name='__main__')"]
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0 and result.stdout and not result.stderr, result.stderr


def test_the_table_in_the_docs_is_the_command():
    assert markdown() in (ROOT / "docs" / "tensorrt.md").read_text()


# Whose packages these are.


def test_packages_of_others_with_our_names(tmp_path, monkeypatch):
    ours = {name: ["flexattention-deploy"] for name in doctor.PACKAGES}
    assert doctor.collisions(ours) == doctor.collisions({}) == []
    assert doctor.collisions({**ours, "runtime": ["flexattention_deploy", "FlexAttention-Deploy"]}) == []
    (found,) = doctor.collisions({**ours, "plugins": ["otherapp", "flexattention-deploy"]})
    assert found.startswith("package plugins: otherapp installed") and "without otherapp" in found
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "runtime", raising=False)
    (found,) = doctor.collisions(ours)
    assert found.startswith(f"package runtime: Python finds {tmp_path / 'runtime'}, not {ROOT / 'runtime'}")


# A bundle.


def test_a_bundle_is_checked_and_its_digest_told(random_model, tmp_path, capsys):
    bundle = Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "b"))
    digest = Bundle(bundle).digest
    assert doctor.main([str(bundle)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"digest  {digest}"
    assert doctor.main([str(bundle), "--expect", digest]) == 0
    assert doctor.main([str(bundle), "--expect", f"sha256:{'0' * 64}"]) == 1
    assert "expected: sha256:0000" in capsys.readouterr().err
    assert doctor.main([str(bundle), "--expect", "0"]) == 1
    (bundle / "pages.weights").write_bytes(bytes((bundle / "pages.weights").stat().st_size))
    assert doctor.main([str(bundle)]) == 1
    assert "pages.weights was changed" in capsys.readouterr().err
    assert doctor.main([str(tmp_path / "none")]) == 1
    with pytest.raises(SystemExit):
        doctor.main(["--expect", digest])
