"""Log-probabilities of the tokens of the recorded official runs: the official ones, and those of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime import Engine, Score
from tests.parity.official import Case


@dataclass(frozen=True)
class Bounds:
    """The most that a log-probability may be away from the official float32 runs, in nats; and so a Measured.

    before: in the steps of a run before any cell differs; agreeing: in the steps that have the official cells, whatever
    differed in earlier ones; always: in any step; mean: of a run's 13 tokens, which is what answers are compared by.
    """

    before: float
    agreeing: float
    always: float
    mean: float


# What was measured on the CPU is said in test_official_runs.py; float32 has the bound of the logits that was given with
# the recordings, though a log-probability may be off by twice that.
BOUNDS = {}


def official(case: Case) -> np.ndarray:
    """[T] float64: of the golden tokens, from the golden logits."""
    logits = case.golden["logits"].astype(np.float64)
    likelihoods = np.exp(logits - logits.max(1, keepdims=True))
    likelihoods /= likelihoods.sum(1, keepdims=True)
    return np.log(likelihoods[np.arange(len(logits)), case.golden["output_ids"][1:]])


def scored(engine: Engine, case: Case) -> Score:
    """The golden tokens, forced, from the image file on."""
    golden = case.golden
    return engine.score(
        case.image, input_ids=golden["input_ids"].tolist(), continuation_ids=golden["output_ids"][1:].tolist()
    )


def compare(case: Case, score: Score) -> Bounds:
    """The errors of one run; 0 where no step was of that kind."""
    errors = np.abs(score.logprobs - official(case))
    cells = score.cells.reshape(*score.cells.shape[:2], -1)
    equal = np.array([np.array_equal(cells[step], case.cells(step)) for step in range(len(errors))])
    same = np.logical_and.accumulate(equal)
    return Bounds(
        float(errors[same].max(initial=0)),
        float(errors[equal].max(initial=0)),
        float(errors.max()),
        float(abs(score.mean - official(case).mean())),
    )


def together(runs: Sequence[Bounds]) -> Bounds:
    """The worst of several runs."""
    return Bounds(*(max(getattr(run, name) for run in runs) for name in Bounds.__dataclass_fields__))
