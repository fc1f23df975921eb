"""Models the official recordings do not cover: every geometry the config can ask for, grouped heads, batches, text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.backend import Image
from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from tests.geometries import tiny
from tests.oracle.models import llama_of
from tests.parity.requests import VARIANTS, assert_equal, encode, load, padded, request, steps


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_equals_reference(variant, random_model):
    g = tiny(**VARIANTS[variant])
    checkpoint, bundle = random_model(f"variant-{list(VARIANTS).index(variant)}", g)
    reference, graph = load(checkpoint), OrtModel(Bundle(bundle))
    assert reference.geometry == graph.geometry == g != tiny()  # what was asked for, read back
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
    prompts, lengths, column = padded([ids for _, ids, _ in requests])
    decoder = model.decoder(image, int(lengths.max()) + 8)
    decoder.run(prompts, lengths=lengths)
    for index in range(3):
        result = decoder.run(column, g.pages)
        for row, single in enumerate(singles):
            assert np.array_equal(result.cells()[row], single[index].cells()[0])
            assert np.abs(result.logits[row] - single[index].logits[0]).max() <= 2e-5
        if index < 2:
            column = np.array([[forced[index]] for forced in tokens])


def test_text_only_equals_a_plain_llama(random_model):
    """Without an image the graph is an ordinary decoder: that of transformers, over the whole sequence at once."""
    g = tiny()
    checkpoint, bundle = random_model("tiny", g)
    reference, graph = load(checkpoint), OrtModel(Bundle(bundle))
    ids = np.array([[1, 9, 33, 20, 4, 17]])
    with torch.no_grad():
        expected = llama_of(checkpoint, g)(torch.from_numpy(ids)).logits[0, -1].numpy()
    for model in (reference, graph):
        (result,) = steps(model, model.no_image(1), ids, [], 0)
        assert not result.cells().any()
        whole = model.decoder(model.no_image(1), 8).run(ids)
        for logits in (result.logits[0], whole.logits[0]):
            assert np.abs(logits - expected).max() <= 2e-5


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
