"""The ladder on an NVIDIA GPU: ONNX Runtime's CUDA provider against the official numbers. Run: `pytest -m gpu`."""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.pages import cell_of_row
from engines.ort import OrtModel
from runtime import Engine

pytestmark = pytest.mark.gpu

LOGITS = {"fp32": 2e-3, "fp16": 0.1}  # float32 sums in another order than the CPU; TF32 is off


@pytest.fixture(scope="module", autouse=True)
def cuda():
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu: pip uninstall onnxruntime && pip install onnxruntime-gpu")


@pytest.mark.parametrize("precision", LOGITS)
def test_replay(case, bundle, precision):
    model, golden = OrtModel(Bundle(bundle(precision, case.weights)), device="cuda"), case.golden
    cell = cell_of_row(model.geometry)
    for step, _, result in case.replay(model, model.geometry):
        assert np.isfinite(result.logits).all()
        mask = result.cells()[0].reshape(-1, 9, 9)[:, cell][:, :, cell]
        flips = int((mask != golden["select_mask"][step]).sum()) // 64
        if precision == "fp32":
            assert flips == 0
        error = np.abs(result.logits[0] - golden["logits"][step]).max()
        assert flips or error <= LOGITS[precision]
        if golden["logit_gap"][step] > 2 * error:
            assert result.logits[0].argmax() == golden["output_ids"][1 + step]


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
