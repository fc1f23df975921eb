"""How sure a share is, and a difference: intervals and tests, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexattention_deploy import require_extra

require_extra("evaluate")

from scipy import stats  # noqa: E402 - only now it is known to be there

CONFIDENCE = 0.95
SHARES, MEANS = "Wilson score interval", "Student's t interval of the mean"  # of right or wrong; of graded answers


@dataclass(frozen=True)
class Estimate:
    """A mean score with its interval, all 0 .. 1. count: questions. low, high: None where there is no interval: of
    graded scores, of one question, or when all are equal."""

    count: int
    mean: float
    low: float | None
    high: float | None


def estimate(scores: Sequence[float], graded: bool) -> Estimate:
    """The mean of at least one score, with the interval of CONFIDENCE."""
    count, mean = len(scores), sum(scores) / len(scores)
    if not graded:
        found = stats.binomtest(round(sum(scores)), count).proportion_ci(CONFIDENCE, "wilson")
        return Estimate(count, mean, float(found.low), float(found.high))
    error = float(stats.sem(scores)) if len(set(scores)) > 1 else 0.0
    if not error:
        return Estimate(count, mean, None, None)
    low, high = stats.t.interval(CONFIDENCE, count - 1, mean, error)
    return Estimate(count, mean, max(0.0, float(low)), min(1.0, float(high)))


def exact_p(better: int, worse: int) -> float:
    """The two-sided p of McNemar's exact test: how likely a split of the changed questions is that is at least this
    uneven, if either way is as likely. 1 where none changed. Of graded answers it is the sign test."""
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
