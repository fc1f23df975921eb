"""The ONNX Runtime backend: devices, the cache in place, room."""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.errors import BackendError
from engines.ort import OrtModel
from tests.geometries import tiny
from tests.parity.requests import encode, request


@pytest.fixture(scope="module")
def model(random_model) -> OrtModel:
    return OrtModel(Bundle(random_model("tiny", tiny())[1]))


def test_unknown_or_absent_devices(random_model):
    bundle = Bundle(random_model("tiny", tiny())[1])
    with pytest.raises(BackendError, match="tpu"):
        OrtModel(bundle, device="tpu")
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(BackendError, match="CUDAExecutionProvider") as caught:
            OrtModel(bundle, device="cuda")
        assert "onnxruntime-gpu" in caught.value.fix


@pytest.mark.parametrize("threads", [0, -3, "2", 1.5, True])
def test_bad_threads(threads, random_model):
    with pytest.raises(BackendError, match="threads="):
        OrtModel(Bundle(random_model("tiny", tiny())[1]), threads=threads)


def test_the_cache_is_updated_in_place(random_model, capfd):
    """New rows land in the very buffers that are bound, and ONNX Runtime does not report copying the cache."""
    import onnxruntime as ort

    bundle = Bundle(random_model("tiny", tiny())[1])
    model, g = OrtModel(bundle), tiny()
    options = ort.SessionOptions()
    options.log_severity_level = 2  # warnings: TensorScatter warns when it has to copy
    session = ort.InferenceSession(bundle.graph("decoder", "onnxruntime"), options, providers=["CPUExecutionProvider"])
    model._sessions["decoder"] = session
    tiles, ids, begin = request(g, seed=1)
    decoder = model.decoder(encode(model, tiles, begin), ids.shape[1] + 4)
    views = {name: value.numpy() for name, value in decoder._cache.items()}
    decoder.run(ids[:, :-1])
    used = ids.shape[1] - 1
    assert all(view[:, :, :used].any(-1).all() and not view[:, :, used:].any() for view in views.values())
    before = {name: view.copy() for name, view in views.items()}
    decoder.run(ids[:, -1:], g.pages)
    for name, view in views.items():
        assert np.array_equal(view[:, :, :used], before[name][:, :, :used])
        assert view[:, :, used].any(-1).all() and not view[:, :, used + 1 :].any()
    assert "copying past_cache" not in capfd.readouterr().err

    unbound = session.io_binding()  # the same run with outputs elsewhere does copy, and does say so
    for name in (value.name for value in session.get_inputs()):
        known = {"input_ids": decoder._ids, "past_length": decoder._past_length, "page_budget": decoder._budget}
        cache = decoder._cache.get(name.removeprefix("past_"))
        unbound.bind_ortvalue_input(name, known.get(name) or decoder._inputs.get(name) or cache)
    for value in session.get_outputs():
        unbound.bind_output(value.name, "cpu")
    session.run_with_iobinding(unbound)
    assert "copying past_cache" in capfd.readouterr().err


def test_a_full_cache_is_an_error(model):
    decoder = model.decoder(model.no_image(1), 64)
    decoder.run(np.ones((1, 60), np.int64))
    with pytest.raises(BackendError, match="5 more tokens"):
        decoder.run(np.ones((1, 5), np.int64))
    decoder.run(np.ones((1, 4), np.int64))


def test_forgetting_tokens_brings_the_old_state_back(model):
    decoder = model.decoder(model.no_image(1), 64)
    decoder.run(np.array([[1, 5, 9]]))
    expected = decoder.run(np.array([[7]])).logits
    decoder.run(np.array([[8]]))
    decoder.length[:] = 3
    assert np.array_equal(decoder.run(np.array([[7]])).logits, expected)


def test_enlarged_decoder_goes_on_where_the_other_was(model):
    decoder, other = (model.decoder(model.no_image(1), 64) for _ in range(2))
    for each in (decoder, other):
        each.run(np.array([[1, 5, 9]]))
    larger = other.enlarged(130)
    assert larger.capacity == 192
    difference = larger.run(np.array([[7]])).logits - decoder.run(np.array([[7]])).logits
    assert np.abs(difference).max() <= 1e-5


def test_results_are_copies(model):
    decoder = model.decoder(model.no_image(1), 64)
    first = decoder.run(np.array([[1]]))
    kept = first.logits.copy()
    decoder.run(np.array([[9]]))
    assert np.array_equal(first.logits, kept)
