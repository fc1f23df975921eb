"""Lazily projected pages: the same answers, and only what was selected is ever projected."""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.pages import cell_of_row
from engines.ort import OrtModel
from export.build import BuildOptions, build
from runtime import Engine
from tests.conftest import once


@pytest.fixture(scope="session")
def lazy(shared, checkpoint):
    """lazy(name) -> float32 bundle that projects pages when they are first selected."""

    def get(name: str):
        options = BuildOptions(checkpoint(name), shared / f"{name}-lazy", precision="fp32", projection="lazy")
        return once(options.out, lambda _: build(options))

    return get


def test_official_tokens_and_masks(case, lazy):
    model, golden = OrtModel(Bundle(lazy(case.weights))), case.golden
    g = model.geometry
    cell = cell_of_row(g)
    wanted, again = np.zeros((len(g.reading_layers), g.pages), bool), 0
    for step, decoder, result in case.replay(model, g):
        mask = result.cells()
        assert (mask[0].reshape(-1, g.cells, g.cells)[:, cell][:, :, cell] == golden["select_mask"][step]).all(), step
        assert np.abs(result.logits[0] - golden["logits"][step]).max() <= 2e-4, step
        assert result.token[0] == golden["output_ids"][step + 1], step
        wanted |= mask[0, :-1]
        again += int(mask[0, :-1].sum())
        projected = decoder._inputs["projected"].numpy()[0]
        assert (projected == wanted).all(), step
        assert projected.sum() <= again, step  # the official way projects what each step selects, seen before or not
        for layer, row in zip(g.reading_layers, projected, strict=True):
            store = decoder._inputs[f"page_key.{layer}"].numpy()[0]
            assert (store.any((0, 2, 3)) == row.astype(bool)).all(), (step, layer)
    assert case.weights == "degenerate" or 0 < wanted.mean() < 1


def test_questions_about_one_image_share_pages_and_agree_with_the_eager_bundle(lazy, bundle):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (300, 400, 3), np.uint8)
    first, second = ([1, -200, *rng.integers(3, 60, 5).tolist()] for _ in range(2))
    questions = [{"input_ids": ids, "page_budget": budget} for ids, budget in ((first, 81), (second, 3), (first, 81))]
    answers = []
    for folder in (lazy("plain"), bundle("fp32")):
        engine = Engine(folder)
        with engine.image(photo) as view:
            answers.append([view.ask(**each, max_new_tokens=5, stop_at_eos=False, trace=True) for each in questions])
        text = engine.generate(None, input_ids=[1, 5, 9], max_new_tokens=3, stop_at_eos=False)
        answers[-1].append(text)
    for ours, theirs in zip(*answers, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.trace is None or (ours.trace.cells == theirs.trace.cells).all()
    assert answers[0][0].token_ids == answers[0][2].token_ids
