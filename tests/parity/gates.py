"""The gate a decoder passes when it replays official runs: cells, logits and tokens, each judged on its own.

Rounding moves a few pooled scores across the threshold, and a flipped cell changes what later layers and steps read. So
logits are bounded before any cell of a run differs, in the later steps that have the official cells again, and in all;
none of it lets the flips or the tokens go unbounded. A token may differ only where the official runner-up is closer
than twice the error that is stated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from engines.bundle.geometry import Geometry
from engines.ort import OrtModel
from engines.trt.model import TrtModel
from tests.parity.official import Case


@dataclass(frozen=True)
class Bounds:
    """The most that a precision may be away from the official float32 runs."""

    features: float  # projected low-res features
    logits: float  # in the steps of a run before any cell differs: the error that the tokens are judged by
    agreeing: float  # in the steps that have the official cells, whatever differed in earlier ones
    always: float  # in any step
    flips: float  # share of the cells

    @property
    def gap(self) -> float:
        """Where the official token is farther ahead of its runner-up than this, it must be chosen: in a precision that
        may flip no cell always."""
        return 2 * self.logits if self.flips else 0.0


# What was measured on the CPU is said in test_precisions.py; float32 is exact but for the order in which it sums, and
# has the bounds that were given with the recordings.
BOUNDS = {
    "fp32": Bounds(features=5e-5, logits=2e-4, agreeing=2e-4, always=2e-4, flips=0),
    "fp16": Bounds(features=0.019, logits=0.026, agreeing=0.03, always=0.24, flips=0.0025),
    "bf16": Bounds(features=0.11, logits=0.08, agreeing=0.17, always=3.0, flips=0.03),
}
# On a GPU sums have yet another order (TF32 is off), and float16 is rounded after every operator. So does PyTorch on
# the CPU: there logits are 0.016 off before any flip and 0.98 in all, 0.16 % of the cells of all runs flip (0.74 % of
# those of one), no token is another. The bounds of the logits are twice that; 0.5 % of the cells of all the runs
# together may flip. An H100 has kept 0.1 in agreeing steps; the other bounds have not been tried on a GPU.
GPU_BOUNDS = {
    "fp32": replace(BOUNDS["fp32"], features=1e-3, logits=2e-3, agreeing=2e-3, always=2e-3),
    "fp16": Bounds(features=0.05, logits=0.033, agreeing=0.1, always=2.0, flips=0.005),
}

# What hi-res pages in 8 bits add: what was measured is said in pages/test_int8_pages.py.
INT8_PAGES = Bounds(features=0, logits=0.2, agreeing=0.3, always=0.3, flips=0.0025)


# And what the cache of ordinary tokens in 8 bits adds, which every layer reads: cache/test_official_runs.py.
INT8_CACHE = Bounds(features=0, logits=0.05, agreeing=0.05, always=2.5, flips=0.015)


def with_int8(bounds: Bounds, *stores: Bounds) -> Bounds:
    """The bounds of a precision some of whose stores, INT8_PAGES or INT8_CACHE, are kept in 8 bits: errors add up."""
    every = bounds, *stores
    return Bounds(**{each.name: sum(getattr(one, each.name) for one in every) for each in fields(Bounds)})


@dataclass(frozen=True)
class ReplayStep:
    """One decoding step of a replay. logits: [vocab]. token: what the graph chose. cells: bool [M, cells * cells]."""

    logits: np.ndarray
    token: int
    cells: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Replays against their recordings. Errors are the largest of a logit, infinite where one is no number, and 0 where
    no step was of that kind."""

    flipped: int
    cells: int
    clean: float  # error before any cell differs
    agreeing: float  # in steps that have the official cells
    always: float
    other: float  # largest official gap at which another token was chosen, 0 when none was
    inconsistent: int  # steps whose token is not that of the largest logit

    @property
    def flips(self) -> float:
        """Share of the cells that differ."""
        return self.flipped / self.cells


def together(runs: Sequence[Measured]) -> Measured:
    """Several runs as one: the sum of what is counted, the worst of the errors."""
    counts = {name: sum(getattr(run, name) for run in runs) for name in ("flipped", "cells", "inconsistent")}
    worst = {name: max(getattr(run, name) for run in runs) for name in ("clean", "agreeing", "always", "other")}
    return Measured(**counts, **worst)


def replayed(case: Case, model, g: Geometry) -> list[ReplayStep]:
    """The official steps of a case on a backend, with the official tokens."""
    return [
        ReplayStep(result.logits[0].astype(np.float32), int(result.token[0]), result.cells()[0].astype(bool))
        for _, _, result in case.replay(model, g)
    ]


def measure(case: Case, steps: Sequence[ReplayStep]) -> Measured:
    """Compare a whole replay with its recording; ValueError when a step is missing or has another shape."""
    golden, same, flipped, total, inconsistent = case.golden, True, 0, 0, 0
    clean = agreeing = always = other = 0.0
    for index, (step, expected) in enumerate(zip(steps, golden["logits"], strict=True)):
        cells = case.cells(index)
        if step.cells.shape != cells.shape or step.logits.shape != expected.shape:
            raise ValueError(f"step {index}: cells {step.cells.shape}, logits {step.logits.shape}")
        differing = int((step.cells != cells).sum())
        flipped, total, same = flipped + differing, total + cells.size, same and not differing
        error = float(np.abs(step.logits - expected).max()) if np.isfinite(step.logits).all() else np.inf
        always = max(always, error)
        agreeing = max(agreeing, error) if not differing else agreeing
        clean = max(clean, error) if same else clean
        inconsistent += int(step.token != step.logits.argmax())
        if step.token != golden["output_ids"][1 + index]:
            other = max(other, float(golden["logit_gap"][index]))
    return Measured(flipped, total, clean, agreeing, always, other, inconsistent)


def failures(found: Measured, bounds: Bounds) -> list[str]:
    """What is out of bounds, in words; empty when the gate is passed."""

    def exceeds(found: float, bound: float, text: str) -> list[str]:
        return [] if found <= bound else [f"{text}: {found:.3g}, at most {bound:.3g}"]

    return [
        *exceeds(found.flips, bounds.flips, "share of flipped cells"),
        *exceeds(found.clean, bounds.logits, "error of the logits before any flip"),
        *exceeds(found.agreeing, bounds.agreeing, "error of the logits in steps with the official cells"),
        *exceeds(found.always, bounds.always, "error of the logits in all steps"),
        *exceeds(found.other, bounds.gap, "another token where the official one is ahead by"),
        *exceeds(found.inconsistent, 0, "tokens that are not those of the largest logit"),
    ]


def require(model_of: Callable[[Case], OrtModel | TrtModel], cases: Sequence[Case], bounds: Bounds) -> None:
    """Replay the cases, each on the backend that `model_of` opens for it, and assert that they pass together."""
    found = {}
    for case in cases:
        model = model_of(case)
        found[case.name] = measure(case, replayed(case, model, model.geometry))
        print(f"{case.name}: {found[case.name]}")
    problems = failures(together([*found.values()]), bounds)
    assert not problems, "\n".join([*problems, *(f"{name}: {run}" for name, run in found.items())])
