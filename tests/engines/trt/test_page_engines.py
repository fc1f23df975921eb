"""The projection of pages in several engines, where its weights are in codes: cut, built, opened and run."""

from __future__ import annotations

import gc
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import TENSORRT, TENSORRT_RTX, TRACED
from engines.bundle.precision import COLUMN, INT4
from engines.bundle.specs import plan_io
from engines.errors import BackendError, BundleError
from engines.residency import RESIDENCIES, SHARED
from engines.sizing.needs import PAGE_LAYERS, Configuration, engine_layers
from engines.trt import build as building
from engines.trt.build import build_engines
from engines.trt.cut import cut
from engines.trt.engine import PartEngine
from engines.trt.model import TrtModel
from engines.trt.options import EngineOptions
from export.build import BuildOptions, build
from runtime import Engine
from tests.checkpoints import write_checkpoint
from tests.conftest import once
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.engines.manifests import edit
from tests.engines.trt.rtx_layers import log_of
from tests.geometries import official, tiny
from tests.parity.requests import request as made_up
from tests.runtime.questions import GEOMETRY, OPTIONS, OTHER, PHOTO, QUESTION, same

WIDE = tiny(hidden=256, intermediate=512, head_dim=64)
PIECES = [(2, 4), (4, 5)]  # of the layers of both that read pages
CODES = {"int4": {"precision": "int4", "block_size": 32}, "int8": {"precision": "int8", "block_size": COLUMN}}
STORED = {"fp32": {"precision": "fp32"}, "int8 pages": {"precision": "fp32", "kv": "int8"}, **CODES}


@pytest.fixture(autouse=True)
def own_cache(shared, monkeypatch):
    """Timings of tests go nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))


@pytest.fixture
def wide(shared) -> Path:
    """A checkpoint."""
    return once(shared / "wide-checkpoint", lambda folder: write_checkpoint(folder, WIDE))


@pytest.fixture(params=STORED)
def stored(request, wide, shared) -> Path:
    """A bundle without engines, by how its weights or its pages are stored."""
    options = BuildOptions(wide, shared / f"wide-{request.param}", check="none", **STORED[request.param])
    return once(options.out, lambda _: build(options))


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    """A copy of `stored` to spoil."""
    return Path(shutil.copytree(stored, tmp_path / "bundle"))


# The graph.


def session(graph: bytes, folder: Path) -> ort.InferenceSession:
    """Every node as it is: what is fused may depend on what is beside it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (folder / "piece.onnx").write_bytes(graph)  # where its weights are
    return ort.InferenceSession(str(folder / "piece.onnx"), options, providers=["CPUExecutionProvider"])


def test_pieces_give_what_the_whole_gives(copy):
    """Bit for bit, for one image and for two; each the pages of its own layers, from the same features."""
    bundle = Bundle(copy)
    g, whole = bundle.manifest.geometry, bundle.graph("pages", TRACED).read_bytes()
    inputs, outputs = plan_io("pages", g, bundle.precision)
    pieces = cut("pages", whole, "pages.onnx", g, 2, inputs, outputs, rebuild="rebuild")
    assert [(piece.begin, piece.end) for piece in pieces] == PIECES
    assert sorted(spec.name for piece in pieces for spec in piece.outputs) == sorted(spec.name for spec in outputs)
    for piece in pieces:
        assert set(piece.inputs) == set(inputs)
        assert {int(spec.name.split(".")[1]) for spec in piece.outputs} == set(range(piece.begin, piece.end))
    for batch in (1, 2):
        rng = np.random.default_rng(batch)
        features = rng.standard_normal((batch * g.zoom**2, g.image_tokens, g.hidden))
        given = {
            "hires_features": features.astype(bundle.precision.dtype),
            "image_begin": np.arange(3, 3 + batch),
        }
        names = [spec.name for spec in outputs]
        expected = dict(zip(names, session(whole, copy).run(names, given), strict=True))
        for piece in pieces:
            names = [spec.name for spec in piece.outputs]
            for name, found in zip(names, session(piece.graph, copy).run(names, given), strict=True):
                assert np.array_equal(found, expected.pop(name)), name
                assert found.dtype == np.int8 or np.isfinite(found).all()
        assert not expected


def test_what_is_no_projection_of_pages_is_not_cut(copy):
    bundle = Bundle(copy)
    g, whole = bundle.manifest.geometry, bundle.graph("pages", TRACED).read_bytes()
    io = plan_io("pages", g, bundle.precision)
    vision = bundle.graph("vision", TRACED).read_bytes()
    for model in (b"", whole[:-40], vision, whole.replace(b"page_key.3", b"page_key.7")):
        with pytest.raises(BackendError, match=r"pages\.onnx cannot be cut") as caught:
            cut("pages", model, "pages.onnx", g, 2, *io, rebuild="python export/build.py")
        assert "pages" in caught.value.expected and caught.value.fix == "python export/build.py"


