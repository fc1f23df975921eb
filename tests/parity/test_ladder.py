"""Image -> vision -> rotary -> selection -> layer -> logits -> tokens, each rung against the official numbers.

Tolerances: those given with the official tensors. The selection rung on its own is tests/plugins/test_select_pages.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PILImage

from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, ONNXRUNTIME_CUDA, PLUGIN_FREE
from engines.bundle.pages import cell_of_row, tile_order
from engines.ort import OrtModel
from runtime import Engine
from runtime.preprocess import preprocess
from tests.parity.gates import BOUNDS
from tests.parity.inspected import InspectedModel

FEATURES, LOGITS = BOUNDS["fp32"].features, BOUNDS["fp32"].logits
ROTARY, MAP, HIDDEN = 1e-5, 1e-5, 3e-4


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found.astype(np.float64) - expected).max())


@pytest.fixture(params=["reference", ONNXRUNTIME, ONNXRUNTIME_CUDA, PLUGIN_FREE])
def model(request, case, reference, bundle):
    """The PyTorch reference, then the exported float32 graphs, with inner values visible."""
    if request.param == "reference":
        return reference(case.weights)
    return InspectedModel(Bundle(bundle("fp32", case.weights)), request.param)


def test_preprocess(case, reference):
    g = reference("plain").geometry
    tiles = preprocess(PILImage.open(case.image).convert("RGB"), g)
    expected = case.tiles(g)
    assert np.array_equal(tiles[1:], expected[1:])
    assert worst(tiles[:1], expected[:1]) <= 1e-5


@pytest.mark.parametrize("model", ["reference", ONNXRUNTIME], indirect=True)  # the plugin-free graph is a decoder
def test_vision(case, model):
    g = model.geometry
    tiles = case.tiles(g)
    assert worst(model.vision(tiles[:1]).numpy()[0], case.golden["lowres_features"]) <= FEATURES
    hires = model.vision(tiles[1:]).numpy().reshape(-1, g.hidden)[tile_order(g)]
    assert worst(hires, case.golden["hires_features"]) <= FEATURES


def test_hires_rotary(case, reference):
    cos, sin = reference("plain").hires_rotary(case.begin())
    for half, golden in ((cos, case.golden["hires_cos"]), (sin, case.golden["hires_sin"])):
        assert worst(np.concatenate((half[0], half[0]), -1), golden) <= ROTARY


def test_pages_of_the_graph_equal_the_reference(case, reference, bundle):
    """Hi-res keys carry the rotary; the official run has no array of them, the reference is the yardstick."""
    torch_model, graph = reference(case.weights), OrtModel(Bundle(bundle("fp32", case.weights)))
    left, right = (case.encode(model, graph.geometry) for model in (torch_model, graph))
    assert left.pages.keys() == right.pages.keys()
    for name, theirs in left.pages.items():
        assert worst(right.pages[name].numpy(), theirs.numpy()) <= FEATURES, name


def test_layers_and_logits(case, model):
    g, golden = model.geometry, case.golden
    cell = cell_of_row(g)
    errors = {"map": 0.0, "hidden": 0.0, "logits": 0.0}
    flips = 0
    for step, decoder, result in case.replay(model, g):
        maps, hidden = np.concatenate(decoder.maps), np.concatenate(decoder.hidden)
        errors["map"] = max(errors["map"], worst(maps, golden["attn_map"][step]))
        errors["hidden"] = max(errors["hidden"], worst(hidden, golden["hidden_last"][step]))
        errors["logits"] = max(errors["logits"], worst(result.logits[0], golden["logits"][step]))
        mask = result.cells()[0].reshape(-1, g.cells, g.cells)[:, cell][:, :, cell]
        flips += int((mask != golden["select_mask"][step]).sum())
        assert result.logits[0].argmax() == golden["output_ids"][1 + step]
    assert flips == 0
    assert errors["map"] <= MAP and errors["hidden"] <= HIDDEN and errors["logits"] <= LOGITS, errors


def test_engine_end_to_end(case, bundle):
    engine, golden = Engine(bundle("fp32", case.weights)), case.golden
    cell = cell_of_row(engine.geometry)
    answer = engine.generate(
        case.image, input_ids=golden["input_ids"].tolist(), max_new_tokens=13, trace=True, stop_at_eos=False
    )
    assert answer.token_ids == golden["output_ids"][1:].tolist()
    assert worst(answer.trace.logits, golden["logits"]) <= LOGITS
    assert answer.trace.cells.dtype == bool
    assert np.array_equal(answer.trace.cells[:, :, cell][:, :, :, cell], golden["select_mask"])
    assert np.array_equal(answer.stats.pages_read, golden["n_selected"][:, :-1] // 64)
