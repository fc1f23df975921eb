"""TensorRT engines, built by TensorRT-RTX on this CPU, and everything that can go wrong on the way."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.bundle.folder import Bundle, sha256
from engines.bundle.kinds import PARTS, TENSORRT, TENSORRT_RTX, TRACED
from engines.bundle.manifest import File
from engines.bundle.specs import plan_io
from engines.bundle.writer import write_manifest
from engines.errors import BackendError, BundleError, FlexError, KernelError, OptionError
from engines.progress import print_log
from engines.sizing.builder import builder_bytes
from engines.trt import build as building
from engines.trt import library as trt
from engines.trt.build import attributes, build_engines
from engines.trt.options import EngineOptions, boards_of, command, parse_targets
from engines.trt.tasks import profiles, timing_cache
from engines.trt.worker import Job
from export.build import BuildOptions, build, parse_arguments
from plugins.artifacts import Artifacts
from plugins.registry import kernels_of_model, ops_of_model
from tests.conftest import once
from tests.engines.manifests import edit
from tests.engines.trt.rtx_layers import log_of, plugins_of
from tests.geometries import tiny
from tests.paths import ROOT

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
SMS = (86, 89, 120)


@pytest.fixture(autouse=True)
def own_cache(shared, monkeypatch):
    """Timings of tests go nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))


