"""The rehearsal on the CPU: whole models over the emulated driver, only TensorRT itself is not there.

The same executor on a GPU, over all official runs and a thousand steps: tests/parity/gpu/test_tensorrt.py. Kernels are
interpreted, so steps are few; prompts of the official model, whose prefill would take minutes, go through ONNX Runtime.
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
from tests.parity.gates import BOUNDS, GPU_BOUNDS
from tests.parity.requests import padded, request
from tests.parity.tensorrt.beside import require_features, require_layers
from tests.runtime.questions import GEOMETRY

CASE = "small_150x200"


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    install(driver, monkeypatch)
    return driver


@pytest.fixture(scope="session")
def engines(shared, checkpoint):
    """engines(precision) -> bundle of the official small model with emulated engines."""

    def get(precision: str):
        out = shared / f"rehearsal-{precision}"
        graphs = out.with_name(f"{out.name}-graphs")
        options = BuildOptions(checkpoint("plain"), graphs, precision=precision, check="none")
        plain = once(graphs, lambda _: build(options))
        return once(out, lambda _: with_plans(plain, out, TENSORRT, plugins=True, prefill=False))

    return get


@pytest.fixture(scope="session")
def small(shared, random_model):
    """A bundle of a model whose prompts the interpreter prefills, with lazily projected pages in 8 bits and emulated
    engines."""
    checkpoint, _ = random_model("engine", GEOMETRY, tokenizer=True)
    graphs = shared / "rehearsal-small-graphs"
    options = BuildOptions(checkpoint, graphs, precision="fp32", projection="lazy", kv="int8", check="none")
    plain = once(graphs, lambda _: build(options))
    return once(shared / "rehearsal-small", lambda folder: with_plans(plain, folder, TENSORRT, plugins=True))


@pytest.mark.parametrize("case", [CASE], indirect=True)
def test_features(case, driver, engines):
    require_features(case, Bundle(engines("fp32")), TENSORRT, BOUNDS["fp32"])


@pytest.mark.parametrize("case", [CASE], indirect=True)
def test_each_layer_selects_and_caches_what_onnxruntime_does(case, driver, engines):
    require_layers(case, Bundle(engines("fp32")), TENSORRT, BOUNDS["fp32"])


@pytest.mark.parametrize("case", [CASE], indirect=True)
def test_float16(case, driver, engines):
    """The cells, logits and token of the first official step; in float32 test_plugins.py has more."""
    model, bounds = TrtModel(Bundle(engines("fp16")), TENSORRT), GPU_BOUNDS["fp16"]
    _, _, result = next(case.replay(model, model.geometry))
    assert (result.cells()[0] != case.cells(0)).mean() <= bounds.flips
    assert np.abs(result.logits[0] - case.golden["logits"][0]).max() <= bounds.logits
    assert result.token[0] == case.golden["output_ids"][1]


def test_rows_of_a_batch_in_recorded_steps(driver, small):
    """Two images, two prompts of different length and two page budgets; all steps but the first are one launch."""
    requests, steps = [request(GEOMETRY, seed=3, text=5, begin=3), request(GEOMETRY, seed=4, text=8, begin=6)], 4
    tiles, begin = (np.concatenate([each[part] for each in requests]) for part in (0, 2))
    each = len(tiles) // 2
    prompts, lengths, first = padded([ids for _, ids, _ in requests])
    folder, found = small, []
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
        assert np.abs(ours[2] - theirs[2]).max() <= 2e-3  # ties that are rounded to the other side
    assert driver.counts["cuGraphInstantiate"] == 1 and driver.counts["cuGraphLaunch"] == steps - 1