@pytest.mark.parametrize("backend", [TENSORRT, TENSORRT_RTX])
def test_which_weights_make_several_engines(backend):
    """Those in codes; lazy pages are projected by a kernel, from weights of the decoder that are in none."""
    c = Configuration(official(), backend=backend)
    assert engine_layers(c, "pages") is None
    for coded in (replace(c, precision=INT4), replace(c, precision=INT4, geometry=official(int8_pages=True))):
        assert engine_layers(coded, "pages") == PAGE_LAYERS
        assert engine_layers(replace(coded, geometry=official(lazy_pages=True)), "pages") is None
    assert engine_layers(replace(c, vision="int8", precision=INT4), "vision") is None


# Real engines, of TensorRT-RTX.


@pytest.fixture(params=CODES)
def coded(request, wide, shared) -> Path:
    """A bundle with engines for RTX 30, 40 and 50 whose weights are in codes; logs beside it."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    engines = EngineOptions(TENSORRT_RTX, plugins=False, keep_log=True)
    options = BuildOptions(
        wide, shared / f"page-engines-{request.param}", backend=TENSORRT_RTX, check="none", engines=engines,
        **CODES[request.param],
    )  # fmt: skip
    return once(options.out, lambda _: build(options))


def test_tensorrt_rtx_builds_them(coded):
    """An engine for every two layers, each with its own codes, and the part's record is that of one engine."""
    manifest = Bundle(coded).manifest
    g, plan = manifest.geometry, manifest.parts["pages"].plans[TENSORRT_RTX]
    assert [link.layers for link in plan.chain] == PIECES
    assert (plan.inputs, plan.outputs) == plan_io("pages", g, Bundle(coded).precision) and not plan.plugins
    assert all(set(link.inputs) == set(plan.inputs) for link in plan.chain)
    codes = manifest.files[manifest.parts["pages"].weights].bytes
    sizes = [manifest.files[file].bytes for file in plan.used]
    assert sizes[0] > codes * 2 // 3 and sizes[1] > codes // 3
    assert not manifest.parts["vision"].plans[TENSORRT_RTX].chain
    assert not manifest.parts["decoder"].plans[TENSORRT_RTX].chain
    for begin, end in PIECES:
        assert re.search(r"Total Activation Memory: \d+", log_of(coded, f"pages-{begin}-{end - 1}"))


def test_a_build_that_dies_goes_on_with_the_next_of_them(coded, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(coded, tmp_path / "bundle"))
    plain, built = building._run, list[str]()

    def run(job, label, *given, **named):
        if len(built) == 2:
            raise BackendError("killed")
        built.append(label)
        return plain(job, label, *given, **named)

    options = EngineOptions(TENSORRT_RTX, plugins=False, targets=(89,))
    monkeypatch.setattr(building, "_run", run)
    with pytest.raises(BackendError, match="killed"):
        build_engines(folder, options, quiet=True)
    assert built == ["vision", "pages-2-3"]
    built.clear()
    bundle = build_engines(folder, options, quiet=True)
    assert built == ["pages-4-4", "decoder"]
    assert [link.layers for link in bundle.manifest.parts["pages"].plans[TENSORRT_RTX].chain] == PIECES
    assert {path.name for path in folder.iterdir()} == {*bundle.manifest.files, "bundle.json"}


