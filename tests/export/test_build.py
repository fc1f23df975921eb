"""`python export/build.py`: what it prints and makes, and that nothing half-made stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

import export.build
import export.check
from engines.bundle.folder import Bundle
from engines.bundle.precision import FP16, FP32, INT8, PRECISIONS
from engines.bundle.writer import BundleWriter
from engines.errors import CheckpointError, ExportError, OptionError, ParityError
from engines.ort import OrtDecoder, OrtModel
from export.build import BuildOptions, build, parse_arguments
from export.check import LIMITS, limits_of, parity
from export.checkpoint.folder import Checkpoint
from export.weights.stored import stored_weights
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny
from tests.paths import ROOT

WEIGHT = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tiny())


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "export/build.py", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def test_command_line(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    result = command("--model", checkpoint, "--fp16", "--out", out, "--page-budget", 5)
    assert result.returncode == 0, result.stderr
    for text in ("decoder.weights", "memory of a request", "decode logits", "is ready"):
        assert text in result.stdout
    manifest = Bundle(out).manifest
    assert manifest.precision == "fp16" and manifest.page_budget == 5
    assert {spec.dtype for spec in manifest.parts["decoder"].graphs["traced"].inputs} == {"int64", "float16"}
    assert manifest.options["precision"] == "fp16" and manifest.options["page_budget"] == 5


def test_defaults_are_those_of_the_dataclass():
    assert parse_arguments([]) == BuildOptions()
    assert parse_arguments(["--bf16"]).precision == "bf16"
    result = command("--help")
    assert result.returncode == 0 and str(BuildOptions().model) in result.stdout and "(the default)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--fp16", "--fp32"], "not allowed"),
        (["--int3"], "--int3"),
        (["--kv", "int4"], "--kv"),
        (["--kv-cache", "int4"], "--kv-cache"),
    ],
)
def test_errors_are_messages(arguments, text):
    result = command(*arguments)
    assert result.returncode == (1 if "nowhere" in arguments else 2)  # 2: argparse's own
    assert text in result.stderr and "Traceback" not in result.stderr


def test_two_exports_are_the_same_bytes(checkpoint, tmp_path):
    """One in a process of its own: Python orders sets differently in each."""
    folders = [tmp_path / name for name in ("first", "second")]
    result = command("--model", checkpoint, "--out", folders[0], "--check", "none", PYTHONHASHSEED="1")
    assert result.returncode == 0, result.stderr
    build(BuildOptions(checkpoint, folders[1], check="none"))
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        left, right = ((folder / name).read_bytes() for folder in folders)
        if name == "bundle.json":  # it names its own folder, and its digest covers that
            left, right = (re.sub(rb'"digest": "sha256:[0-9a-f]{64}"', b"", text) for text in (left, right))
            left = left.replace(b'"first"', b'"second"')
        assert left == right, name


def test_nothing_in_the_graphs_names_this_machine(random_model):
    _, bundle = random_model("tiny", tiny())
    for path in bundle.glob("*.onnx"):
        assert str(ROOT).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"page_budget": 17}, "0 .. 16"), ({"context": 71}, "72 .. 160"), ({"context": 0}, "72 .. 160")],
)
def test_bad_knobs(checkpoint, tmp_path, options, text):
    with pytest.raises(OptionError, match=text):
        build(BuildOptions(checkpoint, tmp_path / "bundle", **options))


@pytest.mark.parametrize(
    "knobs",
    [{"precision": "nvfp4"}, {"backend": "tensorflow"}, {"check": "parrity"}, {"page_budget": True}, {"context": 9.5}],
)
def test_knobs_nobody_knows(knobs):
    with pytest.raises(OptionError, match=next(iter(knobs))):
        BuildOptions(**knobs)


def test_context_is_taken(checkpoint, tmp_path):
    manifest = build(BuildOptions(checkpoint, tmp_path / "bundle", context=72)).manifest
    assert manifest.geometry.context == manifest.options["context"] == 72
    assert (manifest.options["model"], manifest.options["out"]) == ("checkpoint", "bundle")
    assert manifest.options["page_budget"] == manifest.page_budget == 16
    assert manifest.dropped == {}


def test_an_environment_without_the_package_onnxruntime(checkpoint, tmp_path, monkeypatch):
    """onnxruntime-gpu brings the module onnxruntime, but no package of that name."""

    def version(name: str) -> str:
        if name in ("onnxruntime", "flexattention-deploy"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(export.build, "version", version)
    versions = build(BuildOptions(checkpoint, tmp_path / "bundle", check="none")).manifest.versions
    assert versions["flexattention-deploy"] == "not installed" and versions["onnxruntime"][0].isdigit()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_builds_leave_nothing(checkpoint, tmp_path, kind):
    line = [sys.executable, "export/build.py", "--model", checkpoint, "--out", tmp_path / "bundle"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not any(path.name.startswith(".bundle-") for path in tmp_path.iterdir()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(kind)
    said = process.communicate()[1]
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", ["vision", "project", "run"])
def test_a_nan_fails_the_check(random_model, monkeypatch, method, late):
    """NaN everywhere, or only in the last layer, tile batch or step: no number before it hides it."""
    checkpoint, bundle = random_model("tiny", tiny())  # before anything is broken: building it checks it, too
    owner, calls = (OrtDecoder if method == "run" else OrtModel), []
    original = getattr(owner, method)

    def broken(self, *arguments, **named):
        result = original(self, *arguments, **named)
        calls.append(method)
        if method == "run" and len(calls) > (4 if late else 0):
            result.logits[:] = np.nan
        if method == "vision" and len(calls) > late:
            result.numpy()[:] = np.nan  # a view of ONNX Runtime's own memory
        if method == "project":
            values = [name for name in result if name.startswith("page_value.")]
            for name in values[-1:] if late else values:
                result[name].numpy()[0, 0, -1] = np.nan
        return result

    monkeypatch.setattr(owner, method, broken)
    stage = {"vision": "vision features", "project": "page values", "run": "decode" if late else "prefill"}[method]
    with pytest.raises(ParityError, match=f"{stage}.* nan"):
        parity(Bundle(bundle), Checkpoint.open(checkpoint, checkpoint / "clip"))


@pytest.mark.parametrize(
    ("value", "precision", "fix"),
    [(1e6, "fp16", "--bf16"), (float("nan"), "fp16", "repair"), (float("inf"), "fp32", "repair")],
)
def test_values_the_precision_cannot_hold(tmp_path, value, precision, fix):
    weight = torch.zeros(32, 32)
    weight[3, 5] = value
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny(), overrides={WEIGHT: weight})
    with pytest.raises(ExportError, match=WEIGHT) as caught:
        build(BuildOptions(checkpoint, tmp_path / "bundle", precision=precision))
    assert fix in caught.value.fix
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_large_values_fit_bfloat16(tmp_path):
    weight = torch.randn(32, 32)
    weight[3, 5] = 1e6
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny(), overrides={WEIGHT: weight})
    build(BuildOptions(checkpoint, tmp_path / "bundle", precision="bf16", check="weights"))


def test_missing_key(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny(kv_heads=2))
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace('"num_key_value_heads": 2', '"num_key_value_heads": 4'))
    with pytest.raises(CheckpointError, match="k_proj"):
        build(BuildOptions(checkpoint, tmp_path / "bundle"))


def damage(file: Path) -> None:
    """Change one weight of a file."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x42  # sign or exponent of the last weight
    file.write_bytes(data)


