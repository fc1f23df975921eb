"""The rehearsal on the CPU: whole models over the emulated driver, only TensorRT itself is not there.

The same executor on a GPU, over all official runs and a thousand steps: tests/parity/gpu/test_tensorrt.py, whose tests
of features and caches run here, too. Kernels are interpreted, so steps are few; prompts of the official model, whose
prefill would take minutes, go through ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.kinds import TENSORRT
from engines.ort import OrtModel
from engines.trt.model import TrtModel
from export.build import BuildOptions, build
from tests.conftest import once
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.parity.gates import BOUNDS, GPU_BOUNDS, INT8_PAGES
from tests.parity.gpu import test_tensorrt as on_gpu
from tests.parity.requests import padded, request
from tests.runtime.questions import GEOMETRY

CASE = "small_150x200"
VARIANTS = {"eager": {}, "lazy": {"projection": "lazy"}, "lazy, int8": {"projection": "lazy", "kv": "int8"}}


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    install(driver, monkeypatch)
    return driver


@pytest.fixture(scope="session")
def engines(shared, checkpoint):
    """engines(precision, name="plain", variant="eager") -> bundle of the official small model with emulated engines."""

    def get(precision: str, name: str = "plain", variant: str = "eager"):
        out = shared / f"rehearsal-{name}-{precision}-{variant.replace(', ', '-')}"
        graphs = out.with_name(f"{out.name}-graphs")
        options = BuildOptions(checkpoint(name), graphs, precision=precision, check="none", **VARIANTS[variant])
        plain = once(graphs, lambda _: build(options))
        return once(out, lambda _: with_plans(plain, out, TENSORRT, plugins=True, prefill=False))

    return get


@pytest.fixture(scope="session")
def small(shared, random_model):
    """small(variant) -> bundle of a model whose prompts the interpreter prefills, with emulated engines."""

    def get(variant: str):
        checkpoint, _ = random_model("engine", GEOMETRY, tokenizer=True)
        out = shared / f"rehearsal-{variant.replace(', ', '-')}"
        graphs = out.with_name(f"{out.name}-graphs")
        options = BuildOptions(checkpoint, graphs, precision="fp32", check="none", **VARIANTS[variant])
        plain = once(graphs, lambda _: build(options))
        return once(out, lambda _: with_plans(plain, out, TENSORRT, plugins=True))

    return get


@pytest.mark.parametrize("case", [CASE], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_features(case, driver, engines, precision):
    """Vision against ONNX Runtime and the recording."""
    on_gpu.test_features(case, engines, TENSORRT, precision, "eager")
    model = TrtModel(Bundle(engines(precision)), TENSORRT)
    low = model.vision(case.tiles(model.geometry)[:1]).numpy(model.stream)
    assert np.abs(low[0] - case.golden["lowres_features"]).max() <= BOUNDS[precision].features


@pytest.mark.parametrize("case", [CASE], indirect=True)
def test_each_layer_selects_and_caches_what_onnxruntime_does(case, driver, engines):
    on_gpu.test_each_layer_selects_and_caches_what_onnxruntime_does(case, engines, TENSORRT, "lazy")


@pytest.mark.parametrize("case", [CASE], indirect=True)
@pytest.mark.parametrize(
    ("precision", "variant", "steps", "bound", "flips"),
    [
        ("fp32", "lazy", 2, BOUNDS["fp32"].logits, 0),
        ("fp16", "eager", 1, GPU_BOUNDS["fp16"].logits, GPU_BOUNDS["fp16"].flips),
        ("fp32", "lazy, int8", 1, INT8_PAGES.logits, INT8_PAGES.flips),
    ],
)
def test_official_steps(case, driver, engines, precision, variant, steps, bound, flips):
    """Tokens, cells and logits of the first steps."""
    model = TrtModel(Bundle(engines(precision, variant=variant)), TENSORRT)
    for step, _, result in case.replay(model, model.geometry):
        assert (result.cells()[0] != case.cells(step)).mean() <= flips
        assert np.abs(result.logits[0] - case.golden["logits"][step]).max() <= bound
        assert result.token[0] == case.golden["output_ids"][1 + step]
        if step == steps - 1:
            break


@pytest.mark.parametrize(("variant", "bound"), [("eager", 2e-4), ("lazy, int8", 2e-3)])
def test_rows_of_a_batch_in_recorded_steps(driver, small, variant, bound):
    """Two images, two prompts of different length and two page budgets; all steps but the first are one launch."""
    requests, steps = [request(GEOMETRY, seed=3, text=5, begin=3), request(GEOMETRY, seed=4, text=8, begin=6)], 5
    tiles, begin = (np.concatenate([each[part] for each in requests]) for part in (0, 2))
    each = len(tiles) // 2
    prompts, lengths, first = padded([ids for _, ids, _ in requests])
    folder, found = small(variant), []
    for model in (TrtModel(Bundle(folder), TENSORRT), OrtModel(Bundle(folder))):
        low, high = model.vision(tiles[::each]), model.vision(np.concatenate((tiles[1:each], tiles[each + 1 :])))
        image = Image(low, model.project(high, begin), begin, np.array([[1, 0], [0, 2]]))
        decoder, column = model.decoder(image, int(lengths.max()) + steps), first
        decoder.run(prompts, lengths=lengths)
        for _ in range(steps):
            step = decoder.run(column, np.array([GEOMETRY.pages, 2]))
            found.append((step.token, step.cells(), step.logits.copy()))
            column = step.token[:, None]
    for ours, theirs in zip(found[:steps], found[steps:], strict=True):
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
        assert np.abs(ours[2] - theirs[2]).max() <= bound
    assert driver.counts["cuGraphInstantiate"] == 1 and driver.counts["cuGraphLaunch"] == steps - 1
