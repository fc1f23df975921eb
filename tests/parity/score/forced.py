"""Log-probabilities of the tokens of the recorded official runs: the official ones, and those of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime import Engine, Score
from tests.parity.official import Case


@dataclass(frozen=True)
class Errors:
    """How far log-probabilities are from the official float32 runs, in nats; and so a bound on it.

    before: in the steps of a run before any cell differs; agreeing: in the steps that have the official cells, whatever
    differed in earlier ones; None where no step was of that kind, or none is promised. always: in any step. mean: of a
    run's 13 tokens together, which is what answers are compared by.
    """

    before: float | None
    agreeing: float | None
    always: float
    mean: float


# What was measured on the CPU is said in test_official_runs.py. float32 keeps the bound of the logits that was given
# with the recordings, though a log-probability could be off by twice that.
BOUNDS = {
    "fp32": Errors(before=2e-4, agreeing=2e-4, always=2e-4, mean=2e-4),
    "fp16": Errors(before=0.014, agreeing=0.014, always=0.08, mean=0.007),
    "bf16": Errors(before=0.013, agreeing=0.065, always=1.0, mean=0.08),
}


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


def compare(case: Case, score: Score) -> Errors:
    """The errors of one run."""
    found, expected = score.logprobs, official(case)
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise ValueError(f"{case.name}: log-probabilities {found}")
    errors, cells = np.abs(found - expected), score.cells.reshape(*score.cells.shape[:2], -1)
    equal = np.array([np.array_equal(cells[step], case.cells(step)) for step in range(len(errors))])
    same = np.logical_and.accumulate(equal)
    before, agreeing = (float(errors[steps].max()) if steps.any() else None for steps in (same, equal))
    return Errors(before, agreeing, float(errors.max()), float(abs(score.mean - expected.mean())))


def together(runs: Sequence[Errors]) -> Errors:
    """The worst of several runs."""
    before, agreeing = (
        max((value for value in values if value is not None), default=None)
        for values in ([run.before for run in runs], [run.agreeing for run in runs])
    )
    return Errors(before, agreeing, max(run.always for run in runs), max(run.mean for run in runs))


def failures(found: Errors, bounds: Errors) -> list[str]:
    """What is out of bounds, in words; empty when the gate is passed."""
    return [
        f"{name}: {value:.3g}, at most {bound:.3g}"
        for name in ("before", "agreeing", "always", "mean")
        if (value := getattr(found, name)) is not None
        and (bound := getattr(bounds, name)) is not None
        and not value <= bound
    ]