@pytest.mark.parametrize("check", [parity, stored_weights])
@pytest.mark.parametrize("part", ["vision", "pages", "decoder"])
def test_a_wrong_weight_fails_the_check(random_model, tmp_path, part, check):
    checkpoint, bundle = random_model("tiny", tiny())
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    damage(folder / f"{part}.weights")
    with pytest.raises(ParityError) as caught:
        check(Bundle(folder, verify=False), Checkpoint.open(checkpoint, checkpoint / "clip"))
    first = {"vision": "vision features", "pages": "page", "decoder": "logits"}[part]
    assert (first if check is parity else f"{part}.weights") in str(caught.value)


@pytest.mark.parametrize("check", ["parity", "weights"])
def test_a_check_that_fails_fails_the_build(checkpoint, tmp_path, monkeypatch, check):
    """The decoder's weights are written with one of them changed, unnoticed."""
    original = BundleWriter.write

    def write(self, file, chunks, progress=None):
        original(self, file, chunks, progress)
        if file == "decoder.weights":
            damage(self.folder / file)

    monkeypatch.setattr(BundleWriter, "write", write)
    with pytest.raises(ParityError, match="logits" if check == "parity" else r"decoder\.weights"):
        build(BuildOptions(checkpoint, tmp_path / "bundle", precision="fp32", check=check))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_every_precision_has_limits():
    assert set(LIMITS) == set(PRECISIONS.values())
    lazy_int8 = replace(tiny(), lazy_pages=True, int8_pages=True)
    assert limits_of(FP32, tiny()).cells == 0 < limits_of(FP32, lazy_int8).cells == limits_of(FP16, tiny()).cells
    for precision, like in ((FP32, FP16), (FP16, INT8), (INT8, INT8)):  # with an int8 cache; what reads none as without
        found, own = limits_of(precision, tiny(int8_cache=True)), LIMITS[precision]
        assert found == replace(LIMITS[like], features=own.features) and found.decode >= own.decode


def test_too_little_memory_is_said_before_work_starts(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export.check, "available_bytes", lambda: 10**6)
    with pytest.raises(OptionError, match="free") as caught:
        build(BuildOptions(checkpoint, tmp_path / "bundle"))
    assert "--check weights" in caught.value.fix
    build(BuildOptions(checkpoint, tmp_path / "bundle", check="weights"))
