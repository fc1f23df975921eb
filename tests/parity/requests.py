"""Made-up requests to models of any geometry, and what the tests of a whole model share."""

from __future__ import annotations

import numpy as np

from engines.backend import Image
from engines.bundle.geometry import Geometry
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel

LOGITS = 2e-4
VARIANTS = {
    "zoom 2, pages of different length": {"zoom": 2, "cells": 3},
    "zoom 1": {"zoom": 1},
    "first layer selects": {"start_layer": 0},
    "only the last layer reads": {"start_layer": 3},
    "three cells": {"cells": 3},
    "biases": {"attention_bias": True},
    "tied embeddings": {"tied_embeddings": True},
    "linear projector": {"projector_depth": 1},
    "everything selected": {"threshold": -1},
    "grouped heads": {"kv_heads": 2},
}


def load(checkpoint) -> ReferenceModel:
    config = read_config(checkpoint)
    return ReferenceModel(config.geometry, Checkpoint.open(checkpoint, config.tower_folder))


def request(g: Geometry, seed: int, text: int = 9, begin: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels [1 + zoom^2, 3, S, S], embedded prompt [1, n] and image position [1] of a made-up request."""
    rng = np.random.default_rng(seed)
    tiles = rng.standard_normal((1 + g.zoom**2, 3, g.lowres, g.lowres), dtype=np.float32)
    words = rng.integers(3, g.vocab, (1, text))
    image = -1 - np.arange(g.image_tokens)[None]
    return tiles, np.concatenate((words[:, :begin], image, words[:, begin:]), 1), np.array([begin])


def encode(model, tiles: np.ndarray, begin: np.ndarray, sides: tuple[int, int] = (1, 0)) -> Image:
    low, high = model.vision(tiles[:1]), model.vision(tiles[1:])
    return Image(low, model.project(high, begin), begin, np.array([sides], np.int64))


def steps(model, image: Image, ids: np.ndarray, tokens: list[int], budget: int):
    """Results of the last prompt token and of the forced tokens after it."""
    decoder = model.decoder(image, ids.shape[1] + len(tokens))
    if ids.shape[1] > 1:
        decoder.run(ids[:, :-1])
    return [decoder.run(np.array([[token]]), budget) for token in (int(ids[0, -1]), *tokens)]


def assert_equal(left, right) -> None:
    for theirs, ours in zip(left, right, strict=True):
        assert np.isfinite(ours.logits).all()
        assert np.array_equal(theirs.cells(), ours.cells())
        assert np.abs(theirs.logits - ours.logits).max() <= LOGITS


def padded(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedded prompts, each [1, n], as rows of one prefill: their ids but the last, padded at the end [B, S], how many
    of them are valid [B], and the last ids [B, 1], which are the first decoding step."""
    lengths = np.array([ids.shape[1] - 1 for ids in prompts])
    rows = np.zeros((len(prompts), lengths.max()), np.int64)
    for row, ids in zip(rows, prompts, strict=True):
        row[: ids.shape[1] - 1] = ids[0, :-1]
    return rows, lengths, np.stack([ids[0, -1:] for ids in prompts])