@pytest.fixture
def built(shared, random_model) -> Path:
    """A bundle with engines for RTX 30, 40 and 50, whose decoder runs the plugins; logs beside it."""
    checkpoint, _ = random_model("tiny", tiny(), "fp16")
    options = BuildOptions(
        model=checkpoint,
        out=shared / "tiny-rtx",
        backend=TENSORRT_RTX,
        check="none",
        engines=EngineOptions(TENSORRT_RTX, keep_log=True),
    )
    return once(options.out, lambda _: build(options))


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """A copy of `built` to spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def job(bundle: Path, part: str = "vision", **changes) -> Job:
    """The job that builds a part."""
    opened = Bundle(bundle, verify=False)
    manifest, options = opened.manifest, EngineOptions(TENSORRT_RTX)
    inputs, outputs = plan_io(part, manifest.geometry, opened.precision)
    usual = Job(
        backend=TENSORRT_RTX, graph=str(bundle / manifest.parts[part].graphs[TRACED].file),
        weights=str(bundle), plan=str(bundle.parent / "test.plan"), kernels=str(bundle / manifest.kernels), sms=SMS,
        inputs=inputs, outputs=outputs, profiles=profiles(part, manifest.geometry, options), workspace=None,
        optimization_level=3, timing_cache=None, rebuild="python export/build.py",
    )  # fmt: skip
    return replace(usual, **changes)


def run(job: Job, log: Path) -> None:
    building._run(job, "vision", log, needed=builder_bytes("vision", 10**9), keep_log=False, quiet=True)


def listing(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


# What a build makes.


def test_every_flex_node_is_a_plugin_of_the_engine(built):
    g = tiny()
    layers = plugins_of(log_of(built, "decoder"))
    assert len(layers) == g.layers + len(g.selecting_layers)
    assert layers.count("cached_attention") == g.start_layer + 1
    assert layers.count("hierarchical_attention") == len(g.reading_layers)
    assert layers.count("select_pages") == len(g.selecting_layers)


def test_manifest_says_what_the_engines_are(built):
    bundle = Bundle(built)
    manifest, version = bundle.manifest, trt.load(TENSORRT_RTX).__version__
    assert manifest.backend == TENSORRT_RTX
    assert manifest.options[TENSORRT_RTX]["plugins"] is True
    for part in PARTS:
        plan = manifest.parts[part].plans[TENSORRT_RTX]
        assert (plan.tensorrt, plan.cuda, plan.sms) == (version, trt.cuda_version(TENSORRT_RTX), SMS)
        assert plan.plugins == (part == "decoder")
        assert plan.kernels == (manifest.files["kernels.zip"].sha256 if plan.plugins else None)
        assert plan.file in manifest.files
    caches = [spec for spec in manifest.parts["decoder"].plans[TENSORRT_RTX].inputs if spec.name.startswith("past_key")]
    assert {spec.shape[2] for spec in caches} == {tiny().context}


def test_the_plan_holds_attributes_and_the_kernels_of_its_targets(built):
    manifest = Bundle(built).manifest
    plan = (built / manifest.parts["decoder"].plans[TENSORRT_RTX].file).read_bytes()
    artifacts = Artifacts.read(built / manifest.kernels)
    graph = (built / "decoder.onnx").read_bytes()
    used = [op for op in ops_of_model(attributes(manifest.geometry)) if op.name.encode() in graph]
    assert len(used) >= 3
    for op in used:
        assert artifacts.subset(op.kernels("float16"), SMS).to_bytes() in plan, op.name  # whole, to the last byte
        assert all(name.encode() in plan for name in op.attributes)
    other = artifacts.get(used[0].kernels("float16")[0])
    assert other.cubins[86] in plan and other.cubins[87] not in plan


def test_a_second_build_is_the_same_but_for_the_order_of_tensors(copy):
    """TensorRT-RTX orders the tensors of a plan by their addresses in its process: about one build in ten differs."""
    found = []
    for _ in range(2):
        manifest = build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True).manifest
        plans = [part.plans[TENSORRT_RTX] for part in manifest.parts.values()]
        sizes = [manifest.files[plan.file].bytes for plan in plans]
        others = {name: file for name, file in manifest.files.items() if name not in {plan.file for plan in plans}}
        found.append((sizes, others, [replace(plan, file="") for plan in plans]))
    assert found[0] == found[1]


def test_new_engines_replace_the_old(copy):
    bundle = build_engines(
        copy, EngineOptions(TENSORRT_RTX, targets=(89,), timing_cache=False, workspace=64), quiet=True
    )
    assert {plan.sms for part in bundle.manifest.parts.values() for plan in part.plans.values()} == {(89,)}
    assert {path.name for path in copy.iterdir()} == {*Bundle(copy).manifest.files, "bundle.json"}
    assert not copy.with_name(f"{copy.name}.decoder.{TENSORRT_RTX}.log").exists()


def test_engines_of_some_layers(copy, caplog):
    """All layers' plugins are in one of them, none holds another's weights, and the whole is what one engine is."""
    one = Bundle(copy).manifest.parts["decoder"].plans[TENSORRT_RTX]
    bundle = build_engines(copy, EngineOptions(TENSORRT_RTX, layers_per_engine=2, keep_log=True), quiet=True)
    g, plan = tiny(), bundle.manifest.parts["decoder"].plans[TENSORRT_RTX]
    assert [link.layers for link in plan.chain] == [(0, 2), (2, 4), (4, 5)]
    assert (plan.inputs, plan.outputs, plan.profiles) == (one.inputs, one.outputs, one.profiles)
    logs = [log_of(copy, f"decoder-{begin}-{end - 1}") for begin, end in (link.layers for link in plan.chain)]
    found = [plugins_of(log) for log in logs]
    assert [layers.count("cached_attention") for layers in found] == [2, 0, 0]
    assert [layers.count("hierarchical_attention") for layers in found] == [0, 2, 1]
    assert sum(layers.count("select_pages") for layers in found) == len(g.selecting_layers)
    assert {path.name for path in copy.iterdir()} == {*bundle.manifest.files, "bundle.json"}
    assert bundle.manifest.options[TENSORRT_RTX]["layers_per_engine"] == 2
    back = build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True)
    assert not back.manifest.parts["decoder"].plans[TENSORRT_RTX].chain
    assert {path.name for path in copy.iterdir()} == {*back.manifest.files, "bundle.json"}


def test_engines_of_some_layers_without_plugins(copy):
    options = EngineOptions(TENSORRT_RTX, plugins=False, layers_per_engine=2, targets=(89,))
    plan = build_engines(copy, options, quiet=True).manifest.parts["decoder"].plans[TENSORRT_RTX]
    assert [link.layers for link in plan.chain] == [(0, 2), (2, 4), (4, 5)] and not plan.plugins
    Bundle(copy)


def test_a_decoder_that_cannot_be_cut_is_told_before_anything_is_built(copy, monkeypatch):
    graph = copy / Bundle(copy).manifest.parts["decoder"].graphs[TRACED].file
    graph.write_bytes(graph.read_bytes().replace(b"_key.3", b"_key.7"))
    monkeypatch.setattr(building, "_engine", lambda task, *given, **named: pytest.fail(f"built {task.label}"))
    with pytest.raises(BackendError, match=r"cannot be cut between its layers: layer 7 of 5"):
        build_engines(copy, EngineOptions(TENSORRT_RTX, layers_per_engine=2), quiet=True)


def test_a_build_that_dies_goes_on_where_it_was(copy, monkeypatch, caplog):
    """Finished engines are kept, and taken when they are whole and of the same make; then they go."""
    options, run_it, unfinished = EngineOptions(TENSORRT_RTX, layers_per_engine=2), building._run, []
    folder = copy.with_name(f"{copy.name}.{TENSORRT_RTX}.unfinished")

    def dying(job, label, *given, **named):
        if label == "decoder-2-3":
            raise BackendError("killed")
        unfinished.append(label)
        return run_it(job, label, *given, **named)

    before = listing(copy)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(building, "_run", dying)
        with pytest.raises(BackendError, match="killed"):
            build_engines(copy, options, quiet=True)
        assert unfinished == ["vision", "pages", "decoder-0-1"] and listing(copy) == before
        assert f"3 finished engines are kept in {folder}" in caplog.text
        assert folder.stat().st_mode & 0o077 == 0
        kept = sorted(folder.glob("*.plan"), key=lambda path: path.stat().st_size)
        kept[0].write_bytes(kept[0].read_bytes()[:-1])  # one is not whole any more, another has no record
        kept[1].with_suffix(".json").write_text("{}")
        unfinished.clear()
        with pytest.raises(BackendError, match="killed"):
            build_engines(copy, options, quiet=True)
        assert len(unfinished) == 2
        unfinished.clear()
        with pytest.raises(BackendError, match="killed"):  # of other engines, none is taken
            build_engines(copy, replace(options, optimization_level=2), quiet=True)
        assert len(unfinished) == 3
    built = []
    monkeypatch.setattr(
        building, "_run", lambda job, label, *a, **b: built.append(label) or run_it(job, label, *a, **b)
    )
    bundle = build_engines(copy, options, quiet=True)
    assert built == ["decoder-2-3", "decoder-4-4"] and not folder.exists()
    assert len(Bundle(copy).manifest.parts["decoder"].plans[TENSORRT_RTX].chain) == 3
    assert {path.name for path in copy.iterdir()} == {*bundle.manifest.files, "bundle.json"}


def test_a_folder_of_finished_engines_that_is_not_ours(copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy.with_name(f"{copy.name}.{TENSORRT_RTX}.unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match="no folder of this user's") as caught:
        build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True)
    assert caught.value.fix == "move it away"


def test_a_damaged_timing_cache_is_no_cache(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing_cache(TENSORRT_RTX, SMS)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a cache")
    run(job(copy, timing_cache=str(path)), tmp_path / "log")
    assert path.read_bytes() != b"not a cache"


def test_a_board_needs_no_torch_onnx_or_triton(copy, tmp_path):
    heavy = ("torch", "transformers", "triton", "onnx", "onnx_ir", "onnxscript", "rich", "onnxruntime", "polygraphy")
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in heavy)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}")  # in the builder's process, too
    result = subprocess.run(
        [sys.executable, "-m", "engines.build", str(copy), "--backend", TENSORRT_RTX, "--target", "sm_86"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert Bundle(copy).manifest.parts["decoder"].plans[TENSORRT_RTX].sms == (86,)
    cost = re.compile(r"(\w+): \d+ s, \d+\.\d\d GB memory, plan \d+\.\d MB")
    told = [match[1] for line in result.stdout.splitlines() if (match := cost.fullmatch(line))]
    assert told == ["vision", "pages", "decoder"]


def test_a_bundle_for_a_board_is_prepared_and_says_so(random_model, tmp_path, capsys):
    from rich.console import Console

    checkpoint, _ = random_model("tiny", tiny(), "fp16")
    arguments = ["--model", str(checkpoint), "--backend", TENSORRT, "--target", "sm_87", "--check", "none"]
    bundle = build(parse_arguments([*arguments, "--out", str(tmp_path / "jetson")]), Console(soft_wrap=True))
    assert Artifacts.read(bundle.file(bundle.manifest.kernels)).sms == (87,)
    assert bundle.manifest.backend == TENSORRT and not bundle.manifest.parts["decoder"].plans
    said = capsys.readouterr().out
    assert "no engines yet" in said
    assert "python -m engines.build BUNDLE --backend tensorrt" in said


def test_the_plugin_free_engine_has_fused_kernels_in_place_of_plugins(copy):
    bundle = build_engines(copy, EngineOptions(TENSORRT_RTX, plugins=False, keep_log=True), quiet=True)
    plan = bundle.manifest.parts["decoder"].plans[TENSORRT_RTX]
    assert not plan.plugins and plan.kernels is None
    log = log_of(copy, "decoder")
    assert not plugins_of(log)
    fused = set(re.findall(r"__myl_(\w+?)_myl\d", log))
    assert "SiluMul" in fused
    assert any("MaxrSubExpSumDiv" in name for name in fused), fused  # a softmax in one kernel
    assert b"CachedAttention" not in bundle.file(plan.file).read_bytes()


def test_progress_only_grows_and_reaches_the_end(built, tmp_path, monkeypatch):
    from contextlib import contextmanager

    shown = []

    @contextmanager
    def record(title, quiet):
        yield shown.append

    monkeypatch.setattr(building, "progress", record)
    run(job(built, "decoder"), tmp_path / "log")
    assert shown and shown == sorted(shown) and shown[0] >= 0 and shown[-1] <= 1


def test_the_library_logs_and_command_lines_print_it(copy, monkeypatch, capsys):
    logger, said = logging.getLogger("engines"), logging.getLogger("engines.trt.build")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(building, "available_bytes", lambda: 0)
    monkeypatch.setattr(building, "_run", lambda *given, **named: pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception, match="enough"):
        build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True)
    assert capsys.readouterr().out == ""
    print_log()
    print_log()  # once is enough
    with pytest.raises(pytest.fail.Exception, match="enough"):
        build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True)
    said.info("and this")
    said.debug("not this")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1] == "and this"
    assert re.fullmatch(r"vision: needs about \d+\.\d GB of memory, 0\.0 GB are free: it may fail", lines[0])


class Gpu:
    """A driver with one Orin."""

    sm = 87


def test_tensorrt_builds_for_the_gpu_of_the_machine(monkeypatch):
    monkeypatch.setitem(sys.modules, "engines.cuda", SimpleNamespace(Cuda=Gpu))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    assert building.sms_to_build(EngineOptions(TENSORRT)) == (87,)
    assert building.elsewhere(EngineOptions(TENSORRT, targets=(87,))) is None
    assert "this machine's GPU is sm_87" in building.elsewhere(EngineOptions(TENSORRT, targets=(110,)))
    with pytest.raises(OptionError, match="target sm_110, this machine's GPU is sm_87") as caught:
        building.sms_to_build(EngineOptions(TENSORRT, targets=(110,)))
    assert "python -m engines.build BUNDLE --backend tensorrt" in caught.value.fix
    decode, prefill = profiles("decoder", tiny(), EngineOptions(TENSORRT))
    assert decode.sizes["steps"] == (1, 1, 1)
    assert prefill.sizes["steps"] == (1, 128, 160)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(BackendError, match=r"TensorRT 8\.6\.1"):
        trt.load(TENSORRT)


# What goes wrong.


def test_a_graph_whose_plugins_are_not_registered(built, tmp_path):
    with pytest.raises(BackendError, match=r"CachedAttention.*not registered") as caught:
        run(job(built, "decoder", kernels=None), tmp_path / "log")
    assert "register" in caught.value.fix
    assert str(tmp_path / "log") in caught.value.found and (tmp_path / "log").stat().st_size


def test_a_timing_cache_that_cannot_be_written(copy, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackendError, match="timing cache") as caught:
        run(job(copy, timing_cache=str(tmp_path / "file" / "cache")), tmp_path / "log")
    assert "--no-timing-cache" in caught.value.fix


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_truncated_graph(copy, tmp_path, size):
    graph, whole = copy / "vision.onnx", job(copy)
    graph.write_bytes(graph.read_bytes()[:size])
    with pytest.raises(BackendError, match=r"vision\.onnx") as caught:  # the builder itself, past the bundle's checks
        run(whole, tmp_path / "log")
    assert caught.value.fix == "python export/build.py"
    with pytest.raises(BundleError, match=f"has {size} bytes"):
        build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True)


def test_missing_weights(copy, tmp_path):
    whole = job(copy)
    (copy / "vision.weights").write_bytes(b"short")
    with pytest.raises(BackendError, match="initializer"):
        run(whole, tmp_path / "log")


@pytest.mark.parametrize(
    ("ending", "message", "fix"),
    [
        ("kill -KILL $$", "memory runs out", "smaller --context"),
        ("kill -SEGV $$", "SIGSEGV", "--optimization-level"),
        ("kill -ABRT $$", "SIGABRT", "--optimization-level"),
        ("echo nonsense >&2; exit 3", "status 3: nonsense", "log"),
    ],
)
def test_a_builder_that_dies(copy, tmp_path, monkeypatch, ending, message, fix):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{ending}\n")
    program.chmod(0o755)
    monkeypatch.setattr(building.child.sys, "executable", str(program))
    before = listing(copy)
    with pytest.raises(BackendError, match=message) as caught:
        build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True)
    assert fix in caught.value.fix
    assert listing(copy) == before
    assert not [path for path in copy.parent.iterdir() if path.name.startswith(".")]
    assert copy.with_name(f"{copy.name}.vision.{TENSORRT_RTX}.log").exists()


def test_logs_and_caches_are_written_over_no_link(copy, tmp_path, monkeypatch):
    """Whoever may write beside a bundle, or where the timings lie, knows these names: what they link to stays."""
    (tmp_path / "mine").write_text("mine")
    log = copy.with_name(f"{copy.name}.vision.{TENSORRT_RTX}.log")
    log.symlink_to(tmp_path / "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = timing_cache(TENSORRT_RTX, SMS)
    cache.parent.mkdir(parents=True)
    cache.symlink_to(tmp_path / "mine")
    run(job(copy, timing_cache=str(cache)), log)  # no log is kept: the link goes
    assert not log.is_symlink() and not cache.is_symlink() and cache.stat().st_size > 4
    log.symlink_to(tmp_path / "mine")
    with pytest.raises(BackendError, match=r"log: "):
        run(job(copy, kernels=None, graph=str(copy / "none.onnx")), log)
    assert not log.is_symlink() and log.is_file()
    cache.with_name(f"{cache.name}.lock").unlink()
    cache.with_name(f"{cache.name}.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(BackendError, match="timing cache"):
        run(job(copy, timing_cache=str(cache)), tmp_path / "log")
    assert (tmp_path / "mine").read_text() == "mine"
    log.unlink()
    log.mkdir()
    (log / "file").write_text("mine")
    with pytest.raises(BackendError, match=r"no log: .* cannot be written"):
        run(job(copy, kernels=None, graph=str(copy / "none.onnx")), log)


def test_a_builder_killed_while_it_works(built, tmp_path, monkeypatch):
    start = subprocess.Popen

    def kill_it(*arguments, **options):
        process = start(*arguments, **options)
        os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(building.subprocess, "Popen", kill_it)
    with pytest.raises(BackendError, match="signal 9") as caught:
        run(job(built), tmp_path / "log")
    assert "2.15x the weights and more: 2.5 GB" in caught.value.expected


def test_an_error_of_the_builders_process_keeps_its_class(built, tmp_path):
    (tmp_path / "kernels.zip").write_bytes(b"no zip")
    with pytest.raises(KernelError, match=r"no whole file of compiled kernels(.|\n)*log: .*log") as caught:
        run(job(built, "decoder", kernels=str(tmp_path / "kernels.zip")), tmp_path / "log")
    assert caught.value.fix == "copy it again, or build it again: python export/build.py"


def test_a_full_disk_at_the_end_leaves_the_old_engines(copy, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = listing(copy)
    monkeypatch.setattr(building, "write_manifest", full)
    with pytest.raises(BackendError, match="No space left"):
        build_engines(copy, EngineOptions(TENSORRT_RTX, targets=(89,)), quiet=True)
    assert listing(copy) == before


def test_kernels_missing_for_a_target(copy):
    manifest = Bundle(copy).manifest
    kernels = kernels_of_model(attributes(manifest.geometry), "float16")
    few = Artifacts.read(copy / "kernels.zip").subset(kernels, (86,)).to_bytes()
    (copy / "kernels.zip").write_bytes(few)
    file = File(len(few), sha256(copy / "kernels.zip"))
    parts = {name: replace(part, plans={}) for name, part in manifest.parts.items()}
    write_manifest(copy, replace(manifest, files={**manifest.files, "kernels.zip": file}, parts=parts))
    before = listing(copy)
    with pytest.raises(KernelError, match=f"{copy}: no compiled kernels for SM 89") as caught:
        build_engines(copy, EngineOptions(TENSORRT_RTX, targets=(89,)), quiet=True)
    assert f"--out {copy} --fp16 " in caught.value.fix
    assert "--backend tensorrt-rtx --target sm_89 " in caught.value.fix
    assert listing(copy) == before


def test_a_bundle_without_kernels_or_plugin_free_graph(random_model):
    _, bundle = random_model("tiny", tiny(), "fp16")
    with pytest.raises(BundleError, match="no compiled kernels") as caught:
        build_engines(bundle, EngineOptions(TENSORRT_RTX), quiet=True)
    assert "--backend tensorrt-rtx" in caught.value.fix


def spoiled(manifest: dict, change: str) -> None:
    """Make bundle.json contradict itself."""
    decoder = manifest["parts"]["decoder"]
    plan = decoder["plans"][TENSORRT_RTX]
    match change:
        case "backend":
            decoder["plans"]["cuda"] = decoder["plans"].pop(TENSORRT_RTX)
        case "shape":
            plan["inputs"][0]["shape"][1] = 7
        case "sms":
            plan["sms"] = []
        case "profiles":
            plan["profiles"] = []
        case "sizes":
            del plan["profiles"][0]["sizes"]["steps"]
        case "order":
            plan["profiles"][0]["sizes"]["steps"] = [4, 2, 9]
        case "kernels":
            plan["kernels"] = "0" * 64
        case "plugins":
            manifest["parts"]["vision"]["plans"][TENSORRT_RTX]["plugins"] = True
        case "part":
            manifest["parts"]["pages"]["plans"] = {}


@pytest.mark.parametrize(
    "change", ["backend", "shape", "sms", "profiles", "sizes", "order", "kernels", "plugins", "part"]
)
def test_a_manifest_whose_engines_contradict_it(copy, change):
    edit(copy, lambda manifest: spoiled(manifest, change))
    with pytest.raises(BundleError, match="engine"):
        Bundle(copy)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("sm_87", "--backend tensorrt"),
        ("sm_110", "--backend tensorrt"),
        ("sm_86,sm_90", "--backend tensorrt"),
        ("sm_75", ""),
        ("sm_12", ""),
        ("sm_86,sm_86", ""),
        ("banana", ""),
        ("", ""),
        ("sm_86,", ""),
        ("1e2", ""),
    ],
)
def test_targets_that_do_not_exist(text, fix):
    with pytest.raises(OptionError, match="target") as caught:
        EngineOptions(TENSORRT_RTX, targets=parse_targets(text))
    assert "sm_86" in caught.value.expected
    assert fix in (caught.value.fix or "")


def test_targets_as_people_write_them():
    assert parse_targets("sm_86, SM89,12.0") == (86, 89, 120)
    assert parse_targets("orin-nano-8, orin-nx-16") == (87,) and boards_of("orin-nano-8, orin-nx-16")[1] == "orin-nx-16"
    assert parse_targets("sm_89,rtx-3090,rtx-4090") == (89, 86) and boards_of("sm_89,rtx-3090") == ("rtx-3090",)


@pytest.mark.parametrize(
    "knobs",
    [
        {"workspace": 0},
        {"batch": 0},
        {"optimization_level": 9},
        {"batch": True},
        {"workspace": 1.5},
        {"layers_per_engine": 0},
        {"layers_per_engine": -8},
    ],
)
def test_knobs_are_checked(knobs):
    ((knob, value),) = knobs.items()
    with pytest.raises(OptionError, match=knob) as caught:
        EngineOptions(TENSORRT_RTX, **knobs)
    if type(value) is int:  # the fix names a number that is taken
        (nearest,) = re.findall(r"^use (\d+)", caught.value.fix)
        assert getattr(EngineOptions(TENSORRT_RTX, **{knob: int(nearest)}), knob) == int(nearest)


def test_numbers_of_numpy_are_kept_as_pythons():
    """A workspace of 200 MiB in NumPy's eight bits would be 0 bytes."""
    given = EngineOptions(TENSORRT_RTX, targets=(np.int64(86),), workspace=np.uint8(200), batch=np.int32(2))
    kept = (given.workspace, given.batch, given.optimization_level, *given.targets)
    assert kept == (200, 2, 3, 86) and {type(value) for value in kept} == {int}
    assert given.workspace << 20 == 200 << 20
    for odd in (True, np.True_, np.float32(2), "86"):
        with pytest.raises(OptionError):
            EngineOptions(TENSORRT_RTX, targets=(odd,))


