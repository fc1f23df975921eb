"""Log-probabilities of the recorded official runs, their tokens forced through Engine.score from the image file on.

Measured in nats, ONNX Runtime on the CPU, over 13 tokens of each run: the largest error before any cell differs, with
the official cells, and in all; and that of a run's mean. All seven runs: fp32 6.6e-6 everywhere, 1.3e-6; fp16 0.0067,
0.0067, 0.039, 0.0031; bf16 0.0060, 0.031, 0.48, 0.039. The five of the checkpoint as it is: int8 in blocks of 16 0.059,
0.067, 1.35, 0.16; int8 in columns 0.0008 (one step), 0.035, 1.35, 0.12; int4 in blocks of 16 flips in every step, 2.5
and 0.73: its weights are random, and no larger block divides them; fp8 1.7 and 0.37. Bounds are about twice that, and
never above the float32 bound of the logits in float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engines.bundle.pages import cell_of_row
from engines.bundle.precision import COLUMN
from export.build import BuildOptions, build
from runtime import Engine
from tests.conftest import once
from tests.parity.official import CASES, recorded
from tests.parity.report import official_cases
from tests.parity.score.forced import BOUNDS, Errors, compare, failures, official, scored, together
from tests.paths import OFFICIAL

QUANTISED = {
    ("int8", 16): Errors(before=0.12, agreeing=0.14, always=2.7, mean=0.33),
    ("int8", COLUMN): Errors(before=None, agreeing=0.07, always=2.7, mean=0.24),
    ("int4", 16): Errors(before=None, agreeing=None, always=5.0, mean=1.5),
    ("fp8", COLUMN): Errors(before=None, agreeing=None, always=3.5, mean=0.75),
}


@pytest.mark.parametrize("precision", BOUNDS)
def test_bounds(case, bundle, precision):
    engine = Engine(bundle(precision, case.weights))
    score = scored(engine, case)
    found = compare(case, score)
    print(case.name, precision, found)
    assert failures(found, BOUNDS[precision]) == []
    assert score.token_ids == case.golden["output_ids"][1:].tolist() and score.tokens is None


@pytest.mark.parametrize(("precision", "block"), QUANTISED)
def test_bounds_of_quantised_weights(precision, block, shared):
    out = shared / f"report-{precision}-{block}"  # of tests/parity/test_report.py, too
    options = BuildOptions(OFFICIAL / "weights", out, precision, block, check="none")
    engine = Engine(once(options.out, lambda _: build(options)))
    found = together([compare(case, scored(engine, case)) for case in official_cases()])
    print(precision, block, found)
    assert failures(found, QUANTISED[precision, block]) == []


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
