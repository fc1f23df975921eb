"""The reference and the graphs against the official way of computing an answer, in float64 (tests/parity/official.py).

The recordings (test_ladder.py) show this for the official grid; here pages have different lengths.
"""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file

from engines.bundle.folder import Bundle
from engines.ort import OrtModel
from tests.geometries import tiny
from tests.parity.official import Official
from tests.parity.requests import LOGITS, VARIANTS, encode, load, request, steps

NAMES = ["zoom 2, pages of different length", "three cells", "first layer selects"]
FORCED = [5, 9, 11, 30]
SIZE = 140, 90  # width, height: int((50 // 2) / 140 * 8) = 1 row of padding above and below


@pytest.mark.parametrize("variant", NAMES)
def test_reference_and_graph_equal_the_official_way(variant, random_model):
    g = tiny(**VARIANTS[variant])
    checkpoint, bundle = random_model(f"variant-{list(VARIANTS).index(variant)}", g)
    models = load(checkpoint), OrtModel(Bundle(bundle))
    tiles, ids, begin = request(g, seed=7)
    features = models[0].vision(tiles)
    side, zoom = g.grid, g.zoom  # tiles of one row lie side by side
    hires = features[1:].view(zoom, zoom, side, side, -1).transpose(1, 2).reshape(g.hires_side**2, -1)
    official = Official(load_file(checkpoint / "model.safetensors"), g, features[0], hires, int(begin[0]), SIZE)
    official.run(ids[0, :-1].tolist())
    runs = [steps(model, encode(model, tiles, begin, (1, 0)), ids, FORCED, g.pages) for model in models]
    selected = 0
    for index, token in enumerate([int(ids[0, -1]), *FORCED]):
        logits, cells = official.run([token])
        selected += int(cells[:-1].sum())
        for run in runs:
            assert np.array_equal(run[index].cells()[0], cells.flatten(1).numpy())
            assert np.abs(run[index].logits[0] - logits.numpy()).max() <= LOGITS
    assert 0 < selected < len(runs[0]) * len(g.reading_layers) * g.pages  # some pages are read, some are not
