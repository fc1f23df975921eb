"""Shapes and paper as other programs draw them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from export.default_model.painting import fill, rule

GROUND, COLOUR = (200, 210, 220), np.array((222.0, 48.0, 48.0))
CORNERS = [(60.0, 40.0), (160.0, 50.0), (150.0, 150.0), (50.0, 140.0)]


def inside() -> np.ndarray:
    """bool [200, 200]: well within the outline."""
    mask = Image.new("L", (200, 200), 0)
    ImageDraw.Draw(mask).polygon([(105 + 0.8 * (x - 105), 95 + 0.8 * (y - 95)) for x, y in CORNERS], 255)
    return np.asarray(mask) > 0


@pytest.mark.parametrize("seed", range(12))
def test_a_shape_has_its_colour_inside_and_leaves_the_rest_of_the_picture_alone(seed):
    image = Image.new("RGB", (200, 200), GROUND)
    fill(np.random.default_rng(seed), image, CORNERS, COLOUR)
    pixels = np.asarray(image).astype(float)
    found = pixels[inside()]
    assert np.abs(np.median(found, 0) - COLOUR).max() < 50
    assert (found[:, 0] > 1.5 * found[:, 1:].max(1)).all()  # red, all of it: what borders and shadows are is outside
    far = np.ones((200, 200), bool)
    far[14:178, 24:188] = False
    assert (pixels[far] == GROUND).all()


def test_shapes_differ_and_may_lie_at_the_edge_of_the_picture():
    seen = set()
    for seed in range(20):
        image = Image.new("RGB", (90, 90), GROUND)
        fill(np.random.default_rng(seed), image, CORNERS, COLOUR)  # half of it lies outside
        seen.add(image.tobytes())
    assert len(seen) == 20


def test_half_of_the_papers_are_ruled_in_a_shade_near_their_own():
    ruled = 0
    for seed in range(60):
        image = Image.new("RGB", (300, 200), GROUND)
        rule(np.random.default_rng(seed), image)
        change = np.abs(np.asarray(image).astype(float) - GROUND).max(-1)
        assert change.max() <= 31
        share = float((change > 0).mean())
        assert share < 0.7
        ruled += share > 0
    assert 18 < ruled < 42