def test_weights_in_no_codes_are_one_engine(random_model, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    folder = Path(shutil.copytree(random_model("tiny", tiny(), "fp16")[1], tmp_path / "bundle"))
    bundle = build_engines(folder, EngineOptions(TENSORRT_RTX, plugins=False, targets=(89,)), quiet=True)
    assert not bundle.manifest.parts["pages"].plans[TENSORRT_RTX].chain


# Running them, on the emulated driver.


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    install(driver, monkeypatch)
    return driver


@pytest.fixture(scope="module", params=["fp32", "int8 pages"])
def engines(request, shared) -> Callable[[int | None], Path]:
    """engines(N) -> a bundle with emulated engines, those of pages of N layers each, whatever their weights are in;
    None: one, as of before."""
    checkpoint = once(shared / "engine-checkpoint", lambda folder: write_checkpoint(folder, GEOMETRY, tokenizer=True))
    options = BuildOptions(checkpoint, shared / f"pages-of-{request.param}", check="none", **STORED[request.param])
    plain = once(options.out, lambda _: build(options))

    def get(layers: int | None) -> Path:
        folder = shared / f"{plain.name}-{layers}"
        return once(folder, lambda folder: with_plans(plain, folder, TENSORRT, page_layers=layers))

    return get


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("layers", [1, 2, None])
def test_answers_are_those_of_onnxruntime(engines, driver, residency, layers):
    folder = engines(layers)
    ours, theirs = Engine(folder, residency=residency), Engine(folder, backend="onnxruntime")
    for image, question, more in ((PHOTO, QUESTION, {}), (OTHER, "and now?", {"page_budget": 3}), (None, "hello", {})):
        assert same(*(engine.generate(image, question, **OPTIONS, **more) for engine in (ours, theirs)))


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_two_images_at_once_are_those_of_one_engine(engines, driver, residency):
    """The same pages, whatever lay where they are written."""
    requests = [made_up(GEOMETRY, seed=seed, begin=begin) for seed, begin in ((3, 3), (4, 6))]
    tiles, begin = (np.concatenate([each[index] for each in requests]) for index in (0, 2))
    hires = np.concatenate([each[0][1:] for each in requests])
    found = []
    for layers in (2, None):
        model = TrtModel(Bundle(engines(layers)), TENSORRT, residency=residency)
        pages = model.project(model.vision(hires), begin)
        found.append({name: array.numpy(model.stream) for name, array in pages.items()})
    assert len(tiles) == 2 * (1 + GEOMETRY.zoom**2) and found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.raises(BackendError, match=r"the pages engine for batch_tiles = 27|for batch = 3"):
        model.project(model.vision(np.concatenate([hires, hires[: GEOMETRY.zoom**2]])), np.array([3, 3, 3]))


def test_one_is_in_memory_at_a_time(engines, driver, monkeypatch):
    """With "shared": each is opened for its layers, and closed with its scratch memory before the next; after them the
    process holds what it holds with one engine."""
    alive, most, plain = set[int](), [0], PartEngine.__init__

    def opened(self, trt, cuda, bundle, part, backend, plan) -> None:
        plain(self, trt, cuda, bundle, part, backend, plan)
        if part == "pages":
            alive.add(id(self))
            most[0] = max(most[0], len(alive))
            weakref.finalize(self, alive.discard, id(self))

    monkeypatch.setattr(PartEngine, "__init__", opened)
    held = []
    for layers, residency, expected in ((1, "all", 3), (1, SHARED, 1), (None, SHARED, 1)):
        most[0] = 0
        model = TrtModel(Bundle(engines(layers)), TENSORRT, residency=residency)
        tiles, _, begin = made_up(GEOMETRY, seed=3)
        with model.held("pages"):
            pages = model.project(model.vision(tiles[1:]), begin)
        gc.collect()
        assert most[0] == expected and len(alive) == (expected if residency == "all" else 0)
        held.append(driver.memory.bytes())
        del model, pages
        gc.collect()
    assert held[1] == held[2]


def test_with_slots(engines, driver):
    folder = engines(2)
    alone, slots = Engine(folder), Engine(folder, slots=2, residency=SHARED)
    answers = slots.generate_many([(PHOTO, QUESTION), (OTHER, "and now?"), (PHOTO, "what?")], **OPTIONS)
    for answer, request in zip(answers, [(PHOTO, QUESTION), (OTHER, "and now?"), (PHOTO, "what?")], strict=True):
        assert same(answer, alone.generate(*request, **OPTIONS))


# Manifests.


def spoiled(manifest: dict, change: str) -> None:
    """Make the record of the engines contradict itself."""
    plan = manifest["parts"]["pages"]["plans"][TENSORRT]
    match change:
        case "begin":
            plan["chain"][0]["layers"] = [0, 4]
        case "short":
            plan["chain"].pop()
        case "twice":
            plan["chain"][1]["outputs"] = plan["chain"][0]["outputs"]
        case "vision":
            vision = manifest["parts"]["vision"]["plans"][TENSORRT]
            vision["chain"] = [{key: vision[key] for key in ("file", "inputs", "outputs")} | {"layers": [0, 5]}]


@pytest.mark.parametrize("change", ["begin", "short", "twice", "vision"])
def test_a_manifest_whose_engines_contradict_it(engines, tmp_path, change):
    folder = Path(shutil.copytree(engines(2), tmp_path / "bundle"))
    edit(folder, lambda manifest: spoiled(manifest, change))
    with pytest.raises(BundleError, match="chain"):
        Bundle(folder, verify=False)
