"""Log-probabilities of the recorded official runs, their tokens forced through Engine.score from the image file on.

All seven runs in float32, float16 and bfloat16; the five of the checkpoint as it is also with weights, or what is kept
of tokens, in 8 and 4 bits. What was measured is the table in docs/figures.md; BOUNDS is what is allowed.
"""

from __future__ import annotations

import re
from dataclasses import astuple, replace

import numpy as np
import pytest

from engines.bundle.pages import cell_of_row
from runtime import Engine
from tests.parity.official import CASES, recorded
from tests.parity.report import ROWS
from tests.parity.score.forced import BOUNDS, NONE, Errors, compare, failures, official, runs_of, scored, together
from tests.paths import ROOT

WHOLE = ("fp32", "fp16", "bf16")
ROUNDED = {row.label: row for row in ROWS if row.label in BOUNDS and row.label not in WHOLE}
PAGE = (ROOT / "docs/figures.md").read_text().split("\n## Scores\n")[1].split("\n## ")[0]
FIGURES = {label: cells.split(" | ")[:4] for label, cells in re.findall(r"^\| (\w.*?) \| (.*) \|$", PAGE, re.MULTILINE)}


@pytest.mark.parametrize("precision", WHOLE)
def test_bounds(case, bundle, precision):
    engine = Engine(bundle(precision, case.weights))
    score = scored(engine, case)
    found = compare(case, score)
    print(case.name, precision, found)
    assert failures(found, BOUNDS[precision]) == []
    assert score.token_ids == case.golden["output_ids"][1:].tolist() and score.tokens is None


@pytest.mark.parametrize("label", ROUNDED)
def test_bounds_of_what_is_kept_in_few_bits(label, shared):
    row = ROUNDED[label]
    kept = "" if row.kv == row.kv_cache == "model" else f"-{row.kv}-{row.kv_cache}"
    out = shared / f"report-{row.precision}-{row.block}{kept}"  # without `kept`, of tests/parity/test_report.py, too
    found = together(runs_of(row, out))
    print(label, found)
    assert failures(found, BOUNDS[label]) == []


@pytest.mark.parametrize("label", BOUNDS)
def test_bounds_are_at_most_twice_the_figures(label):
    """And nothing is promised that was not seen. float32 is within what came with the recordings."""
    assert len(ROUNDED) + len(WHOLE) == len(BOUNDS)
    for figure, bound in zip(FIGURES[label], astuple(BOUNDS[label]), strict=True):
        if figure == NONE or bound is None:
            continue
        assert float(figure) <= bound <= (2e-4 if label == "fp32" else 2 * float(figure) + 1e-9)


def test_pages_and_cells_are_the_official_ones(case, bundle):
    score, golden = scored(engine := Engine(bundle("fp32", case.weights)), case), case.golden
    cell = cell_of_row(engine.geometry)
    assert score.greedy, "the official answer is greedy"
    assert np.array_equal(score.cells[:, :, cell][:, :, :, cell], golden["select_mask"])
    assert np.array_equal(score.pages_read, golden["n_selected"][:, :-1] // 64)


@pytest.mark.parametrize("weights", ["plain", "degenerate"])
def test_slots_and_other_answers_change_nothing(bundle, weights):
    """The official answer among its own beginnings and others, beside the other runs' views."""
    with Engine(bundle("fp32", weights), slots=3, prefill_chunk=200) as engine:
        cases = [case for case in map(recorded, CASES) if case.weights == weights]
        views = [engine.image(case.image) for case in cases]
        for _ in range(2):
            for case, view in zip(cases, views, strict=True):
                prompt, answer = case.golden["input_ids"].tolist(), case.golden["output_ids"][1:].tolist()
                other = [*answer[:6], (answer[6] + 1) % engine.geometry.vocab, *answer[7:]]
                given = [answer[:1], other, answer, answer[::-1], answer[:9]]
                scores = view.score(input_ids=prompt, continuation_ids=given)
                assert failures(compare(case, scores[2]), BOUNDS["fp32"]) == []
                for score in (scores[0], scores[4]):
                    length = len(score.token_ids)
                    assert np.abs(score.logprobs - official(case)[:length]).max() <= BOUNDS["fp32"].always
                assert np.abs(scores[1].logprobs[:6] - official(case)[:6]).max() <= BOUNDS["fp32"].always
                assert not scores[1].greedy and scores[1].sum < scores[2].sum


def test_the_gate_can_fail():
    """Every kind of error is seen; what there was none of passes, and what nothing is promised of."""
    bounds = Errors(0.1, 0.2, 0.3, 0.4)
    assert failures(bounds, bounds) == [] == failures(Errors(None, None, 0, 0), bounds)
    for name in ("before", "agreeing", "always", "mean"):
        assert len(failures(replace(bounds, **{name: 1.0}), bounds)) == 1
        assert len(failures(replace(bounds, **{name: float("nan")}), bounds)) == 1
    assert failures(Errors(9, 9, 0, 0), Errors(None, None, 0, 0)) == []
    runs = [Errors(None, 1, 2, 3), Errors(2, None, 1, 4), Errors(None, None, 0, 0)]
    assert together(runs) == Errors(2, 1, 2, 4)


def test_a_missing_token_and_one_that_is_no_number_are_errors(case, bundle):
    score = scored(Engine(bundle("fp32", case.weights)), case)
    with pytest.raises(ValueError, match="log-probabilities"):
        compare(case, replace(score, logprobs=score.logprobs[:-1]))
    with pytest.raises(ValueError, match="log-probabilities"):
        compare(case, replace(score, logprobs=np.where(np.arange(13) == 5, np.nan, score.logprobs)))
