"""The rehearsal on the CPU: whole models over the emulated driver, only TensorRT itself is not there.

The same executor on a GPU, over all official runs and a thousand steps: tests/parity/gpu/test_tensorrt.py. Kernels are
interpreted, so steps are few; prompts of the official model, whose prefill would take minutes, go through ONNX Runtime.
Rows, slots and recorded steps with kernels, of a smaller model: tests/engines/trt.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import TENSORRT
from engines.trt.model import TrtModel
from export.build import BuildOptions, build
from tests.conftest import once
from tests.emulator.driver import Driver
from tests.emulator.tensorrt import install, with_plans
from tests.parity.gates import BOUNDS, GPU_BOUNDS
from tests.parity.tensorrt.beside import require_features, require_layers

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
