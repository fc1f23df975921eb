"""A decoder in several engines: cut between layers, checked in the manifest, run one after the other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.bundle.folder import Bundle
from engines.bundle.geometry import pieces_of
from engines.bundle.specs import plan_io
from engines.errors import BackendError, BundleError
from engines.sizing.needs import Configuration
from engines.trt.chain import _places
from engines.trt.cut import cut
from engines.trt.options import EngineOptions
from engines.trt.tasks import tasks_of
from export.build import BuildOptions, build
from runtime import Engine
from tests.conftest import once
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.engines.manifests import edit
from tests.runtime.questions import GEOMETRY, OPTIONS, PHOTO, QUESTION, answers_alike, same


@pytest.fixture(scope="module", params=["eager", "lazy-int8"])
def plain(request, random_model, shared):
    """A bundle without engines, whose pages are projected at once, or when first selected and kept in 8 bits."""
    checkpoint, bundle = random_model("engine", GEOMETRY, tokenizer=True)
    if request.param == "eager":
        return bundle
    options = BuildOptions(checkpoint, shared / "engine-lazy-int8", precision="fp32", projection="lazy", kv="int8")
    return once(options.out, lambda _: build(options))


@pytest.fixture
def chained(plain, shared):
    """chained(N) -> the same with emulated engines of N layers."""

    def get(size):
        folder = shared / f"{plain.name}-chain-{size}"
        return once(folder, lambda folder: with_plans(plain, folder, "tensorrt", plugins=True, layers_per_engine=size))

    return get


def of(plain, size):
    """The pieces of a bundle's decoder."""
    bundle = Bundle(plain)
    g = bundle.manifest.geometry
    graph = plain / "decoder.onnx"
    io = plan_io("decoder", g, bundle.precision)
    return g, *io, cut("decoder", graph.read_bytes(), graph.name, g, size, *io, rebuild="rebuild")


@pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
def test_each_engine_has_its_layers_and_all_have_what_the_decoder_has(plain, size):
    g, inputs, outputs, pieces = of(plain, size)
    assert [(piece.begin, piece.end) for piece in pieces] == pieces_of(range(g.layers), size)
    given = [spec for piece in pieces for spec in piece.outputs]
    assert set(outputs) <= set(given) and len({spec.name for spec in given}) == len(given)
    assert set(inputs) <= {spec for piece in pieces for spec in piece.inputs} <= {*inputs, *given}
    for piece in pieces:
        caches = {spec.name for spec in piece.inputs if spec.name.startswith("past_key.")}
        assert caches == {f"past_key.{layer}" for layer in range(piece.begin, piece.end)}
    states = [spec for spec in given if spec not in outputs and spec.shape == ("batch", "steps", g.hidden)]
    assert len(states) == len(pieces) - 1


def test_a_chain_answers_as_onnxruntime_does(chained, monkeypatch):
    """With the kernels of the plugins, interpreted: slow."""
    driver = Driver()
    install(driver, monkeypatch)
    folder, options = chained(2), {"max_new_tokens": 3, "trace": True, "stop_at_eos": False}
    answers_alike(Engine(folder), Engine(folder, backend="onnxruntime"), **options)
    assert driver.counts["cuGraphInstantiate"] == 2  # a step is one graph, however many engines


@pytest.mark.parametrize("size", [1, 2])
def test_a_chain_without_plugins_answers_as_onnxruntime_does(random_model, shared, size, monkeypatch):
    driver = Driver()
    install(driver, monkeypatch)
    plain = random_model("engine", GEOMETRY, tokenizer=True)[1]
    folder = once(
        shared / f"engine-free-chain-{size}", lambda out: with_plans(plain, out, "tensorrt-rtx", layers_per_engine=size)
    )
    ours, theirs = Engine(folder), Engine(folder, backend="onnxruntime")
    for image, question, more in ((PHOTO, QUESTION, {}), (None, "hello", {}), (PHOTO, "and now?", {"page_budget": 3})):
        assert same(*(engine.generate(image, question, **OPTIONS, **more) for engine in (ours, theirs)))
    assert driver.counts["cuGraphInstantiate"] == 3  # one a request, however many engines
    with Engine(folder, slots=2) as slots:  # rows step together, and one is prefilled between
        requests = [(PHOTO, QUESTION), (None, "hello"), (PHOTO, "and now?")]
        answers = slots.generate_many(requests, max_new_tokens=6, stop_at_eos=False)
    alone = [theirs.generate(*request, max_new_tokens=6, stop_at_eos=False) for request in requests]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]