def test_knobs_of_engines_are_not_ignored_for_other_backends():
    with pytest.raises(OptionError, match="--target with --backend onnxruntime"):
        parse_arguments(["--target", "sm_86"])
    with pytest.raises(OptionError, match="--plugins"):
        parse_arguments(["--no-plugins"])
    with pytest.raises(OptionError, match="engines for the backend onnxruntime"):
        BuildOptions(engines=EngineOptions(TENSORRT))


def test_the_rebuild_command_is_the_options():
    options = EngineOptions(TENSORRT_RTX, plugins=False, targets=(86, 120), workspace=512, batch=2)
    assert command("B B", options).startswith("python -m engines.build 'B B' --backend")
    assert command("B", options) == (
        "python -m engines.build B --backend tensorrt-rtx --no-plugins --target sm_86,sm_120 --workspace 512 --batch 2"
    )


def test_a_backend_that_is_not_installed(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="not installed") as caught:
        build_engines(copy, EngineOptions(TENSORRT_RTX), quiet=True)
    assert caught.value.fix == "pip install tensorrt-rtx"
    with pytest.raises(BackendError, match="not installed") as caught:
        trt.load(TENSORRT)
    assert "pip install tensorrt" in caught.value.fix and "JetPack" in caught.value.fix


def test_the_link_that_the_wheel_of_rtx_lacks(tmp_path, monkeypatch):
    class Found:
        submodule_search_locations = [str(tmp_path)]  # noqa: RUF012

    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"library")
    monkeypatch.setattr(trt.importlib.util, "find_spec", lambda name: Found)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        with pytest.raises(BackendError, match="Permission denied") as caught:
            trt._require_library_name(trt.load(TENSORRT_RTX))
    link = tmp_path / "libtensorrt_rtx.so"
    assert caught.value.fix == f"sudo ln -s libtensorrt_rtx.so.1 {link}"
    for _ in range(2):
        trt._require_library_name(trt.load(TENSORRT_RTX))
        assert link.read_bytes() == b"library"


