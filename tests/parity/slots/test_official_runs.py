"""The official runs side by side in one engine's slots: each is the recorded one, whatever runs beside it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engines.bundle.pages import cell_of_row
from runtime import Engine
from tests.parity.gates import BOUNDS
from tests.parity.official import CASES, recorded


@pytest.mark.parametrize("weights", ["plain", "degenerate"])
def test_official_runs_interleaved(bundle, weights):
    cases = [case for case in map(recorded, CASES) if case.weights == weights]
    engine, draw = Engine(bundle("fp32", weights), slots=3, prefill_chunk=200), random.Random(0)
    running = []
    for case in cases:
        ids = case.golden["input_ids"].tolist()
        stream = engine.stream(case.image, input_ids=ids, max_new_tokens=13, trace=True, stop_at_eos=False)
        running.append((case, stream, stream.steps()))
    cell, checked = cell_of_row(engine.geometry), 0
    while running:
        entry = draw.choice(running)
        case, stream, steps = entry
        if next(steps, None) is not None:
            continue
        running.remove(entry)
        answer, golden = stream.answer(), case.golden
        assert answer.token_ids == golden["output_ids"][1:].tolist()
        assert np.array_equal(answer.trace.cells[:, :, cell][:, :, :, cell], golden["select_mask"])
        assert np.abs(answer.trace.logits - golden["logits"]).max() <= BOUNDS["fp32"].logits
        checked += 1
    assert checked == len(cases) > 1
