"""TensorRT's engines beside ONNX Runtime's graphs of the same bundle, on official cases."""

from __future__ import annotations

import numpy as np

from engines.backend import Decoder, Model
from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from engines.trt.model import TrtModel
from tests.parity.gates import Bounds
from tests.parity.official import Case


def require_features(case: Case, bundle: Bundle, backend: str, bounds: Bounds) -> None:
    """The features of the image at once, and of its tiles, are within the bounds."""
    model, theirs = TrtModel(bundle, backend), OrtModel(bundle)
    tiles = case.tiles(model.geometry)
    for part in (tiles[:1], tiles[1:]):
        ours = model.vision(part).numpy(model.stream).astype(np.float32)
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs.vision(part).numpy()).max() <= bounds.features


def require_layers(case: Case, bundle: Bundle, backend: str, bounds: Bounds) -> None:
    """After the prefill and one step: key and value of every layer, and the pages every layer chose."""
    found = []
    for model in (TrtModel(bundle, backend), OrtModel(bundle)):
        _, decoder, result = next(case.replay(model, model.geometry))
        used = int(decoder.length[0])
        halves = [f"{half}.{layer}" for layer in range(model.geometry.layers) for half in ("key", "value")]
        caches = {name: cache_of(model, decoder, name)[:, :, :used] for name in halves}
        found.append((caches, result.cells(), result.logits.copy()))
    (ours, our_cells, our_logits), (theirs, their_cells, their_logits) = found
    for name, cache in theirs.items():
        assert np.isfinite(ours[name]).all(), name
        assert np.abs(ours[name] - cache).max() <= bounds.features, name
    assert np.array_equal(our_cells, their_cells)
    assert np.abs(our_logits - their_logits).max() <= bounds.logits


def cache_of(model: Model, decoder: Decoder, name: str) -> np.ndarray:
    """One half of a layer's cache [B, Hkv, L, hd]."""
    if isinstance(model, OrtModel):
        return decoder._cache[f"past_{name}"].numpy()
    return decoder._cache[f"past_{name}"].numpy(model.stream)
