"""Models the official recordings do not cover: every geometry the config can ask for, grouped heads, batches, text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.ort import OrtModel
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.reference import ReferenceModel
from tests.geometries import tiny

LOGITS = 2e-4
STEPS = 4
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_equals_reference(variant, random_model):
    g = tiny(**VARIANTS[variant])
    checkpoint, bundle = random_model(f"variant-{list(VARIANTS).index(variant)}", g)
    reference, graph = load(checkpoint), OrtModel(Bundle(bundle))
    assert reference.geometry == graph.geometry == replace(g, vision=g.vision)
    tiles, ids, begin = request(g, seed=1)
    tokens = [5, 9, 11, 30]
    runs = [steps(model, encode(model, tiles, begin), ids, tokens, g.pages) for model in (reference, graph)]
    assert_equal(*runs)
    assert runs[0][0].page_count[:, :-1].max() > 0, "this request reads no page, so it shows nothing"


def test_grouped_heads_equal_repeated_heads(random_model, tmp_path):
    """A model with 2 key/value heads is the model with 4 whose heads repeat (official: repeat_kv)."""
    from safetensors.torch import load_file, save_file

    g = tiny(kv_heads=2)
    checkpoint, bundle = random_model(f"variant-{list(VARIANTS).index('grouped heads')}", g)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if any(f".{half}_proj{end}.weight" in name for half in "kv" for end in ("", "_hd")) and "vision" not in name:
            heads = tensor.view(g.kv_heads, g.head_dim, g.hidden).repeat_interleave(g.heads // g.kv_heads, 0)
            tensors[name] = heads.reshape(-1, g.hidden)
    from tests.checkpoints import write_checkpoint

    full = write_checkpoint(tmp_path / "full", tiny())
    save_file(tensors, full / "model.safetensors")
    tiles, ids, begin = request(g, seed=2)
    expected_model = load(full)
    expected = steps(expected_model, encode(expected_model, tiles, begin), ids, [7, 8], g.pages)
    for model in (load(checkpoint), OrtModel(Bundle(bundle))):
        assert_equal(expected, steps(model, encode(model, tiles, begin), ids, [7, 8], g.pages))


@pytest.mark.parametrize("kind", ["reference", "graph"])
def test_batch_of_two_equals_two_singles(kind, random_model):
    """Different images at different positions in prompts of different length."""
    g = tiny()
    checkpoint, bundle = random_model("tiny", g)
    model = load(checkpoint) if kind == "reference" else OrtModel(Bundle(bundle))
    requests = [request(g, seed=3, text=9, begin=3), request(g, seed=4, text=14, begin=6)]
    sides = [(1, 0), (0, 2)]
    tokens = [[5, 6], [40, 41]]
    singles = [
        steps(model, encode(model, tiles, begin, side), ids, forced, g.pages)
        for (tiles, ids, begin), side, forced in zip(requests, sides, tokens, strict=True)
    ]

    low = model.vision(np.concatenate([tiles[:1] for tiles, _, _ in requests]))
    high = model.vision(np.concatenate([tiles[1:] for tiles, _, _ in requests]))
    begin = np.concatenate([begin for _, _, begin in requests])
    image = Image(low, model.project(high, begin), begin, np.array(sides, np.int64))
    lengths = np.array([ids.shape[1] - 1 for _, ids, _ in requests])
    padded = np.zeros((2, lengths.max()), np.int64)
    for row, (_, ids, _) in zip(padded, requests, strict=True):
        row[: ids.shape[1] - 1] = ids[0, :-1]
    decoder = model.decoder(image, int(lengths.max()) + 8)
    decoder.run(padded, lengths=lengths)
    column = np.stack([ids[0, -1:] for _, ids, _ in requests])
    for index in range(3):
        result = decoder.run(column, g.pages)
        for row, single in enumerate(singles):
            assert np.array_equal(result.cells()[row], single[index].cells()[0])
            assert np.abs(result.logits[row] - single[index].logits[0]).max() <= 2e-5
        if index < 2:
            column = np.array([[forced[index]] for forced in tokens])


def test_text_only_equals_a_plain_llama(random_model):
    """Without an image the graph is an ordinary decoder: compare with attention over the whole sequence at once."""
    g = tiny()
    checkpoint, bundle = random_model("tiny", g)
    reference, graph = load(checkpoint), OrtModel(Bundle(bundle))
    ids = np.array([[1, 9, 33, 20, 4, 17]])
    whole = reference.decoder(reference.no_image(1), 8).run(ids)
    for model in (reference, graph):
        (result,) = steps(model, model.no_image(1), ids, [], 0)
        assert not result.cells().any()
        assert np.abs(result.logits - whole.logits).max() <= 2e-5


def test_budget_is_monotone_and_zero_is_plain(random_model):
    g = tiny()
    checkpoint, bundle = random_model("tiny", g)
    graph = OrtModel(Bundle(bundle))
    tiles, ids, begin = request(g, seed=5)
    image = encode(graph, tiles, begin)
    previous, counts = np.zeros(g.pages, bool), []
    for budget in range(g.pages + 1):
        (result,) = steps(graph, image, ids, [], budget)
        first = result.cells()[0, 0]  # the start layer's map does not depend on pages
        assert first.sum() <= budget and (previous <= first).all()
        previous = first
        counts.append(int(first.sum()))
    assert counts[-1] > 2
    assert counts == [min(budget, counts[-1]) for budget in range(g.pages + 1)]

    reference = load(checkpoint)
    plain = steps(reference, encode(reference, tiles, begin), ids, [4, 5], 0)
    assert_equal(plain, steps(graph, image, ids, [4, 5], 0))
    full = steps(graph, image, ids, [4, 5], g.pages)
    assert np.abs(full[-1].logits - plain[-1].logits).max() > 1e-3
