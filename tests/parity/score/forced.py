"""Log-probabilities of the tokens of the recorded official runs: the official ones, and those of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from export.build import BuildOptions, build
from runtime import Engine, Score
from tests.conftest import once
from tests.parity.official import Case
from tests.parity.report import Row, official_cases
from tests.paths import OFFICIAL


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


# Bounds of the rows that `python -m tests.parity.score` prints, by their labels. docs/figures.md has what was measured
# and where; a bound is at most twice that. float32 keeps the bound of the logits that was given with the recordings,
# though a log-probability could be off by twice as much.
BOUNDS = {
    "fp32": Errors(before=2e-4, agreeing=2e-4, always=2e-4, mean=2e-4),
    "fp32, kv int8": Errors(before=0.044, agreeing=0.044, always=0.068, mean=0.0044),
    "fp32, kv cache int8": Errors(before=0.0034, agreeing=0.015, always=1.0, mean=0.034),
    "fp32, kv int8, kv cache int8": Errors(before=0.0098, agreeing=0.034, always=1.0, mean=0.032),
    "fp16": Errors(before=0.0074, agreeing=0.0074, always=0.078, mean=0.0064),
    "bf16": Errors(before=0.013, agreeing=0.044, always=0.96, mean=0.078),
    "int8, blocks of 16": Errors(before=0.11, agreeing=0.11, always=2.6, mean=0.32),
    "int8, columns": Errors(before=None, agreeing=0.07, always=2.7, mean=0.2),
    "int4, blocks of 16": Errors(before=None, agreeing=None, always=4.8, mean=1.38),
    "fp8, columns": Errors(before=None, agreeing=None, always=3.4, mean=0.74),
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


def runs_of(row: Row, out: Path, calibrate: Path | None = None) -> list[Errors]:
    """The errors of the recorded runs of the checkpoint as it is, on the bundle of a row, which is built as `out`,
    unchecked, unless it is there. `calibrate`: data for a row that is calibrated. OptionError for a block size that
    does not divide."""
    options = BuildOptions(
        OFFICIAL / "weights", out, row.precision, row.block, calibrate=calibrate if row.calibrated else None,
        kv=row.kv, kv_cache=row.kv_cache, check="none",
    )  # fmt: skip
    with Engine(once(out, lambda _: build(options))) as engine:
        return [compare(case, scored(engine, case)) for case in official_cases()]


def together(runs: Sequence[Errors]) -> Errors:
    """The worst of several runs."""
    before, agreeing = (
        max((value for value in values if value is not None), default=None)
        for values in ([run.before for run in runs], [run.agreeing for run in runs])
    )
    return Errors(before, agreeing, max(run.always for run in runs), max(run.mean for run in runs))


NONE = "no such step"


def cells(errors: Errors) -> list[str]:
    """As a table shows them."""
    return [NONE if value is None else f"{value:.2g}" for value in astuple(errors)]


def failures(found: Errors, bounds: Errors) -> list[str]:
    """What is out of bounds, in words; empty when the gate is passed."""
    return [
        f"{name}: {value:.3g}, at most {bound:.3g}"
        for name in ("before", "agreeing", "always", "mean")
        if (value := getattr(found, name)) is not None
        and (bound := getattr(bounds, name)) is not None
        and not value <= bound
    ]
