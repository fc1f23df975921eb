"""Which low-res tokens have the middle of a thing, and how much of it the tower is told they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.default_model.learning.pool import BESIDE, LOWRES, SIDE, WHOLE, Pool, labels, lowres_shares, lowres_token
from export.default_model.scenes import CANVAS, Style, make_scene


def overlap(x: float, y: float) -> np.ndarray:
    """Of a square that reaches BESIDE to each side of a place: the share over each token, those at the edge reaching on
    for ever."""
    edges = np.concatenate(([-np.inf], SIDE * np.arange(1, LOWRES), [np.inf]))
    across = [
        np.clip(np.minimum(edges[1:], at + BESIDE) - np.maximum(edges[:-1], at - BESIDE), 0, None) for at in (y, x)
    ]
    return np.outer(*across).ravel() / (2 * BESIDE) ** 2


def test_a_place_is_shared_as_a_square_around_it_covers_tokens():
    rng, several = np.random.default_rng(0), 0
    places = [
        *rng.uniform(0, CANVAS, (400, 2)),
        (SIDE, SIDE),
        (SIDE - BESIDE, 5),
        (0, 0),
        (CANVAS, CANVAS),
        (0, CANVAS),
    ]
    for x, y in places:
        shares, dense = lowres_shares(x, y), np.zeros(LOWRES * LOWRES)
        dense[list(shares)] = list(shares.values())
        assert dense == pytest.approx(overlap(x, y), abs=1e-9) and sum(shares.values()) == pytest.approx(1)
        assert next(iter(shares)) == lowres_token(x, y) and shares[lowres_token(x, y)] >= max(shares.values()) - 1e-9
        several += len(shares) > 1
    assert several > 100
    assert lowres_shares(SIDE, SIDE) == {LOWRES + 1: 0.25, 0: 0.25, LOWRES: 0.25, 1: 0.25}
    assert lowres_token(2.5 * SIDE, 11.5 * SIDE) == 11 * LOWRES + 2


def test_the_tower_is_told_of_every_middle_once():
    for seed in range(12):
        scene = make_scene(np.random.default_rng([7, seed]), style=Style(alike=0.5))
        expected = sum(overlap(*thing.centre) for thing in scene.things).clip(0, 1)
        found = labels(scene).centre
        assert found.dtype == np.uint8 and found.shape == (LOWRES, LOWRES)
        assert np.abs(found.ravel() / WHOLE - expected).max() <= 0.5 / WHOLE + 1e-9
        assert found.sum() / WHOLE == pytest.approx(len(scene.things), abs=0.1)


def test_a_pool_in_parts_is_one_pool():
    whole, rest = Pool(3, 5), Pool(1, 5, first=2)
    assert torch.equal(whole.pixels[2:], rest.pixels) and whole.things[2:] == rest.things
    assert whole.sizes[2:] == rest.sizes
    assert all(torch.equal(label[2:], rest.labels[name]) for name, label in whole.labels.items())
