"""The ladder on an NVIDIA GPU: ONNX Runtime's CUDA provider against the official numbers. Run: `pytest -m gpu`."""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from runtime import Engine
from tests.parity.gates import GPU_BOUNDS, require
from tests.parity.official import CASES, recorded

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cuda():
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu: pip uninstall onnxruntime && pip install onnxruntime-gpu")


@pytest.mark.parametrize("precision", GPU_BOUNDS)
def test_replays(bundle, precision):
    cases = [recorded(name) for name in CASES]
    require(lambda case: OrtModel(Bundle(bundle(precision, case.weights)), device="cuda"), cases, GPU_BOUNDS[precision])


def test_engine(case, bundle):
    engine, golden = Engine(bundle("fp32", case.weights), device="cuda"), case.golden
    ids = golden["input_ids"].tolist()
    with engine.image(case.image) as view:
        answers = [view.ask(input_ids=ids, max_new_tokens=13, trace=True, stop_at_eos=False) for _ in range(2)]
    for answer in answers:
        assert answer.token_ids == golden["output_ids"][1:].tolist()
    assert answers[1].stats.vision_ms == answers[1].stats.projection_ms == 0


def test_thousand_steps_do_not_grow(bundle):
    model = OrtModel(Bundle(bundle("fp16")), device="cuda")
    decoder = model.decoder(model.no_image(1), 1001)
    buffers = [value.data_ptr() for value in decoder._cache.values()]
    for _ in range(1000):
        result = decoder.run(np.array([[5]]), 0)
    assert np.isfinite(result.logits).all()
    assert decoder.length.tolist() == [1000]
    assert buffers == [value.data_ptr() for value in decoder._cache.values()]
