"""transformers' CLIPVisionModel against our tower and projector, in PyTorch and as the exported graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.ort import OrtModel
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny
from tests.oracle.models import clip_features
from tests.parity.requests import load

FEATURES = 1e-5  # of features up to 3; float32 sums against float64's


def tiles_of(g: Geometry) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((3, 3, g.lowres, g.lowres), dtype=np.float32)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tower_and_projector(activation, depth, tmp_path):
    g = tiny(projector_depth=depth)
    g = replace(g, vision=replace(g.vision, activation=activation, layers=3))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", g)
    tiles = tiles_of(g)
    expected = clip_features(checkpoint, g, torch.from_numpy(tiles)).numpy()
    found = load(checkpoint).vision(tiles).numpy()
    assert found.shape == expected.shape == (3, g.image_tokens, g.hidden)
    assert np.abs(expected).max() > 0.5
    assert np.abs(found - expected).max() <= FEATURES


def test_exported_graphs(exported):
    checkpoint, bundle, g = exported
    tiles = tiles_of(g)
    expected = clip_features(checkpoint, g, torch.from_numpy(tiles)).numpy()
    found = OrtModel(Bundle(bundle)).vision(tiles).numpy()
    assert found.shape == expected.shape and np.abs(found - expected).max() <= FEATURES


def test_the_other_activation_is_noticed(tmp_path):
    """The tolerance is far below what a wrong activation, or a wrong layer, would cost."""
    g = tiny()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", g)
    tiles = torch.from_numpy(tiles_of(g))
    expected = clip_features(checkpoint, g, tiles)
    other = replace(g, vision=replace(g.vision, activation="gelu"))
    assert (clip_features(checkpoint, other, tiles) - expected).abs().max() > 100 * FEATURES