# Opening an engine.


def open_decoder(bundle: Path, sm: int = 86, **changes) -> FlexError:
    plan = Bundle(bundle, verify=False).manifest.parts["decoder"].plans[TENSORRT_RTX]
    with pytest.raises(BackendError) as caught:
        trt.deserialise(
            trt.load(TENSORRT_RTX),
            bundle / plan.file,
            replace(plan, **changes),
            sm,
            rebuild=lambda: "python -m engines.build B",
        )
    return caught.value


def test_an_engine_of_another_version(built):
    error = open_decoder(built, tensorrt="1.0")
    assert "built by tensorrt_rtx 1.0, installed is" in error.found
    assert error.fix == "python -m engines.build B"


def test_an_engine_for_another_gpu(built):
    error = open_decoder(built, sm=80)
    assert "built for sm_86, sm_89, sm_120, this GPU is sm_80" in error.found
    assert error.fix == "python -m engines.build B"


@pytest.mark.parametrize("size", [0, 20, 64, 1000, 10**6])
def test_a_truncated_engine(copy, size):
    plan = Bundle(copy).manifest.parts["decoder"].plans[TENSORRT_RTX]
    path = copy / plan.file
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BundleError, match=f"has {size} bytes"):
        Bundle(copy, verify=False)
    with pytest.raises(BackendError, match="cannot open") as caught:  # TensorRT itself, past the bundle's checks
        trt.deserialise(trt.load(TENSORRT_RTX), path, plan, 86, rebuild=lambda: "python -m engines.build B")
    assert caught.value.fix == "python -m engines.build B"
