"""Scores against the official way of computing them in float64, beyond the recorded runs: step by step, and in the one
pass of the official V* script. Each answer alone, from its prompt on, with none of this project's model code behind the
vision tower."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from engines.bundle.folder import Bundle
from runtime import Engine
from runtime.preprocess import preprocess
from tests.geometries import tiny
from tests.parity.official import Official
from tests.parity.requests import LOGITS, VARIANTS, load
from tests.parity.score.one_pass import OnePass
from tests.runtime.questions import PHOTO

NAMES = ["zoom 2, pages of different length", "three cells", "first layer selects"]
PROMPT = [1, 17, 23, -200, 5, 40, 11]
ANSWERS = [[5, 9, 11, 30], [5, 9], [5, 9, 12, 3, 60], [7], [60, 60, 60]]


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("slots", [1, 2])
def test_scores_equal_the_official_way(variant, slots, random_model):
    g = tiny(**VARIANTS[variant])
    checkpoint, bundle = random_model(f"variant-{list(VARIANTS).index(variant)}", g)
    assert Bundle(bundle).manifest.geometry == g
    scores = Engine(bundle, slots=slots).image(PHOTO).score(input_ids=PROMPT, continuation_ids=ANSWERS)
    begin = PROMPT.index(-200)
    prompt = [*PROMPT[:begin], *(-1 - np.arange(g.image_tokens)).tolist(), *PROMPT[begin + 1 :]]
    features, side, zoom = load(checkpoint).vision(preprocess(Image.fromarray(PHOTO), g)), g.grid, g.zoom
    hires = features[1:].view(zoom, zoom, side, side, -1).transpose(1, 2).reshape(g.hires_side**2, -1)
    weights, size = load_file(checkpoint / "model.safetensors"), PHOTO.shape[1::-1]
    selected = 0
    for answer, score in zip(ANSWERS, scores, strict=True):
        official = Official(weights, g, features[0], hires, begin, size)
        official.run(prompt[:-1])
        for index, (fed, token) in enumerate(zip([prompt[-1], *answer], answer, strict=False)):
            logits, cells = official.run([fed])
            selected += int(cells[:-1].sum())
            assert np.array_equal(score.cells[index], cells.numpy())
            assert abs(float(logits.log_softmax(-1)[token]) - score.logprobs[index]) <= LOGITS
        whole = OnePass(weights, g, features[0], hires, begin, size).log_likelihoods(prompt, answer)
        assert np.abs(whole.numpy() - score.logprobs).max() <= LOGITS
        assert abs(float(whole.mean()) - score.mean) <= LOGITS
    tokens = sum(map(len, ANSWERS))
    assert 0 < selected < tokens * len(g.reading_layers) * g.pages  # some pages are read, some are not