def test_hidden_states_take_turns_in_two_places(plain):
    g, inputs, outputs, pieces = of(plain, 1)
    own = {spec.name for spec in (*inputs, *outputs)}
    handed = {spec.name: spec for piece in pieces for spec in piece.outputs if spec.name not in own}
    places, total = _places(pieces, handed, {"batch": 2, "steps": g.context})
    states = [places[name] for name, spec in handed.items() if "steps" in spec.shape]
    assert len(states) == g.layers - 1 and len(set(states)) == 2
    others = [name for name, spec in handed.items() if "steps" not in spec.shape]
    assert len({places[name] for name in others}) == len(others)  # the last engine reads every selection
    assert all(place % 256 == 0 for place in places.values()) and total > 2 * 2 * g.context * g.hidden * 4


def test_what_is_no_decoder_is_not_cut(plain):
    bundle = Bundle(plain)
    g, graph = bundle.manifest.geometry, (plain / "decoder.onnx").read_bytes()
    io = plan_io("decoder", g, bundle.precision)
    vision = (plain / "vision.onnx").read_bytes()
    for model in (
        b"",
        graph[:1],
        graph[: len(graph) // 2],
        b"\xff" * 40,
        vision,
        graph.replace(b"hidden.1", b"hidden_1"),
        graph.replace(b"_key.3", b"_key.7"),  # of 5 layers
    ):
        with pytest.raises(BackendError, match=r"decoder\.onnx cannot be cut") as caught:
            cut("decoder", model, "decoder.onnx", g, 2, *io, rebuild="python export/build.py")
        assert caught.value.fix == "python export/build.py"


def test_an_engine_is_kept_for_the_gpu_whose_times_it_goes_by(random_model, tmp_path, monkeypatch):
    """TensorRT times kernels on the GPU it builds on; TensorRT-RTX needs none."""
    plain = random_model("engine", GEOMETRY, tokenizer=True)[1]
    bundle = Bundle(plain)

    def keys(backend: str, gpu: str) -> list[str]:
        driver = Driver()
        driver.cuDeviceGetName = lambda length, device: (0, gpu.encode().ljust(length, b"\0"))
        install(driver, monkeypatch)
        asked = Configuration(bundle.manifest.geometry, bundle.precision)
        return [each.key for each in tasks_of(bundle, plain, EngineOptions(backend), asked, (86,), tmp_path)]

    first = keys("tensorrt", "one")
    assert len(set(first)) == 3 and keys("tensorrt", "one") == first
    assert not set(keys("tensorrt", "other")) & set(first)
    assert keys("tensorrt-rtx", "one") == keys("tensorrt-rtx", "other")


def spoiled(plan: dict, change: str) -> None:
    """Make the record of a chain contradict itself."""
    first, second = plan["chain"][:2]
    match change:
        case "order":
            plan["chain"].reverse()
            plan["file"] = plan["chain"][0]["file"]
        case "layers":
            second["layers"] = [2, 3]
        case "short":
            plan["chain"].pop()
        case "file":
            plan["file"] = second["file"]
        case "twice":
            second["file"] = first["file"]
        case "missing":
            first["outputs"] = [spec for spec in first["outputs"] if spec["shape"] != ["batch", "steps", 32]]
        case "shape":
            first["outputs"][0]["shape"][-1] = 7
        case "symbol":
            plan["chain"] = [
                {**link, **{way: [renamed(spec) for spec in link[way]] for way in ("inputs", "outputs")}}
                for link in plan["chain"]
            ]


def renamed(spec: dict) -> dict:
    """A hidden state of another symbol."""
    return {**spec, "shape": ["rows" if size == "batch" else size for size in spec["shape"]]}


@pytest.mark.parametrize("change", ["order", "layers", "short", "file", "twice", "missing", "shape", "symbol"])
def test_a_manifest_whose_chain_contradicts_it(chained, tmp_path, change):
    folder = Path(shutil.copytree(chained(2), tmp_path / "bundle"))
    edit(folder, lambda manifest: spoiled(manifest["parts"]["decoder"]["plans"]["tensorrt"], change))
    with pytest.raises(BundleError, match=r"chain|used twice|not among"):
        Bundle(folder, verify=False)
